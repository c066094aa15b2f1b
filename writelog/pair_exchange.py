"""Two hosts exchange public keys over the network: one zmq connection, whose CURVE keys come from a one-time code
(`writelog/pair_code.py`).

    connects -> listens    its offer
    listens  -> connects   its offer
    connects -> listens    DONE: it keeps the key
    listens  -> connects   DONE: so does this end

A code is good for one try: the end that listens is done with it after the first handshake, failed or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import zmq

from tapcore.errors import ReplicationError, UsageError
from writelog.pair_code import CONNECTS, LISTENS, MAX_OFFER_BYTES, Offer, decode_offer, seed_keys
from writelog.sync_transport import MONITORED, Gate, monitor_events, prepare, serve_curve, use_curve

DONE: Final = b"done"
ANSWER_S: Final = 10.0
"""Longest wait for what the other program sends by itself."""
FAILED: Final = frozenset({zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL})
AGAIN: Final = "begin anew: `writelog pair listen` shows a new code"


class Exchange:
    """One end of it; a context manager. `keep(offer)` stores what the other end offers."""

    def __init__(self, listens: bool, code: bytes, own: Offer, keep: Callable[[Offer], None]) -> None:
        self._own, self._keep = own, keep
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REP if listens else zmq.REQ)
        self._listens, self._connects = seed_keys(code, LISTENS), seed_keys(code, CONNECTS)
        self._monitor = self._socket.get_monitor_socket(MONITORED)
        self._gate: Gate | None = None
        self._shaken = False

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(1000)
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def listen(self, endpoint: str, timeout_s: float, ready: Callable[[str], None]) -> None:
        """`ready(address)` when the other end may connect; then wait for it so long. UsageError if the address
        cannot be had, ReplicationError if the exchange fails."""
        self._gate = Gate(self._context, {self._connects.public}.__contains__)
        serve_curve(self._socket, self._listens)
        self._prepare(endpoint)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot listen on {endpoint}: {zmq.strerror(error.errno or 0)}",
                             errno=error.errno) from None
        ready(self._socket.get_string(zmq.LAST_ENDPOINT))
        offer = self._offer(self._receive(timeout_s, "nobody came"))
        self._socket.send(self._own.encode())
        if self._receive(ANSWER_S, "the other end was gone before it had kept this host's key") != DONE:
            raise ReplicationError("the other end did not say that it keeps this host's key", hint=AGAIN)
        self._keep(offer)
        self._socket.send(DONE)

    def connect(self, endpoint: str) -> None:
        """With the other end at `endpoint`. ReplicationError if the exchange fails."""
        use_curve(self._socket, self._connects, self._listens.public)
        self._prepare(endpoint)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {endpoint}: {zmq.strerror(error.errno or 0)}",
                             errno=error.errno) from None
        self._socket.send(self._own.encode())
        offer = self._offer(self._receive(ANSWER_S, f"nobody listens at {endpoint}"))
        self._keep(offer)
        self._socket.send(DONE)
        self._receive(ANSWER_S, "the other end may not know this host's key")

    def _prepare(self, endpoint: str) -> None:
        prepare(self._socket, endpoint, ANSWER_S, 4)
        self._socket.set(zmq.MAXMSGSIZE, MAX_OFFER_BYTES)

    def _offer(self, data: bytes) -> Offer:
        try:
            return decode_offer(data)
        except ValueError as error:
            raise ReplicationError(f"the other end sent no key: {error}", hint=AGAIN) from None

    def _receive(self, timeout_s: float, otherwise: str) -> bytes:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            poller.poll(int(left_s * 1000) + 1)
            try:
                return self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                self._watch()
        raise ReplicationError(f"{otherwise} within {timeout_s:g} s", hint=AGAIN)

    def _watch(self) -> None:
        """ReplicationError when the one try has failed. To connect and leave without a handshake is no try."""
        for event, _ in monitor_events(self._monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaken = True
            elif event in FAILED and not self._shaken:
                raise ReplicationError("somebody tried another code: nothing was exchanged, and this code is used "
                                       "up", hint=AGAIN)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._gate is None:
                raise ReplicationError("the other end does not take this code: nothing was exchanged", hint=AGAIN)
            elif event == zmq.EVENT_DISCONNECTED and self._shaken:
                raise ReplicationError("the connection to the other end was lost", hint=AGAIN)
