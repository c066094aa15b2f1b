"""What a sync and its replica say to each other: one link after another, and the loop that keeps both ends busy.

Who waits for something pumps meanwhile: reads go on, extents are sent, acknowledgements taken in. What kind of
answer comes when is known by those who ask: `writelog.sync_run` and `writelog.sync_switch`.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

import zmq

from tapcore.errors import ReplicationError
from writelog.sync_copy import Copier
from writelog.sync_gate import Gate
from writelog.sync_link import Link, LinkLost, Peer
from writelog.wire import (
    Ack,
    Content,
    Digest,
    Failure,
    Kept,
    Message,
    Probed,
    Promoted,
    Refused,
    Released,
    Welcome,
)

POLL_S: Final = 0.05
ROOM_POLL_S: Final = 0.002
"""How often to ask zmq whether it is done with a buffer when there is nothing else to do."""
ANSWER_S: Final = 30.0
"""Longest wait for what a replica answers without delay. It is known to live: it acknowledges meanwhile."""
SETTLE_S: Final = 30.0
"""Longest wait for reads and buffers of a connection that is not used any more."""

M = TypeVar("M", Welcome, Digest, Content, Kept, Promoted, Released)


class Talk:
    """Of one sync. `guard` is called all the time, and raises if there is a reason not to go on; `copier` is that
    of the disk as it is served now."""

    def __init__(self, peer: Peer, copier: Copier, gate: Gate, guard: Callable[[], None]) -> None:
        self.peer = peer
        self.copier = copier
        self._gate = gate
        self.guard = guard
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._link: Link | None = None
        self._replies: dict[type[object], Message] = {}
        """The last answer of each kind that nobody has used yet."""

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    def connect(self) -> Link:
        """A new link, with nothing said on it yet."""
        link = self._link = Link(self._context, self.peer)
        self._replies.clear()
        self._poller = zmq.Poller()
        for pollable in (link.socket, link.monitor, self.copier.source.log, self._gate):
            self._poller.register(pollable, zmq.POLLIN)
        return link

    def hang_up(self) -> None:
        """The link is of no use any more."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def close(self) -> None:
        self.hang_up()
        self._context.destroy(linger=0)

    def send(self, message: Message) -> None:
        self.link.send(message)

    def pump(self, wait_s: float = POLL_S) -> None:
        """Send what may be sent; wait at most `wait_s` for something to happen; take in what has come."""
        pipeline = self.copier.pipeline
        self.take_responses()
        pipeline.feed()
        if 0 < pipeline.waits_s < wait_s:
            wait_s = pipeline.waits_s
        if pipeline.waits_for_room:
            wait_s = min(wait_s, ROOM_POLL_S)
        self._poller.poll(max(1, int(wait_s * 1000)))
        self.take_responses()
        self.hear()
        pipeline.feed()
        self.guard()

    def pump_until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self.pump()

    def take_responses(self) -> None:
        """Those of the log."""
        source = self.copier.source
        if source.handed_over:
            # The log has done its part: the replica must be promoted even if the tapdisk ends now.
            if source.log in self._poller:
                self._poller.unregister(source.log)
            return
        for response in source.log.responses():
            self.copier.pipeline.on_read(response)

    def hear(self) -> None:
        """Take in what the replica has said. LinkLost if it is gone, or got something damaged."""
        for message in self.link.receive():
            if isinstance(message, Ack):
                self.copier.ack = message
                self.copier.pipeline.on_ack(message)
            elif isinstance(message, Probed):
                self.copier.pipeline.on_probed(message)
            elif isinstance(message, Failure) and message.errno == errno.EBADMSG:
                raise LinkLost(message.message)
            elif isinstance(message, Refused | Failure):
                raise ReplicationError(f"{self.peer.endpoint}: {message.message}",
                                       errno=getattr(message, "errno", None), hint=message.hint or None)
            else:
                self._replies[type(message)] = message
        self.link.check()

    def wait_for(self, kind: type[M], limit_s: float = math.inf) -> M:
        """The replica's next answer of a kind, even if it was its last word. LinkLost if it is silent;
        ReplicationError if it has other things to say for `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while kind not in self._replies:
            if time.monotonic() > deadline_s:
                raise ReplicationError(f"the replica has not answered for {limit_s:g} s, though it is there")
            try:
                self.pump()
            except LinkLost:
                if kind not in self._replies:
                    raise
        answer = self._replies.pop(kind)
        assert isinstance(answer, kind)
        return answer

    def answer(self, kind: type[M]) -> M:
        """As `wait_for`, of what takes the replica no time."""
        return self.wait_for(kind, ANSWER_S)
