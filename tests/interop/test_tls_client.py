"""The `nbd` driver over TLS: qemu-nbd and our own server, and servers that are not what they should be."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import trustme
from interop.credentials import write_credentials
from processes import Tapdisk
from support import need

from tapcore.chain import open_chain
from tapcore.driver import Env
from tapcore.errors import ChainError, UsageError
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient
from tapcore.nbd.client_codec import ClientNegotiation, NbdError

SIZE = 8 << 20
WAIT_S = 30
Serve = Callable[..., Tapdisk]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    write_credentials(folder / "server", "server", authority, "localhost")
    write_credentials(folder / "client", "client", authority, "guest.example")
    other = trustme.CA()
    write_credentials(folder / "liar", "server", other, "localhost")
    write_credentials(folder / "stranger", "client", other, "guest.example")
    authority.cert_pem.write_to_path(folder / "stranger" / "ca-cert.pem")
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def qemu_nbd(image: Path, credentials: Path, tmp_path: Path) -> Iterator[int]:
    """A qemu-nbd with TLS; its port."""
    need("qemu-nbd")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    pid_file = tmp_path / "pid"
    started = subprocess.run(
        ["qemu-nbd", "--fork", "--pid-file", str(pid_file), "--object",
         f"tls-creds-x509,id=tls,dir={credentials / 'server'},endpoint=server,verify-peer=yes",
         "--tls-creds", "tls", "-b", "127.0.0.1", "-p", str(port), "-x", "vm", "-f", "raw", "-t", str(image)],
        capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert started.returncode == 0, started.stderr
    yield port
    subprocess.run(["kill", pid_file.read_text().strip()], check=False)


def over_tls(folder: Path, port: int, host: str = "localhost") -> str:
    return f"nbd:tls-creds={folder},nbds://{host}:{port}/vm"


def convert(source: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tapcore.img.cli", "convert", "-O", "raw", source, str(target)],
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_disk_of_qemu_nbd(qemu_nbd: int, credentials: Path, image: Path, serve: Serve, tmp_path: Path) -> None:
    """Read as a whole, and served on with a write log: what is written arrives."""
    chain = over_tls(credentials / "client", qemu_nbd)
    convert(chain, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()
    data = Random(4).randbytes(3 << 20)
    tapdisk = serve(f"log:|{chain}", "--name", "on")
    with NbdClient(tapdisk.uri) as guest:
        guest.write(1 << 20, data)
        guest.flush()
        assert guest.read(1 << 20, len(data)) == data
    tapdisk.stop()
    assert image.read_bytes()[1 << 20 : (1 << 20) + len(data)] == data


def test_a_disk_of_our_own(credentials: Path, image: Path, serve: Serve, tmp_path: Path) -> None:
    disk = serve(f"aio:{image}", "--name", "vm", "--nbd", "tcp:localhost:0",
                 "--tls-creds", str(credentials / "server"))
    convert(over_tls(credentials / "client", disk.address.port), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(("server", "client", "host", "text"), [
    ("liar", "client", "localhost", "TLS fails"),
    ("server", "client", "127.0.0.1", "TLS fails"),
    ("server", "stranger", "localhost", "TLS fails|the connection|hung up|reset"),
    (None, "client", "localhost", "the server has no TLS"),
])
def test_who_is_not_who_he_should_be_gets_no_disk(
    credentials: Path, image: Path, serve: Serve, env: Env, server: str | None, client: str, host: str, text: str
) -> None:
    """Another authority's server, one with another name, a client that is not known, a server without TLS."""
    tls = ["--tls-creds", str(credentials / server)] if server else []
    address = "127.0.0.1" if host == "127.0.0.1" or not server else "localhost"
    disk = serve(f"aio:{image}", "--name", "vm", "--nbd", f"tcp:{address}:0", *tls)
    with pytest.raises(ChainError, match=text):
        open_chain(env, over_tls(credentials / client, disk.address.port, host if server else address))


@pytest.mark.parametrize("params", [
    "nbds://localhost/vm", "tls-creds=/x,nbd://localhost/vm", "tls-creds=,nbds://localhost/vm",
    "tls-creds=/missing,nbds://localhost/vm",
])
def test_options_that_make_no_sense(env: Env, params: str) -> None:
    with pytest.raises(ChainError, match=r"go together|/missing"):
        open_chain(env, f"nbd:{params}")


def test_the_small_client_says_that_it_has_none() -> None:
    with pytest.raises(UsageError, match="tls-creds"):
        NbdClient("nbds://localhost/vm")


def starttls(reply: int, more: bytes = b"") -> ClientNegotiation:
    """A client to which a server has answered STARTTLS so."""
    negotiation = ClientNegotiation("vm", uses_tls=True)
    negotiation.feed(wire.GREETING.pack(nbdmagic=wire.NBDMAGIC, ihaveopt=wire.IHAVEOPT,
                                        handshake_flags=wire.NBD_FLAG_FIXED_NEWSTYLE))
    assert b"vm" not in negotiation.output()
    negotiation.feed(wire.OPTION_REPLY.pack(magic=wire.NBD_REP_MAGIC, option=wire.NBD_OPT_STARTTLS,
                                            type=reply, length=0) + more)
    return negotiation


def test_nothing_is_said_before_tls_and_nothing_believed() -> None:
    negotiation = starttls(wire.NBD_REP_ACK)
    assert negotiation.wants_tls
    assert negotiation.output() == b""
    negotiation.tls_begun()
    assert negotiation.output()
    with pytest.raises(Exception, match="do not belong to TLS"):
        starttls(wire.NBD_REP_ACK, b"x")
    for reply in (wire.NBD_REP_ERR_UNSUP, wire.NBD_REP_ERR_POLICY):
        with pytest.raises(NbdError, match="no TLS"):
            starttls(reply)


def test_a_connection_that_breaks_is_made_again(
    credentials: Path, image: Path, serve: Serve, tmp_path: Path
) -> None:
    """A man in the middle cuts it in the midst of a read."""
    disk = serve(f"aio:{image}", "--name", "vm", "--nbd", "tcp:localhost:0",
                 "--tls-creds", str(credentials / "server"))
    cut = threading.Event()

    def pump(source: socket.socket, target: socket.socket, limit_bytes: int) -> None:
        try:
            while limit_bytes > 0 and (data := source.recv(65536)):
                target.sendall(data)
                limit_bytes -= len(data)
        except OSError:
            pass
        if limit_bytes <= 0:
            cut.set()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as middle:
        def serve_two() -> None:
            for limit_bytes in (2 << 20, 1 << 40):
                client = middle.accept()[0]
                server = socket.create_connection(("localhost", disk.address.port))
                threading.Thread(target=pump, args=(client, server, 1 << 40), daemon=True).start()
                threading.Thread(target=pump, args=(server, client, limit_bytes), daemon=True).start()

        threading.Thread(target=serve_two, daemon=True).start()
        on = serve(over_tls(credentials / "client", middle.getsockname()[1]),
                   "--name", "on")
        with NbdClient(on.uri) as guest:
            assert guest.read(0, SIZE) == image.read_bytes()
        assert cut.is_set()
        on.stop()
