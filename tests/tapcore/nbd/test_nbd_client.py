"""NbdClient against real servers (nbdkit, qemu-nbd) and, for what they never do, against a scripted one."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import need

from tapcore.errors import ProtocolError, UsageError
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.nbd.negotiate import ExportInfo, ServerNegotiation

SIZE_BYTES = 8 << 20
MIB = 1 << 20
BASE = wire.BASE_ALLOCATION

Serve = Callable[..., str]
"""(command line …) → URI without an export's name."""


def listening_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(8)
    return sock


def unix_uri(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


@pytest.fixture
def activate() -> Iterator[Callable[[socket.socket, tuple[str, ...]], None]]:
    """Start servers on sockets that listen already (systemd's socket activation: no waiting until they do)."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(sock: socket.socket, command: tuple[str, ...]) -> None:
        need(command[0])
        script = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 0</dev/null'
        servers.append(subprocess.Popen(["sh", "-c", script, "sh", *command], stdin=sock.fileno()))

    yield start
    for server in servers:
        server.terminate()
    for server in servers:
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(5)


@pytest.fixture
def serve(tmp_path: Path, activate: Callable[[socket.socket, tuple[str, ...]], None]) -> Serve:
    """Start a server on a UNIX socket; the URI of its default export."""

    def start(*command: str, export: str = "") -> str:
        path = tmp_path / "nbd.sock"
        with listening_unix(path) as sock:
            activate(sock, command)
        return unix_uri(path, export)

    return start


def nbdkit_memory(*options: str) -> tuple[str, ...]:
    return ("nbdkit", "-f", *options, "memory", str(SIZE_BYTES))


def qemu_nbd(image: Path, *options: str, format: str = "raw") -> tuple[str, ...]:
    return ("qemu-nbd", "-t", "-e", "4", "-f", format, "--discard=unmap", *options, str(image))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def uri(request: pytest.FixtureRequest, serve: Serve, image: Path) -> str:
    """An empty disk of SIZE_BYTES behind each kind of server."""
    return serve(*(nbdkit_memory() if request.param == "nbdkit" else qemu_nbd(image)))


@pytest.fixture(params=[True, False], ids=["structured", "simple"])
def client(request: pytest.FixtureRequest, uri: str) -> Iterator[NbdClient]:
    with NbdClient(uri, structured_replies=request.param, timeout_s=10) as client:
        yield client


def pattern(length: int, seed: int) -> bytes:
    return bytes((seed + i) % 251 for i in range(251)) * (length // 251 + 1)


# Real servers


def test_what_is_written_is_read(client: NbdClient) -> None:
    data = pattern(100_000, 3)[:100_000]
    assert client.size_bytes == SIZE_BYTES
    client.write(4096, data)
    client.write(SIZE_BYTES - 512, data[:512], fua=True)
    client.flush()
    assert client.read(4096, len(data)) == data
    assert client.read(0, 4096) == bytes(4096)
    assert client.read(SIZE_BYTES - 1024, 1024) == bytes(512) + data[:512]


def test_trim_and_zeroes_clear(client: NbdClient) -> None:
    client.write(0, b"\xaa" * MIB)
    client.zeroes(0, 65536)
    client.zeroes(65536, 65536, no_hole=True, fua=True)
    client.trim(131072, 65536, fua=True)
    assert client.read(0, 131072) == bytes(131072)
    assert client.read(196608, 4096) == b"\xaa" * 4096


def test_cache(client: NbdClient) -> None:
    assert client.flags & wire.NBD_FLAG_SEND_CACHE
    client.cache(0, 65536)
    assert client.read(0, 512) == bytes(512)


def test_block_status_tells_data_from_holes(uri: str) -> None:
    with NbdClient(uri, contexts=[BASE], timeout_s=10) as client:
        assert client.contexts == [BASE]
        client.write(2 * MIB, b"\x55" * MIB)
        client.flush()
        extents = client.block_status(0, SIZE_BYTES)[BASE]
        hole = wire.NBD_STATE_HOLE | wire.NBD_STATE_ZERO
        assert extents == [(2 * MIB, hole), (MIB, 0), (5 * MIB, hole)]
        assert client.block_status(2 * MIB, SIZE_BYTES - 2 * MIB, one=True)[BASE] == [(MIB, 0)]


def test_without_contexts_a_block_status_fails_and_the_connection_lives(uri: str) -> None:
    with NbdClient(uri, timeout_s=10) as client:
        assert client.contexts == []
        with pytest.raises(NbdError) as caught:
            client.block_status(0, 4096)
        assert caught.value.errno == errno.EINVAL
        assert client.read(0, 16) == bytes(16)


def test_dirty_bitmap_of_qemu(serve: Serve, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    qcow2 = tmp_path / "disk.qcow2"
    for command in (["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), str(SIZE_BYTES)],
                    ["qemu-img", "bitmap", "--add", "-g", "65536", str(qcow2), "b0"],
                    ["qemu-io", "-c", "write -q 128k 64k", str(qcow2)]):
        subprocess.run(command, check=True, timeout=20)
    name = f"{wire.QEMU_DIRTY_BITMAP}b0"
    uri = serve(*qemu_nbd(qcow2, "-r", "-B", "b0", format="qcow2"))
    with NbdClient(uri, contexts=[BASE, name, "x-nobody:knows"], timeout_s=10) as client:
        assert sorted(client.contexts) == [BASE, name]
        answer = client.block_status(0, SIZE_BYTES)
        assert answer[name] == [(131072, 0), (65536, wire.QEMU_STATE_DIRTY), (SIZE_BYTES - 196608, 0)]
        assert sum(length for length, _ in answer[BASE]) == SIZE_BYTES


def test_unknown_export(serve: Serve, image: Path) -> None:
    uri = serve(*qemu_nbd(image, "-x", "disk"), export="other")
    with pytest.raises(NbdError, match="'other'") as caught:
        NbdClient(uri, timeout_s=10)
    assert caught.value.errno == errno.ENOENT
    with NbdClient(uri.replace("other", "disk"), timeout_s=10) as client:
        assert client.size_bytes == SIZE_BYTES


@pytest.mark.parametrize(("server", "code"), [("nbdkit", errno.EPERM), ("qemu-nbd", errno.EINVAL)])
def test_read_only_export(serve: Serve, image: Path, server: str, code: int) -> None:
    """The protocol asks for EPERM; qemu-nbd says EINVAL."""
    uri = serve(*(nbdkit_memory("-r") if server == "nbdkit" else qemu_nbd(image, "-r")))
    with NbdClient(uri, timeout_s=10) as client:
        assert client.read_only
        with pytest.raises(NbdError) as caught:
            client.write(0, b"no")
        assert caught.value.errno == code
        assert client.read(0, 2) == bytes(2)


def test_beyond_the_end(client: NbdClient) -> None:
    with pytest.raises(NbdError) as caught:
        client.read(SIZE_BYTES - 512, 1024)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(NbdError) as caught:
        client.write(SIZE_BYTES, b"x" * 512)
    assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)
    assert "NBD_CMD_WRITE of 512 bytes" in str(caught.value)
    assert client.read(0, 16) == bytes(16)


def test_errors_of_the_server_s_own(serve: Serve) -> None:
    uri = serve(*nbdkit_memory("--filter=error"), "error-pread=EIO", "error-pread-rate=100%")
    for structured in (True, False):
        with NbdClient(uri, structured_replies=structured, timeout_s=10) as client:
            with pytest.raises(NbdError) as caught:
                client.read(0, 65536)
            assert caught.value.errno == errno.EIO
            client.write(0, b"goes")


def test_many_requests_in_flight(client: NbdClient) -> None:
    """Far more replies than socket buffers hold, while requests are still being sent."""
    handles = {client.submit(wire.NBD_CMD_READ, offset, MIB): offset for offset in range(0, 8 * MIB, MIB // 2)
               if offset + MIB <= SIZE_BYTES}
    handles |= {client.submit(wire.NBD_CMD_WRITE, offset, MIB, bytes([1 + offset // MIB]) * MIB): offset
                for offset in range(0, 8 * MIB, MIB)}
    assert client.in_flight == len(handles) == 23
    seen = []
    while client.in_flight:
        handle, error, _ = client.wait()
        assert error == 0
        seen.append(handle)
    assert sorted(seen) == sorted(handles)
    handles = {client.submit(wire.NBD_CMD_READ, offset, 4096): offset for offset in range(0, 8 * MIB, MIB)}
    for _ in range(8):
        handle, error, data = client.wait()
        assert error == 0
        assert isinstance(data, bytearray)
        assert data == bytes([1 + handles[handle] // MIB]) * 4096


def test_wait_with_nothing_under_way(client: NbdClient) -> None:
    with pytest.raises(UsageError, match="no request"):
        client.wait()


def test_a_plain_call_between_submitted_ones(client: NbdClient) -> None:
    client.write(0, b"abcd")
    first = client.submit(wire.NBD_CMD_READ, 0, 2)
    assert client.read(2, 2) == b"cd"
    assert client.wait() == (first, 0, bytearray(b"ab"))


def test_errors_among_many(client: NbdClient) -> None:
    bad = client.submit(wire.NBD_CMD_READ, SIZE_BYTES, 512)
    good = client.submit(wire.NBD_CMD_READ, 0, 512)
    ends = {handle: (error, data) for handle, error, data in (client.wait(), client.wait())}
    assert ends == {bad: (errno.EINVAL, None), good: (0, bytes(512))}


def test_unfragmented_read(uri: str) -> None:
    with NbdClient(uri, timeout_s=10) as client:
        assert client.flags & wire.NBD_FLAG_SEND_DF
        client.write(65536, b"\x77" * 4096)
        assert client.read(0, 131072, flags=wire.NBD_CMD_FLAG_DF)[65536:69632] == b"\x77" * 4096


def test_sparse_read_in_structured_chunks(serve: Serve, image: Path) -> None:
    """qemu-nbd answers with NBD_REPLY_TYPE_OFFSET_HOLE where the image is a hole."""
    with NbdClient(serve(*qemu_nbd(image)), timeout_s=10) as client:
        client.write(MIB, b"\x99" * 65536)
        assert client.read(0, 2 * MIB) == bytes(MIB) + b"\x99" * 65536 + bytes(MIB - 65536)


def test_over_tcp(activate: Callable[[socket.socket, tuple[str, ...]], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        activate(sock, nbdkit_memory())
        port = sock.getsockname()[1]
    with NbdClient(f"nbd://127.0.0.1:{port}/any", timeout_s=10) as client:
        client.write(0, pattern(3 * MIB, 9)[: 3 * MIB])
        assert client.read(0, 3 * MIB) == pattern(3 * MIB, 9)[: 3 * MIB]


@pytest.mark.parametrize("mask", ["0", "1", "2"])
def test_servers_that_are_not_fixed_or_send_zeroes(serve: Serve, mask: str) -> None:
    with NbdClient(serve(*nbdkit_memory(f"--mask-handshake={mask}")), contexts=[BASE], timeout_s=10) as client:
        assert client.offer.structured_replies == (mask == "1")
        assert client.size_bytes == SIZE_BYTES
        client.write(0, b"works")
        assert client.read(0, 5) == b"works"


def test_server_without_structured_replies(serve: Serve) -> None:
    with NbdClient(serve(*nbdkit_memory("--no-sr")), contexts=[BASE], timeout_s=10) as client:
        assert (client.offer.structured_replies, client.contexts) == (False, [])
        assert client.read(0, 5) == bytes(5)


def test_oldstyle_server_is_refused(serve: Serve) -> None:
    uri = serve(*nbdkit_memory("-o"))
    with pytest.raises(ProtocolError, match="oldstyle"):
        NbdClient(uri, timeout_s=10)


def test_disconnect_ends_the_session(uri: str) -> None:
    client = NbdClient(uri, timeout_s=10)
    client.disconnect()
    with pytest.raises(NbdError) as caught:
        client.read(0, 512)
    assert caught.value.errno == errno.EBADF
    client.disconnect()
    with NbdClient(uri, timeout_s=10) as other:
        assert other.read(0, 1) == bytes(1)


# A scripted server


class OneExport:
    def names(self) -> list[tuple[str, str]]:
        return [("", "")]

    def find(self, name: str) -> ExportInfo | None:
        return None if name else ExportInfo("", SIZE_BYTES, wire.NBD_FLAG_HAS_FLAGS, contexts=(BASE,))


Script = Callable[[Callable[[socket.socket], None]], str]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Script]:
    """Serve one connection with a function of the test's own, after our handshake; the URI."""
    threads: list[threading.Thread] = []
    path = tmp_path / "scripted.sock"
    with contextlib.ExitStack() as stack:

        def start(behave: Callable[[socket.socket], None]) -> str:
            listener = stack.enter_context(listening_unix(path))

            def run() -> None:
                with listener.accept()[0] as peer:
                    peer.settimeout(10)
                    negotiation = ServerNegotiation(OneExport())
                    peer.sendall(negotiation.greeting())
                    while negotiation.result is None and not negotiation.finished:
                        negotiation.feed(peer.recv(4096))
                        peer.sendall(negotiation.output())
                    behave(peer)

            threads.append(threading.Thread(target=run))
            threads[-1].start()
            return unix_uri(path)

        yield start
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def until_closed(peer: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while peer.recv(65536):
            pass


def test_a_server_that_falls_silent(scripted: Script) -> None:
    client = NbdClient(scripted(until_closed), timeout_s=0.1)
    with pytest.raises(NbdError, match=r"no answer for 0\.1 s") as caught:
        client.read(0, 512)
    assert caught.value.errno == errno.ETIMEDOUT
    assert client.sock.fileno() == -1


def test_a_server_that_receives_no_more(scripted: Script) -> None:
    """The request does not fit into the socket's buffers, and nobody takes it."""
    stop = threading.Event()

    def wait(peer: socket.socket) -> None:
        stop.wait(10)

    client = NbdClient(scripted(wait), timeout_s=0.1)
    with pytest.raises(NbdError) as caught:
        client.write(0, bytes(8 * MIB))
    stop.set()
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_listener_that_never_speaks(tmp_path: Path) -> None:
    with listening_unix(tmp_path / "mute.sock"), pytest.raises(NbdError) as caught:
        NbdClient(unix_uri(tmp_path / "mute.sock"), timeout_s=0.1)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_server_that_hangs_up(scripted: Script) -> None:
    client = NbdClient(scripted(lambda peer: None), timeout_s=10)
    with pytest.raises(NbdError) as caught:
        while True:
            client.read(0, 512)
    assert caught.value.errno in (errno.ECONNRESET, errno.EPIPE)


def test_a_server_that_talks_garbage(scripted: Script) -> None:
    def garbage(peer: socket.socket) -> None:
        peer.recv(28)
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    client = NbdClient(scripted(garbage), timeout_s=10)
    with pytest.raises(ProtocolError, match="magic"):
        client.read(0, 512)
    assert client.sock.fileno() == -1


def test_no_server_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NbdClient(unix_uri(tmp_path / "none.sock"))


# URIs
