"""TLS of NBD: credentials, and a socket that is used like a plain one that does not block.

Credentials are a folder with the names that QEMU and libnbd use (https://www.qemu.org/docs/master/system/tls.html):

    ca-cert.pem        who signs clients' certificates
    server-cert.pem    what this server shows
    server-key.pem     its key, for its owner's eyes alone
    client-cert.pem, client-key.pem     the same of a client

A client must show a certificate signed by that authority: that is all there is to who may use a disk over TCP.
Our client takes a server only with a certificate that its own authority has signed, for the name it is called by.
"""

from __future__ import annotations

import socket
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from tapcore.errors import UsageError

CA_CERT: Final = "ca-cert.pem"
SERVER_CERT: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"
CLIENT_CERT: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"


def load_credentials(folder: Path) -> ssl.SSLContext:
    """A context for servers that let in clients with a certificate of the folder's authority, and no others.
    UsageError says which file is missing, wrong, or open to other users."""
    names = (CA_CERT, SERVER_CERT, SERVER_KEY)
    _check(folder, names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    _load(context, folder, names)
    return context


def load_client_credentials(folder: Path) -> ssl.SSLContext:
    """A context for clients: who signs servers' certificates, and what this client shows, if it has one.
    UsageError says which file is missing, wrong, or open to other users."""
    names = (CA_CERT, CLIENT_CERT, CLIENT_KEY) if (folder / CLIENT_CERT).exists() else (CA_CERT,)
    _check(folder, names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, folder, names)
    return context


def _check(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            mode = (folder / name).stat().st_mode
        except OSError as error:
            raise UsageError(f"TLS credentials: cannot read {folder / name}: {error.strerror}",
                             hint=f"the folder needs {', '.join(names)}") from None
        if name in (SERVER_KEY, CLIENT_KEY) and stat.S_IMODE(mode) & 0o077:
            raise UsageError(f"TLS credentials: {folder / name} is open to other users",
                             hint=f"chmod 600 {folder / name}")


def _load(context: ssl.SSLContext, folder: Path, names: Sequence[str]) -> None:
    """The authority's certificate, and the own one with its key if `names` has them."""
    try:
        context.load_verify_locations(folder / names[0])
        if len(names) > 1:
            context.load_cert_chain(folder / names[1], folder / names[2])
    except OSError as error:
        raise UsageError(f"TLS credentials in {folder}: {error.strerror or error}",
                         hint="they are PEM files, and the key belongs to the certificate") from None


class TlsSocket:
    """One end of a connection; BlockingIOError where a plain socket has it. `handshake` comes first."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Takes over `sock`."""
        self.family = sock.family
        self._socket = sock

    @classmethod
    def accepted(cls, sock: socket.socket, context: ssl.SSLContext) -> Self:
        """The server's end, before the handshake."""
        return cls(context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False))

    def handshake(self) -> bool | None:
        """None when it is done; else what it waits for: True to write, False to read. OSError if it fails."""
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            return True
        return None

    @property
    def has_pending(self) -> bool:
        """Bytes have been received that `recv_into` would return, though the descriptor may not be readable."""
        return self._socket.pending() > 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def recv(self, length: int) -> bytes:
        data = bytearray(length)
        return bytes(data[: self.recv_into(memoryview(data))])

    def recv_into(self, view: memoryview) -> int:
        """As much as there is, up to the length of `view`: a record has 16 KiB at most."""
        filled = 0
        try:
            while filled < len(view):
                count = self._socket.recv_into(view[filled:])
                if not count:
                    break
                filled += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not filled:
                raise BlockingIOError from None
        except ssl.SSLEOFError:
            pass
        return filled

    def send(self, data: memoryview | bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """What goes of `views`, joined: pieces of their own would each be a record."""
        return self.send(views[0] if len(views[0]) >= 16384 else b"".join(views[:64]))
