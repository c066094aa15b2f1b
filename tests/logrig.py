"""A log over a disk in memory, served by a loop in a thread: for tests with real sockets and shared memory."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from support import LoopThread, Manual

from tapcore.driver import DiskInfo, Driver, Env, OpenFlag
from tapcore.drivers.log import Log
from tapcore.request import WRITE, Request
from writelog.client import LogClient
from writelog.control import MESSAGE, Message, decode_shmp_reply
from writelog.logstore import forget
from writelog.shm import DISK_RANGE, Region

T = TypeVar("T")
TIMEOUT_S = 20


class Hollow(Driver):
    """A disk of any size without content: reads leave their buffers, writes go nowhere."""

    def __init__(self, env: Env, size_bytes: int) -> None:
        super().__init__(env, "hollow", OpenFlag.NONE)
        self.info = DiskInfo(size_bytes)

    def queue_read(self, request: Request) -> bool:
        return True

    def queue_write(self, request: Request) -> bool:
        return True


class Rig:
    """`log` over `leaf`, which completes at once unless `leaf.early` is False."""

    def __init__(
        self, env: Env, size_bytes: int = 1 << 20, params: str = "disk", leaf: Driver | None = None
    ) -> None:
        self.env = env
        self.leaf = Manual(env, str(size_bytes), OpenFlag.NONE)
        if leaf is None:
            self.leaf.open()
            self.leaf.early = True
        self.log = Log(env, params, OpenFlag.NONE)
        self.log.attach(leaf or self.leaf)
        self.log.open()
        self.path = self.log.socket_path
        self.loop_thread = LoopThread(env)

    def call(self, function: Callable[[], T]) -> T:
        return self.loop_thread.call(function)

    def write(self, offset: int, data: bytes) -> Request:
        """A write through the log; it is in flight afterwards if the leaf is not `early`."""
        request = Request(WRITE, offset, len(data), [memoryview(data)], done=lambda _: None)
        self.call(lambda: self.log.queue_write(request))
        return request

    def dirty(self) -> list[int]:
        """The blocks marked in the dirty bitmap."""
        return self.call(lambda: list(self.log._map.dirty.bits.search(1)))

    def leased(self) -> list[int]:
        return self.call(lambda: list(self.log._map.taken.bits.search(1)))

    def client(self) -> LogClient:
        return LogClient(self.path, TIMEOUT_S)

    def raw(self) -> RawClient:
        return RawClient(str(self.path))

    def clients(self) -> int:
        return self.call(lambda: self.log.figures()).clients

    def close(self) -> None:
        self.call(self.log.close)
        self.loop_thread.stop()
        forget(self.env.run_dir, self.log.log_name)


@contextmanager
def rig_of(env: Env, size_bytes: int = 1 << 20, params: str = "disk", leaf: Driver | None = None) -> Iterator[Rig]:
    rig = Rig(env, size_bytes, params, leaf)
    try:
        yield rig
    finally:
        rig.close()


class RawClient:
    """The bytes of docs/protocol.md and nothing else."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(path)
        self.region: Region | None = None

    def close(self) -> None:
        self.sock.close()
        if self.region is not None:
            self.region.close()
            self.region = None

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            assert part, f"the server closed the connection after {data!r}"
            data += part
        return data

    def is_closed(self) -> bool:
        """Wait for the server to close the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def ask(self, command: bytes, **fields: int) -> bytes:
        """Send a message, all-zero but for `fields`; its reply of 4 bytes."""
        self.send(Message(command, **fields).encode())
        return self.receive(4)

    def attach(self) -> Region:
        self.send(b"shmp" + bytes(MESSAGE.size - 4))
        self.region = Region.attach(decode_shmp_reply(self.receive(256)))
        return self.region

    def ranges(self) -> list[tuple[int, int]]:
        """The (sector, count) in the export area."""
        assert self.region is not None
        out = []
        for sector, count in DISK_RANGE.struct.iter_unpack(self.region.export):
            if count == 0:
                break
            out.append((sector, count))
        return out
