"""The zmq sockets of a sync and a replica: keys, addresses, options, and what becomes of a connection.

Options are set for bounded memory (a frame is at most a megabyte, queues have an end) and a peer that is noticed
when it is gone (heartbeats). CURVE keys are the certificate files that `writelog-replica keygen` makes.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from tapcore.errors import UsageError
from writelog.wire import MAX_DATA_BYTES, MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

RECEIVE_QUEUE_MESSAGES = 256
HEARTBEAT_INTERVAL_S = 1.0
KEY_BYTES = 32
ZAP_DOMAIN = b"writelog"
ENDPOINT_HINT = "write it like tcp://192.0.2.7:5599"


@dataclass(frozen=True)
class Keys:
    """One end's CURVE pair, z85."""

    public: bytes
    secret: bytes


def load_keys(path: Path) -> Keys:
    """The pair in a secret certificate file; UsageError names the file."""
    public, secret = _load(path)
    if secret is None:
        raise UsageError("the file holds no secret key", path=str(path),
                         hint="give the .key_secret file that writelog-replica keygen wrote")
    return Keys(public, secret)


def load_public_key(path: Path) -> bytes:
    """The public key in a certificate file; UsageError names the file."""
    return _load(path)[0]


def load_authorized(path: Path) -> frozenset[bytes]:
    """The public keys in a certificate file, or in every `*.key` of a directory."""
    files = sorted(path.glob("*.key")) if path.is_dir() else [path]
    if not files:
        raise UsageError("the directory holds no *.key file", path=str(path))
    return frozenset(load_public_key(file) for file in files)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None and len(z85.decode(key)) != KEY_BYTES:
                raise ValueError(f"a key is not {KEY_BYTES} bytes long")
        return public, secret
    except OSError as error:
        raise UsageError(f"cannot read the key: {error.strerror or error}", path=str(path)) from None
    except (ValueError, KeyError, struct.error) as error:
        raise UsageError(f"this is no key file: {error}", path=str(path)) from None


def create_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.key (public) and `name`.key_secret (for the owner alone); UsageError if one exists already."""
    for suffix in (".key", ".key_secret"):
        if (directory / f"{name}{suffix}").exists():
            raise UsageError("there is a key of this name already", path=str(directory / f"{name}{suffix}"),
                             hint="choose another --name, or remove both files")
    mask = os.umask(0o077)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        public, secret = zmq.auth.create_certificates(directory, name)
    except OSError as error:
        raise UsageError(f"cannot write a key: {error.strerror}", path=str(directory)) from None
    finally:
        os.umask(mask)
    return Path(public), Path(secret)


def check_endpoint(endpoint: str, secured: bool, insecure: bool) -> None:
    """UsageError unless `endpoint` is tcp://host:port (or ipc://path), and loopback if it is not secured."""
    if endpoint.startswith("ipc://"):
        return
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    # A ';' would make zmq take what is before it for the address of its own end.
    odd = re.search(r"[;@?#\s]|/.*/.*/", endpoint)
    if not endpoint.startswith("tcp://") or not host or port is None or odd:
        raise UsageError(f"{endpoint!r} is no address", hint=ENDPOINT_HINT)
    if not (_is_loopback(host) or secured or insecure):
        raise UsageError(f"{endpoint} is not on this machine, and without keys anyone on the way can read and "
                         "change the disk", errno=errno.EPERM,
                         hint="give keys with --key (writelog-replica keygen makes them), or --insecure")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare(socket: zmq.Socket[bytes], endpoint: str, peer_timeout_s: float, send_queue_messages: int) -> None:
    """Set what both ends have in common, before `socket` is bound or connected to `endpoint`."""
    socket.linger = 0
    socket.ipv6 = "[" in endpoint
    socket.rcvhwm = RECEIVE_QUEUE_MESSAGES
    socket.sndhwm = send_queue_messages
    socket.set(zmq.MAXMSGSIZE, max(MAX_DATA_BYTES, MAX_HEADER_BYTES))
    timeout_ms = max(int(peer_timeout_s * 1000), 100)
    socket.set(zmq.HEARTBEAT_IVL, min(int(HEARTBEAT_INTERVAL_S * 1000), timeout_ms // 2))
    socket.set(zmq.HEARTBEAT_TIMEOUT, timeout_ms)
    socket.set(zmq.HANDSHAKE_IVL, timeout_ms)
    socket.set(zmq.RECONNECT_IVL, 100)
    socket.set(zmq.RECONNECT_IVL_MAX, 1000)


MONITORED = (zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
             | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
             | zmq.EVENT_CONNECTED)


def monitor_events(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """(event, value) of all that the monitor has to tell now; the value of a connection is its descriptor."""
    while True:
        try:
            message = recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            return
        yield int(message["event"]), int(message["value"])


class Gate:
    """Lets in the holders of the authorized keys, and logs who was turned away. Runs in a thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: frozenset[bytes]) -> None:
        self._authorized = authorized
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called with the client's public key in z85."""
        known = key in self._authorized
        if not known:
            logger.warning("a client with the unknown key %s was refused", key.decode(errors="replace"))
        return known

    def close(self) -> None:
        self._authenticator.stop()


def serve_curve(socket: zmq.Socket[bytes], keys: Keys) -> None:
    """Make `socket` a CURVE server whose clients a Gate checks."""
    socket.curve_server = True
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    socket.zap_domain = ZAP_DOMAIN


def use_curve(socket: zmq.Socket[bytes], keys: Keys, server_public: bytes) -> None:
    """Make `socket` a CURVE client of the holder of `server_public`."""
    socket.curve_serverkey = server_public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
