"""TLS of an NBD server: its credentials, and a socket that is used like a plain one that does not block.

Credentials are a folder with the names that QEMU and libnbd use (https://www.qemu.org/docs/master/system/tls.html):

    ca-cert.pem        who signs clients' certificates
    server-cert.pem    what this server shows
    server-key.pem     its key, for its owner's eyes alone

A client must show a certificate signed by that authority: that is all there is to who may use a disk over TCP.
"""

from __future__ import annotations

import socket
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tapcore.errors import UsageError

CA_CERT: Final = "ca-cert.pem"
SERVER_CERT: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"


def load_credentials(folder: Path) -> ssl.SSLContext:
    """A context for servers that let in clients with a certificate of the folder's authority, and no others.
    UsageError says which file is missing, wrong, or open to other users."""
    for name in (CA_CERT, SERVER_CERT, SERVER_KEY):
        try:
            mode = (folder / name).stat().st_mode
        except OSError as error:
            raise UsageError(f"TLS credentials: cannot read {folder / name}: {error.strerror}",
                             hint=f"the folder needs {CA_CERT}, {SERVER_CERT} and {SERVER_KEY}") from None
        if name == SERVER_KEY and stat.S_IMODE(mode) & 0o077:
            raise UsageError(f"TLS credentials: {folder / name} is open to other users",
                             hint=f"chmod 600 {folder / name}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    try:
        context.load_verify_locations(folder / CA_CERT)
        context.load_cert_chain(folder / SERVER_CERT, folder / SERVER_KEY)
    except OSError as error:
        raise UsageError(f"TLS credentials in {folder}: {error.strerror or error}",
                         hint="they are PEM files, and the key belongs to the certificate") from None
    return context


class TlsSocket:
    """The server's end of a connection. `handshake` comes first; BlockingIOError where a plain socket has it."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """Takes over `sock`."""
        self.family = sock.family
        self._socket = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

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
