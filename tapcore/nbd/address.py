"""Where an NBD server is: the short forms `unix:/path` and `tcp:host[:port]`, and the URIs of the NBD project.

URI specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tapcore.errors import UsageError
from tapcore.nbd import wire

HINT = ("write it like unix:/path/to/socket, tcp:127.0.0.1:10809, nbd://host:10809/export"
        " or nbd+unix:///export?socket=/path/to/socket")


@dataclass(frozen=True)
class NbdAddress:
    """A UNIX socket (`path`), or else a TCP one (`host`, `port`), and the export there."""

    export: str = ""
    path: str | None = None
    host: str = "localhost"
    port: int = wire.DEFAULT_TCP_PORT
    tls: bool = False
    """Over TCP, with TLS."""

    def __str__(self) -> str:
        """The short form, without the export."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"tcp:{self._host_in_uri}:{self.port}"

    @property
    def uri(self) -> str:
        """The form that NBD clients take."""
        if self.path is not None:
            return f"nbd+unix:///{quote(self.export, safe='')}?socket={quote(self.path)}"
        scheme = "nbds" if self.tls else "nbd"
        return f"{scheme}://{self._host_in_uri}:{self.port}/{quote(self.export, safe='')}"

    @property
    def _host_in_uri(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket, on which TLS is still to be begun. OSError (TimeoutError) if there is none."""
        if self.path is None:
            sock = socket.create_connection((self.host, self.port), timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock


def parse_address(text: str) -> NbdAddress:
    """The address that `text` means. UsageError says what is wrong with it."""
    if text.startswith("unix:"):
        if text == "unix:":
            raise UsageError(f"{text!r} names no socket", hint=HINT)
        return NbdAddress(path=text.removeprefix("unix:"))
    try:
        parts = urlsplit(f"nbd://{text.removeprefix('tcp:')}" if text.startswith("tcp:") else text)
        port = wire.DEFAULT_TCP_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise UsageError(f"{text!r} is not an NBD address: {error}", hint=HINT) from None
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme in ("nbd", "nbds") and text != "tcp:":
        return NbdAddress(export, host=parts.hostname or "localhost", port=port, tls=parts.scheme == "nbds")
    if parts.scheme == "nbd+unix":
        paths = parse_qs(parts.query).get("socket", [])
        if len(paths) != 1:
            raise UsageError(f"{text!r} names {len(paths)} sockets", hint=HINT)
        return NbdAddress(export, path=paths[0])
    raise UsageError(f"{text!r} is not an NBD address", hint=HINT)
