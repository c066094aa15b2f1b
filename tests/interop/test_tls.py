"""TLS with certificates on both sides, as nbdinfo and qemu-img speak it; and who is not let in."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from interop.credentials import write_credentials
from processes import Tapdisk
from support import need

from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError

SIZE = 8 << 20
Serve = Callable[..., Tapdisk]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    write_credentials(folder / "server", "server", authority, "localhost", "127.0.0.1")
    write_credentials(folder / "client", "client", authority, "guest.example")
    write_credentials(folder / "stranger", "client", trustme.CA(), "guest.example")
    authority.cert_pem.write_to_path(folder / "stranger" / "ca-cert.pem")
    return folder


@pytest.fixture
def disk(serve: Serve, credentials: Path, tmp_path: Path) -> Tapdisk:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * (SIZE // 256))
    return serve(f"log:|aio:{image}", "--name", "vm", "--nbd", "tcp:localhost:0",
                 "--tls-creds", str(credentials / "server"))


def qemu_img(disk: Tapdisk, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    need("qemu-img")
    options = (f"driver=nbd,server.type=inet,server.host=localhost,server.port={disk.address.port},export=vm,"
               "tls-creds=tls")
    return subprocess.run(
        ["qemu-img", words[0], "--object", f"tls-creds-x509,id=tls,dir={folder},endpoint=client", "--image-opts",
         *words[1:-1], options, words[-1]], capture_output=True, text=True, timeout=60, check=False)


def test_the_address_says_that_tls_is_used(disk: Tapdisk) -> None:
    assert disk.uri == f"nbds://localhost:{disk.address.port}/vm"


def test_qemu_img_reads_a_disk_through_tls(disk: Tapdisk, credentials: Path, tmp_path: Path) -> None:
    done = qemu_img(disk, credentials / "client", "convert", "-O", "raw", str(tmp_path / "copy.img"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy.img").read_bytes() == bytes(range(256)) * (SIZE // 256)


@pytest.mark.parametrize("options", [
    ["--connections=1", "--requests=64", "--request-size=4096"], ["--connections=4"],
    ["--connections=2", "--requests=8", "--request-size=4194304"]])
def test_nbdcopy_writes_and_reads_a_disk_through_tls(
    disk: Tapdisk, credentials: Path, tmp_path: Path, options: list[str]
) -> None:
    """Small requests and large, few and many: records, requests and buffers end at different places."""
    need("nbdcopy")
    uri = f"{disk.uri}?tls-certificates={credentials / 'client'}"
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    source.write_bytes(bytes(range(255, -1, -1)) * (SIZE // 256))
    target.touch()
    for command in ((str(source), uri), (uri, str(target))):
        done = subprocess.run(["nbdcopy", *options, *command], capture_output=True, text=True, timeout=60,
                              check=False)
        assert done.returncode == 0, done.stderr
    assert target.read_bytes() == source.read_bytes()


def test_a_stranger_is_not_let_in(disk: Tapdisk, credentials: Path, tmp_path: Path) -> None:
    done = qemu_img(disk, credentials / "stranger", "convert", "-O", "raw", str(tmp_path / "copy.img"))
    assert done.returncode != 0
    done = qemu_img(disk, credentials / "client", "convert", "-O", "raw", str(tmp_path / "copy.img"))
    assert done.returncode == 0, "others are served all the same"


def test_who_does_not_use_tls_is_told_to(disk: Tapdisk) -> None:
    with pytest.raises(NbdError, match="TLS"):
        NbdClient(f"nbd://localhost:{disk.address.port}/vm")
    need("nbdinfo")
    done = subprocess.run(["nbdinfo", "--list", f"nbd://localhost:{disk.address.port}"], capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode != 0 and "nbd_opt_list" in done.stderr


def starttls(port: int, more: bytes = b"") -> socket.socket:
    """A connection that has asked for TLS, and said `more` with it."""
    sock = socket.create_connection(("localhost", port), 20)
    sock.recv(wire.GREETING.size, socket.MSG_WAITALL)
    sock.sendall(wire.CLIENT_FLAGS.pack(flags=wire.NBD_FLAG_C_FIXED_NEWSTYLE)
                 + wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_STARTTLS, length=0) + more)
    return sock


def test_what_was_said_in_the_clear_behind_starttls_ends_the_connection(disk: Tapdisk) -> None:
    option = wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_LIST, length=0)
    with starttls(disk.address.port, option) as sock:
        answer = b""
        while data := sock.recv(4096):
            answer += data
    assert len(answer) <= wire.OPTION_REPLY.size


def test_a_client_that_hangs_up_in_the_handshake_harms_nobody(disk: Tapdisk, credentials: Path) -> None:
    with starttls(disk.address.port) as sock:
        sock.recv(wire.OPTION_REPLY.size, socket.MSG_WAITALL)
        sock.sendall(b"\x16\x03\x01\x02")
    with starttls(disk.address.port) as sock:
        sock.recv(wire.OPTION_REPLY.size, socket.MSG_WAITALL)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    context = ssl.create_default_context(cafile=str(credentials / "client" / "ca-cert.pem"))
    context.load_cert_chain(credentials / "client" / "client-cert.pem", credentials / "client" / "client-key.pem")
    with starttls(disk.address.port) as plain:
        plain.recv(wire.OPTION_REPLY.size, socket.MSG_WAITALL)
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            name = wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_EXPORT_NAME, length=2) + b"vm"
            secure.sendall(name)
            assert len(secure.recv(wire.EXPORT_REPLY.size)) == wire.EXPORT_REPLY.size


@pytest.mark.parametrize(("broken", "words"), [
    ("missing", "cannot read"), ("open", "is open to other users"), ("not PEM", "TLS credentials in")])
def test_bad_credentials_are_named_before_anything_is_served(
    credentials: Path, tmp_path: Path, broken: str, words: str
) -> None:
    folder = write_credentials(tmp_path / "creds", "server", trustme.CA(), "localhost")
    if broken == "missing":
        (folder / "server-key.pem").unlink()
    elif broken == "open":
        (folder / "server-key.pem").chmod(0o644)
    else:
        (folder / "server-cert.pem").write_text("nothing")
    with pytest.raises(AssertionError, match=words):
        Tapdisk(tmp_path, "ram:1M", "--nbd", "tcp:localhost:0", "--tls-creds", str(folder))


def test_other_hosts_are_not_listened_for_without_tls(serve: Serve) -> None:
    with pytest.raises(AssertionError, match="without TLS"):
        serve("ram:1M", "--nbd", "tcp:0.0.0.0:0")
