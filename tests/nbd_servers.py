"""NBD servers of other makes, and one that says what the test says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from tempfile import mkdtemp

from support import need

from tapcore.nbd import wire

END_TIMEOUT_S = 10
FLAGS = (wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_SEND_TRIM
         | wire.NBD_FLAG_SEND_WRITE_ZEROES | wire.NBD_FLAG_SEND_FAST_ZERO)


class Server:
    """A program that serves NBD on the socket `path`, which it gets as an open descriptor (sd_listen_fds(3)):
    clients may connect from the beginning."""

    def __init__(self, *command: str) -> None:
        need(command[0])
        self.folder = Path(mkdtemp(prefix="nbd-"))
        self.path = self.folder / "socket"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(64)
            self._process = subprocess.Popen(
                ["sh", "-c", 'exec 3<&0 </dev/null; LISTEN_PID=$$ exec "$@"', "sh", *self._command],
                stdin=listener.fileno(), env=os.environ | {"LISTEN_FDS": "1"})

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash does it; nobody listens afterwards."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(END_TIMEOUT_S)
        self._process = None
        self.path.unlink()

    def stop(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder)


def nbdkit(*arguments: str) -> Server:
    return Server("nbdkit", "--foreground", *arguments)


def qemu_nbd(image: Path, *arguments: str) -> Server:
    return Server("qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--discard=unmap", *arguments,
                  str(image))


class Script:
    """A server in the test's hands: it listens, negotiates when a client is accepted, and then does what it is
    told. To be used from a thread other than the client's."""

    def __init__(self, path: Path, size_bytes: int, flags: int = FLAGS, blocks: tuple[int, int, int] | None = None,
                 *, structured: bool = True) -> None:
        self.size_bytes = size_bytes
        self.flags = flags
        self.blocks = blocks
        self._structured = structured
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._listener.settimeout(END_TIMEOUT_S)
        self.client: socket.socket

    def accept(self) -> None:
        """Take the next client, and lead it through the handshake."""
        self.client, _ = self._listener.accept()
        self.client.settimeout(END_TIMEOUT_S)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.send(wire.GREETING.pack(nbdmagic=wire.NBDMAGIC, ihaveopt=wire.IHAVEOPT, handshake_flags=3))
        self.receive(wire.CLIENT_FLAGS.size)
        option = 0
        while option != wire.NBD_OPT_GO:
            head = wire.OPTION.unpack(self.receive(wire.OPTION.size))
            option = head["option"]
            self.receive(head["length"])
            if option == wire.NBD_OPT_GO:
                self._reply(option, wire.NBD_REP_INFO, wire.INFO_EXPORT.pack(
                    type=wire.NBD_INFO_EXPORT, size_bytes=self.size_bytes, flags=self.flags))
                if self.blocks:
                    self._reply(option, wire.NBD_REP_INFO, wire.INFO_BLOCK_SIZE.pack(
                        type=wire.NBD_INFO_BLOCK_SIZE, min_block=self.blocks[0], preferred_block=self.blocks[1],
                        max_block=self.blocks[2]))
                self._reply(option, wire.NBD_REP_ACK)
            elif option == wire.NBD_OPT_STRUCTURED_REPLY and self._structured:
                self._reply(option, wire.NBD_REP_ACK)
            elif option == wire.NBD_OPT_SET_META_CONTEXT:
                self._reply(option, wire.NBD_REP_META_CONTEXT, wire.META_CONTEXT.pack(id=7) + b"base:allocation")
                self._reply(option, wire.NBD_REP_ACK)
            else:
                self._reply(option, wire.NBD_REP_ERR_UNSUP)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(wire.OPTION_REPLY.pack(magic=wire.NBD_REP_MAGIC, option=option, type=kind, length=len(data))
                  + data)

    def send(self, data: bytes) -> None:
        self.client.sendall(data)

    def receive(self, count_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < count_bytes:
            piece = self.client.recv(count_bytes - len(data))
            if not piece:
                raise ConnectionResetError("the client hung up")
            data += piece
        return bytes(data)

    def request(self) -> dict[str, int]:
        """The next request; of a write, the payload is in `payload`."""
        head = wire.REQUEST.unpack(self.receive(wire.REQUEST.size))
        self.payload = self.receive(head["length"]) if head["type"] == wire.NBD_CMD_WRITE else b""
        return head

    def answer(self, request: dict[str, int], code: int = 0, data: bytes = b"") -> None:
        """A reply: simple, or a read's in one chunk."""
        if self._structured and request["type"] == wire.NBD_CMD_READ and not code:
            self.chunk(request, wire.NBD_REPLY_TYPE_OFFSET_DATA,
                       wire.OFFSET_DATA.pack(offset=request["offset"]) + data)
        elif self._structured and request["type"] in (wire.NBD_CMD_READ, wire.NBD_CMD_BLOCK_STATUS):
            self.chunk(request, wire.NBD_REPLY_TYPE_ERROR, wire.ERROR.pack(error=code, message_length=0))
        else:
            self.send(wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=code,
                                             cookie=request["cookie"]) + data)

    def chunk(self, request: dict[str, int], kind: int, payload: bytes, *, done: bool = True) -> None:
        self.send(wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=int(done), type=kind,
                                  cookie=request["cookie"], length=len(payload)) + payload)

    def hang_up(self) -> None:
        self.client.close()

    def close(self) -> None:
        self._listener.close()
        self.client.close()
