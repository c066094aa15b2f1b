"""The zmq sockets of a sync and a replica: keys, addresses, options, and what becomes of a connection.

Options are set for bounded memory (a frame is at most a megabyte, queues have an end) and a peer that is noticed
when it is gone (heartbeats). Connections are encrypted, and each end knows the other by its key, with CURVE.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from tapcore.errors import UsageError, WritelogError
from writelog.keyring import PAIR_HINT, Keys, fingerprint
from writelog.wire import MAX_DATA_BYTES, MAX_HEADER_BYTES

logger = logging.getLogger(__name__)

RECEIVE_QUEUE_MESSAGES = 256
HEARTBEAT_INTERVAL_S = 1.0
ZAP_DOMAIN = b"writelog"
ENDPOINT_HINT = "write it like tcp://192.0.2.7:5599"


def check_endpoint(endpoint: str, secured: bool) -> None:
    """UsageError unless `endpoint` is tcp://host:port (or ipc://path), on this machine if it is not secured."""
    if endpoint.startswith("ipc://"):
        return
    if not (_is_loopback(endpoint_host(endpoint)) or secured):
        raise UsageError(f"{endpoint} is not on this machine: without keys anyone on the way could read and "
                         "change the disk", errno=errno.EPERM, hint=PAIR_HINT)


def endpoint_host(endpoint: str) -> str:
    """HOST of tcp://HOST:PORT. UsageError if `endpoint` is nothing of the kind."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    # A ';' would make zmq take what is before it for the address of its own end.
    odd = re.search(r"[;@?#\s]|/.*/.*/", endpoint)
    if not endpoint.startswith("tcp://") or not host or port is None or odd:
        raise UsageError(f"{endpoint!r} is no address", hint=ENDPOINT_HINT)
    return host


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
    """Lets in whom `authorize` knows by the key that he has proved to hold, and logs who was turned away. Runs in
    a thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorize: Callable[[bytes], bool]) -> None:
        self._authorize = authorize
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called with the client's public key in z85."""
        try:
            known = self._authorize(key)
        except (WritelogError, OSError) as error:
            logger.error("a client was refused, for its key cannot be looked up: %s", error)
            return False
        if not known:
            logger.warning("a client with the unknown key %s was refused", fingerprint(key))
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
