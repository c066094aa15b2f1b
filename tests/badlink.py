"""A TCP link between a sync and its replica that misbehaves as a test says: cut, stalled, one-way, slow, and
whatever a rule makes of the messages that pass. Of ZMTP (https://rfc.zeromq.org/spec/23) it knows the frames."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from random import Random

GREETING_BYTES = 64
HANDSHAKE_MESSAGES = 4
"""At most so many of each way are the greeting and the handshake."""
MORE, LONG, COMMAND = 1, 2, 4
OUT, BACK = "out", "back"
"""From the sync to the replica, and back."""
RECV_BYTES = 256 << 10
SLOW_BYTES, SLOW_S = 4096, 0.005


class Cut(Exception):
    """Raised by a rule: the connection ends here."""


class Message:
    """One message, all its frames as they are on the wire; or the greeting, or a command. `number` counts those of
    one way of one connection."""

    def __init__(self, way: str, number: int, data: bytes, is_content: bool) -> None:
        self.way = way
        self.number = number
        self.data = data
        self.is_content = is_content
        """It is neither greeting nor command."""


Rule = Callable[[Message], Iterable[bytes]]


class Splitter:
    """Bytes of one way in, messages out."""

    def __init__(self, way: str) -> None:
        self._way = way
        self._pending = bytearray()
        self._number = 0
        self._greeting_left_bytes = GREETING_BYTES

    def feed(self, data: bytes) -> list[Message]:
        """The greeting comes as the peer says it: the other one waits for its first bytes."""
        found = []
        if greeting := data[: self._greeting_left_bytes]:
            self._greeting_left_bytes -= len(greeting)
            found.append(Message(self._way, 0, greeting, False))
        self._pending += data[len(greeting) :]
        while length := self._length():
            self._number += 1
            is_content = not self._pending[0] & COMMAND
            found.append(Message(self._way, self._number, bytes(self._pending[:length]), is_content))
            del self._pending[:length]
        return found

    def _length(self) -> int:
        """Of the first message; 0 if it is not there in full."""
        pending = self._pending
        at, flags = 0, MORE
        while flags & MORE:
            if len(pending) < at + 2:
                return 0
            flags = pending[at]
            size_bytes = 8 if flags & LONG else 1
            at += 1 + size_bytes + int.from_bytes(pending[at + 1 : at + 1 + size_bytes], "big")
        return at if len(pending) >= at else 0


def as_it_is(message: Message) -> Iterable[bytes]:
    return (message.data,)


class BadLink:
    """Passes connections on to `target`, tcp://HOST:PORT. What is wrong with it may be changed at any time."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self._target = host, int(port)
        self.rule: Rule = as_it_is
        self.is_down = False
        """New connections are dropped at once."""
        self.is_slow = False
        self.connections = 0
        self.errors: list[BaseException] = []
        self._stalled: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, name="link", daemon=True)]
        self._threads[0].start()

    def stall(self, *ways: str) -> None:
        """Pass nothing in these ways any more, but take it; none: pass all again."""
        with self._changed:
            self._stalled = frozenset(ways)
            self._changed.notify_all()

    def cut(self) -> None:
        """Every connection ends now."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self.rule, self.is_down, self.is_slow = as_it_is, False, False
        self.stall()

    def close(self) -> None:
        self._closing.set()
        self.heal()
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()
        assert not self.errors, self.errors

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self.is_down:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets |= {client, server}
            for ends in ((OUT, client, server), (BACK, server, client)):
                thread = threading.Thread(target=self._pass, args=ends, name="link", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        splitter = Splitter(way)
        try:
            while data := source.recv(RECV_BYTES):
                for message in splitter.feed(data):
                    for part in self.rule(message):
                        self._send(way, sink, part)
        except (Cut, OSError):
            pass
        except BaseException as error:
            self.errors.append(error)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._sockets.discard(source)
        source.close()

    def _send(self, way: str, sink: socket.socket, data: bytes) -> None:
        at = 0
        while at < len(data):
            with self._changed:
                self._changed.wait_for(lambda: way not in self._stalled)
            step = SLOW_BYTES if self.is_slow else len(data)
            if self.is_slow:
                self._closing.wait(SLOW_S)
            sink.sendall(data[at : at + step])
            at += step


# Rules


def cut_after(count: int, way: str) -> Rule:
    """Each connection ends after `count` messages in that way."""

    def rule(message: Message) -> Iterable[bytes]:
        if message.way == way and message.number == count:
            raise Cut
        return (message.data,)

    return rule


class Meddler:
    """A rule: of the messages that pass after the handshake, `meddle` changes each one with `probability`, `limit`
    of them. `done` counts."""

    def __init__(self, meddle: Callable[[bytes, Random], Iterable[bytes]], random: Random, probability: float,
                 limit: int) -> None:
        self.done = 0
        self._meddle = meddle
        self._random = random
        self._probability = probability
        self._limit = limit
        self._lock = threading.Lock()

    def __call__(self, message: Message) -> Iterable[bytes]:
        with self._lock:
            if (not message.is_content or message.number < HANDSHAKE_MESSAGES or self.done >= self._limit
                    or self._random.random() >= self._probability):
                return (message.data,)
            self.done += 1
            return list(self._meddle(message.data, self._random))


def flip(data: bytes, random: Random) -> Iterable[bytes]:
    """One bit, anywhere: in the framing, too."""
    flipped = bytearray(data)
    flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
    yield bytes(flipped)


def double(data: bytes, random: Random) -> Iterable[bytes]:
    yield data
    yield data


def drop(data: bytes, random: Random) -> Iterable[bytes]:
    return ()


def swapper(random: Random, probability: float, limit: int) -> Rule:
    """A rule: some messages pass behind the one that follows them."""
    held: dict[str, bytes] = {}
    left = [limit]

    def rule(message: Message) -> Iterable[bytes]:
        if message.number == 0:
            held.pop(message.way, None)
        if message.way in held:
            return (message.data, held.pop(message.way))
        if (message.is_content and message.number >= HANDSHAKE_MESSAGES and left[0]
                and random.random() < probability):
            left[0] -= 1
            held[message.way] = message.data
            return ()
        return (message.data,)

    return rule
