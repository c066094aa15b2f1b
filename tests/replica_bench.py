"""A replica and its peers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import zmq
from support import Manual

from tapcore.driver import Env, OpenFlag
from tapcore.vbd import Vbd
from writelog import wire
from writelog.replica_server import ReplicaServer
from writelog.wire import (
    Barrier,
    Base,
    Data,
    Digest,
    Failure,
    Hello,
    Message,
    Refused,
    RunningDigest,
    Welcome,
    Zero,
)

T = TypeVar("T", bound=Message)

SIZE_BYTES = 1 << 20
WAIT_S = 10.0
UNTOUCHED = bytearray(b"\xee" * SIZE_BYTES)


class Peer:
    """A sync played by the test: a DEALER socket, and the loop of the replica."""

    def __init__(self, env: Env, endpoint: str, session_id: bytes = bytes(16)) -> None:
        self.env = env
        self.id = session_id
        self.base = 7
        self.in_place = False
        self.seq = 0
        self.digest = RunningDigest()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def send(self, message: Message, *payload: bytes) -> None:
        self.send_frames([wire.encode(message), *payload])

    def send_frames(self, frames: Sequence[bytes]) -> None:
        self.socket.send_multipart(frames)

    def data(self, offset: int, payload: bytes) -> None:
        self.seq += 1
        message = Data(self.seq, offset, len(payload), wire.checksum(payload))
        self.digest.add(message)
        self.send(message, payload)

    def zero(self, offset: int, length: int) -> None:
        self.seq += 1
        message = Zero(self.seq, offset, length)
        self.digest.add(message)
        self.send(message)

    def barrier(self) -> bytes:
        """Send one and wait for its answer."""
        self.seq += 1
        self.send(Barrier(self.seq))
        answer = self.expect(Digest)
        assert answer == Digest(self.seq, self.digest.digest())
        return answer.digest

    def expect(self, kind: type[T], match: Callable[[T], bool] = lambda _: True) -> T:
        """The next answer of a kind that matches; others before it are dropped."""
        while True:
            message = self.expect_any(kind)
            if isinstance(message, kind) and match(message):
                return message

    def expect_any(self, *kinds: type[object]) -> Message:
        """The next answer of these kinds. Others before it are dropped; an ERROR that is not expected fails."""
        found: list[Message] = []

        def look() -> bool:
            while not found and self.socket.poll(0):
                message, _ = wire.decode(self.socket.recv_multipart())
                assert Failure in kinds or not isinstance(message, Failure), message
                if isinstance(message, kinds):
                    found.append(message)
            return bool(found)

        self.env.loop.run_until(look, WAIT_S)
        return found[0]

    def hello(self, size_bytes: int = SIZE_BYTES, version: int = wire.VERSION) -> None:
        self.send(Hello(version, self.id, size_bytes, "vm1", self.base, 0, False, self.in_place))

    def begin(self) -> Welcome:
        self.hello()
        welcome = self.expect(Welcome)
        self.send(Base(self.base))
        return welcome

    def is_welcome(self) -> bool:
        """Whether a HELLO is answered with WELCOME; False if it is refused."""
        self.hello()
        return isinstance(self.expect_any(Refused, Welcome), Welcome)

    def close(self) -> None:
        self.context.destroy(linger=0)


class Bench:
    """A replica of a `manual:` disk, whose requests end at once unless `driver.early` is unset, and its peers."""

    def __init__(self, env: Env, flags: OpenFlag = OpenFlag.NONE) -> None:
        self.env = env
        self.vbd = Vbd(env, "replica")
        self.vbd.open(f"manual:{SIZE_BYTES}", flags)
        self.vbd.pause(lambda: None)
        head = self.vbd.chain.head
        assert isinstance(head, Manual)
        self.driver = head
        self.driver.data[:] = UNTOUCHED
        self.driver.early = True
        self.ends: list[bool] = []
        self.peers: list[Peer] = []
        self.server = ReplicaServer(env, self.vbd, "unix:/x", peer_timeout_s=5, on_end=self.ends.append)
        self.endpoint = self.server.listen("tcp://127.0.0.1:0")

    def peer(self, session_id: bytes = bytes(16)) -> Peer:
        self.peers.append(Peer(self.env, self.endpoint, session_id))
        return self.peers[-1]

    def go_on(self) -> None:
        """Requests end at once again, those that wait too."""
        self.driver.early = True
        self.driver.finish()

    def close(self) -> None:
        done: list[int] = []
        self.server.close(lambda: done.append(1))
        self.go_on()
        self.env.loop.run_until(lambda: bool(done), WAIT_S)
        for peer in self.peers:
            peer.close()
