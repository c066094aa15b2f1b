"""The connection of a sync to its replica: one zmq socket, and what its monitor tells.

A link is used once. When the connection drops, what was queued or on its way may be lost, so the link is closed
and a new one begins with HELLO: nothing from the former connection can arrive late on the new one.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import zmq

from tapcore.errors import ProtocolError, ReplicationError, UsageError
from writelog.keyring import Keys
from writelog.sync_transport import ENDPOINT_HINT, MONITORED, monitor_events, prepare, use_curve
from writelog.wire import Data, Hello, Message, Packed, decode, encode

MAX_UNACKED_MESSAGES: Final = 16384
"""Messages sent and not yet applied by the replica; the send queue holds as many."""
MAX_RECEIVED: Final = 1024
"""Answers taken in one go: a replica that sends without end must not keep the sync from its other duties."""
GREET_POLL_MS: Final = 50
MAX_BLIND_FAILURES: Final = 3
"""Handshakes that the replica broke off without a word before it is taken for a wrong server key."""


class LinkLost(Exception):
    """The connection dropped or is no good, or the replica is silent; `str()` says which. `hint` is for the case
    that it never was any better."""

    def __init__(self, why: str, hint: str = "", code: int | None = None) -> None:
        super().__init__(why)
        self.hint = hint or "is writelog-replica running there?"
        self.errno = code


@dataclass(frozen=True)
class Credentials:
    """This end's pair, and the public keys of which the replica holds one: two while it changes them. `used` is
    told which one it was."""

    own: Keys
    servers: tuple[bytes, ...]
    used: Callable[[bytes], None] = lambda key: None


@dataclass(frozen=True)
class Peer:
    """Where the replica is, and what says the keys for it, if there are any, at each connection."""

    endpoint: str
    credentials: Callable[[], Credentials] | None = None
    timeout_s: float = 10.0


class Link:
    """Connects at once. `heard_s` is when the replica was last heard (monotonic); `reached` whether it ever
    answered on the network."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: Peer) -> None:
        self.peer = peer
        self.heard_s = time.monotonic()
        self.reached = False
        self.opened_s = self.heard_s
        """When the handshake was done."""
        self._blind_failures = 0
        self._has_ended = False
        self._credentials = peer.credentials() if peer.credentials else None
        self._server = b""
        if self._credentials is not None:
            self._server = choose_server(context, peer, self._credentials)
        self.socket = context.socket(zmq.DEALER)
        prepare(self.socket, peer.endpoint, peer.timeout_s, 2 * MAX_UNACKED_MESSAGES)
        if self._credentials is not None:
            use_curve(self.socket, self._credentials.own, self._server)
        self.monitor = self.socket.get_monitor_socket(MONITORED)
        try:
            self.socket.connect(peer.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"cannot connect to {peer.endpoint}: {zmq.strerror(error.errno or 0)}",
                             errno=error.errno, hint=ENDPOINT_HINT) from None

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def greet(self, hello: Hello) -> None:
        """Send the first message. It waits for room: while a handshake is tried again there is none."""
        while True:
            for event, value in monitor_events(self.monitor):
                self._on_event(event, value)
            try:
                self.send(hello)
                return
            except LinkLost:
                self.check()
                self.socket.poll(GREET_POLL_MS, zmq.POLLOUT)

    def send(self, message: Message) -> None:
        """Send a message that has no payload. LinkLost if the queue, which is long enough, is full."""
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise LinkLost("the replica takes nothing any more") from None

    def send_data(self, message: Data | Packed, payload: memoryview | bytes) -> zmq.MessageTracker:
        """Send an extent; `payload` must stay as it is until the tracker is done."""
        try:
            self.socket.send(encode(message), zmq.NOBLOCK | zmq.SNDMORE)
            tracker = self.socket.send(payload, zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            raise LinkLost("the replica takes nothing any more") from None
        assert tracker is not None
        return tracker

    def receive(self) -> Iterator[Message]:
        """What has arrived, also on a connection that has ended since; `check` tells that afterwards.
        LinkLost if something was damaged on the way, or there is no handshake; ReplicationError if the replica
        will never let this sync in, ProtocolError on garbage."""
        for event, value in monitor_events(self.monitor):
            self._on_event(event, value)
        for _ in range(MAX_RECEIVED):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.heard_s = time.monotonic()
            yield _decoded(frames)

    def check(self) -> None:
        """LinkLost if the connection has ended, or was silent for the peer's timeout."""
        if self._has_ended:
            raise LinkLost("the connection to the replica ended")
        silent_s = time.monotonic() - self.heard_s
        if silent_s > self.peer.timeout_s:
            raise LinkLost(f"the replica has been silent for {silent_s:.0f} s" if self.reached
                           else "nobody answers there")

    def _on_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self.reached = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.heard_s = self.opened_s = time.monotonic()
            self._blind_failures = 0
            if self._credentials is not None:
                self._credentials.used(self._server)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise ReplicationError(f"{self.peer.endpoint}: the replica does not know this sync's key",
                                   errno=errno.EACCES, hint="make it known there: `writelog pair`, or the file "
                                                            "that --authorized names")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            raise LinkLost(f"the two ends do not agree on encryption (zmq error {value:#x})", self._hint,
                           errno.EACCES)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._blind_failures += 1
            if self._blind_failures >= MAX_BLIND_FAILURES:
                raise LinkLost("the replica breaks the handshake off", self._hint, errno.EACCES)
        elif event == zmq.EVENT_DISCONNECTED and not self._blind_failures:
            self._has_ended = True

    @property
    def _hint(self) -> str:
        if self.peer.credentials is None:
            return "the replica may want keys: leave --insecure-loopback-only out"
        return "it has another key than the one that is known of it here, or uses none"


def _decoded(frames: list[bytes]) -> Message:
    """LinkLost if they were damaged on the way, ProtocolError if they never were a message."""
    try:
        return decode(frames)[0]
    except ProtocolError as error:
        if error.errno != errno.EBADMSG:
            raise
        raise LinkLost(error.message) from None


def choose_server(context: zmq.Context[zmq.Socket[bytes]], peer: Peer, credentials: Credentials) -> bytes:
    """Which of the public keys the replica holds, found out by handshakes alone if there are several. The last one
    if it cannot be found out: what is wrong shows again when that one is used."""
    for server in credentials.servers[:-1]:
        with context.socket(zmq.DEALER) as probe:
            prepare(probe, peer.endpoint, peer.timeout_s, 1)
            use_curve(probe, credentials.own, server)
            with probe.get_monitor_socket(MONITORED) as monitor:
                probe.connect(peer.endpoint)
                works = _shakes_hands(monitor, peer.timeout_s)
                probe.disable_monitor()
            if works:
                return server
    return credentials.servers[-1]


def _shakes_hands(monitor: zmq.Socket[bytes], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        monitor.poll(int(left_s * 1000) + 1)
        for event, _ in monitor_events(monitor):
            if event != zmq.EVENT_CONNECTED:
                # A replica that refuses this sync's key has opened what was sealed with its own.
                return event in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    return False
