"""The virtual block device: what stands between an export and a chain.

    export ──submit(batch)──▶ Vbd ──queue_read(request)…, submit()──▶ chain
           ◀─ done early ────     ◀─ True: complete at once ─────────
           ◀─ owner.request_done  ◀─ request.done(request), later ───

It owns the chain, knows what is in flight, holds requests back while the disk is paused, tries failed ones again,
merges neighbours, counts and times, and says when something makes no progress.

Where a request can be, and what moves it on:

    held      the disk is paused              resume()
    slowed    writes come faster than allowed its turn (tapcore.throttle)
    flying    the chain has it                its completion: the owner gets it, or it goes to `retrying`
    retrying  failed with a transient errno   the retry timer, `retry_interval_s` later
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from tapcore.chain import Chain, open_chain
from tapcore.driver import VERBS, DiskInfo, Env, Feature, OpenFlag
from tapcore.errors import ControlError, WritelogError
from tapcore.loop import Timer
from tapcore.merge import merge
from tapcore.request import (
    ABANDONED,
    BACKGROUND,
    DISCARD,
    FLUSH,
    OP_NAMES,
    PERMANENT,
    STATUS,
    WRITE,
    ZEROES,
    Caller,
    Extent,
    Request,
    fail,
)
from tapcore.stats import Stats
from tapcore.throttle import Throttle
from tapcore.watchdog import Watchdog

logger = logging.getLogger(__name__)

RUNNING, PAUSING, PAUSED, REPLACING = "running", "pausing", "paused", "replacing the chain"
CLOSING, CLOSED = "closing", "closed"


class Vbd:
    """One disk. Not open until `open` was called; everything in the loop's thread.

    Requests given to `submit` must have `done` set to `vbd.request_done` and an `owner` with a method
    `request_done(request)`, which gets those that were not complete when `submit` returned.
    """

    def __init__(
        self,
        env: Env,
        name: str,
        *,
        retry_interval_s: float = 1.0,
        max_retries: int = 100,
        stall_report_s: float = 10.0,
    ) -> None:
        self.env = env
        self.name = name
        self._state = CLOSED
        self._gated = True  # by a pause or a throttle
        self.throttle: Throttle | None = None
        self.fenced: str | None = None
        """Why the disk must not be resumed without force; None for a disk that may."""
        self.retry_interval_s = retry_interval_s
        self.max_retries = max_retries
        self.statistics = Stats()
        self.chain: Chain
        self.info: DiskInfo
        self._flags = OpenFlag.NONE
        self._queue: list[Callable[[Request], bool]] = []
        self._submit: Callable[[], None]
        self._flying: dict[Request, None] = {}
        self._held: list[Request] = []
        self._retrying: list[Request] = []
        self._retry_timer: Timer | None = None
        self._idle_waiters: list[Callable[[], None]] = []
        self._strays: set[Request] = set()
        self._stray_waiters: list[Callable[[], None]] = []
        self._watchdog = Watchdog(env.loop, name, stall_report_s, lambda: (*self._flying, *self._retrying),
                                  self.statistics)
        self._changes_before = 0
        """What `_changes` was when the chain was opened."""
        self._flush_lost = False
        """A flush of a former chain failed, and the guest does not know."""

    # Life

    @property
    def state(self) -> str:
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self._set_gate()

    def _set_gate(self) -> None:
        self._gated = self._state != RUNNING or self.throttle is not None

    def open(self, chain_text: str, flags: OpenFlag = OpenFlag.NONE) -> None:
        """Open the chain and run. ChainError if it cannot be opened."""
        self._flags = flags
        self._use(open_chain(self.env, chain_text, flags))
        self.state = RUNNING
        self._watchdog.watch()

    def _use(self, chain: Chain) -> None:
        self.chain = chain
        self.info = chain.info
        head = chain.head
        self._queue = [getattr(head, verb) for verb in VERBS[:-1]]
        self._submit = head.submit
        if self._flush_lost:
            self._queue[FLUSH] = self._tell_flush_lost
        self._changes_before = self._changes

    @property
    def _changes(self) -> int:
        """Writes, discards and zeroings so far."""
        requests = self.statistics.requests
        return requests[WRITE] + requests[DISCARD] + requests[ZEROES]

    @property
    def read_only(self) -> bool:
        return bool(self._flags & OpenFlag.RDONLY) or self.info.read_only

    @property
    def in_flight(self) -> int:
        """Requests that the chain has."""
        return len(self._flying)

    @property
    def waiting(self) -> int:
        """Requests held back, by a pause or until their next try."""
        slowed = self.throttle.waiting if self.throttle is not None else ()
        return len(self._held) + len(self._retrying) + len(slowed)

    def limit_writes(self, rate: float | None) -> None:
        """Let no more than `rate` bytes a second be written; None: as fast as it goes."""
        waiting = self.throttle.end() if self.throttle is not None else []
        self.throttle = None if rate is None else Throttle(self.env.loop, rate, self._send_slowed)
        self._set_gate()
        self._deliver(self.submit(waiting))

    def pause(self, done: Callable[[], None]) -> None:
        """Hold new requests back; `done()` when none is in flight (at once, if none is), or when a `resume` came
        first: then `state` is not "paused"."""
        self._must_be_open()
        if self.state == RUNNING:
            self.state = PAUSING
        self._when_idle(lambda: self._paused(done))

    def _paused(self, done: Callable[[], None]) -> None:
        if self.state == PAUSING:
            self.state = PAUSED
        done()

    def resume(self) -> None:
        """Let the held requests go. Fencing is the caller's to check (`fenced`). ControlError while the chain is
        being replaced, and of a closed disk."""
        self._must_be_open()
        if not self.chain.drivers:
            raise ControlError(f"disk {self.name!r} has no open chain", errno=errno.ENODEV,
                               hint="resume it with a chain that can be opened")
        self.state = RUNNING
        _run(self._idle_waiters)
        self._retry_now()
        held, self._held = self._held, []
        self._deliver(self.submit(held))

    def fence(self, reason: str) -> None:
        """Of a paused disk: from now on `fenced`. Flushes of such a disk end well: what was acknowledged is
        durable where the disk is now, and a monitor that flushes as it lets go of it must not wait for ever."""
        self.fenced = reason
        held, self._held = self._held, []
        self._deliver(self.submit(held))

    def _must_be_open(self) -> None:
        if self.state in (REPLACING, CLOSING, CLOSED):
            raise ControlError(f"disk {self.name!r} is {self.state}", errno=errno.ESHUTDOWN)

    def lend_chain(self, done: Callable[[], None]) -> None:
        """Of a paused disk: `done()` when nothing at all is in flight. Until `chain_returned` the disk stays
        paused, and what the chain's filters stand on is the caller's to exchange."""
        if self.state != PAUSED:
            raise ControlError(f"disk {self.name!r} is {self.state}", hint="pause it first")
        self.state = REPLACING
        self._when_idle(done)

    def chain_returned(self) -> None:
        self._use(self.chain)
        self.state = PAUSED

    def replace_chain(self, chain_text: str, done: Callable[[WritelogError | None], None]) -> None:
        """Of a paused disk: close its chain and open `chain_text` instead, then `done(None)`; the disk stays
        paused. If the new one does not open, or has another size, the old one is opened again and `done(error)`.
        If that fails too, the disk stays paused without a chain, its requests wait, and it can be given another.

        What was changed through the old chain is made durable first: a flush of the new one, which may be other
        files, does not reach it. Where that fails, the guest's next flush does.
        """
        self.lend_chain(lambda: self._flush_chain(
            lambda: self.chain.quiesce(lambda: self._replace(chain_text, done))))

    def _flush_chain(self, done: Callable[[], None]) -> None:
        """`done()` when what was changed through the chain is durable, or cannot be made so; a disk that is closed
        does not wait for a server elsewhere."""
        if (self._changes == self._changes_before or not self.info.features & Feature.FLUSH
                or (self.state != REPLACING and self.chain.leaf.fileno() is None)):
            done()
            return
        self._changes_before = self._changes

        def flushed(code: int, _: list[Extent]) -> None:
            if code:
                self._flush_lost = True
                logger.error("%s: what was written through %s could not be flushed: %s", self.name,
                             self.chain.text, os.strerror(code))
            done()

        self._ask(Request(FLUSH, flags=BACKGROUND), flushed)

    def _tell_flush_lost(self, request: Request) -> bool:
        """Fail one flush for good, for the one of a former chain that failed; the next ones go down again."""
        self._flush_lost = False
        self._queue[FLUSH] = self.chain.head.queue_flush
        request.tries = self.max_retries
        return fail(request, errno.EIO)

    def _replace(self, chain_text: str, done: Callable[[WritelogError | None], None]) -> None:
        old_text, old_size_bytes = self.chain.text, self.info.size_bytes
        failure: WritelogError | None = None
        try:
            self.chain.close()
            chain = open_chain(self.env, chain_text, self._flags)
            if chain.info.size_bytes != old_size_bytes:
                chain.close()
                raise ControlError(f"{chain_text!r} has {chain.info.size_bytes} bytes, the disk {old_size_bytes}",
                                   errno=errno.EINVAL, hint="the guest sees one size as long as it is connected")
            self._use(chain)
        except Exception as error:
            failure = error if isinstance(error, WritelogError) else ControlError(str(error))
            try:
                self._use(open_chain(self.env, old_text, self._flags))
            except Exception as second:
                logger.error("%s: the former chain does not open again: %s", self.name, second)
        self.state = PAUSED
        done(failure)

    def close(self, done: Callable[[], None]) -> None:
        """Drain, flush, close the chain, then `done()`. A paused disk's held requests fail with ESHUTDOWN."""
        if self.state == CLOSED:
            done()
            return
        if self.state == REPLACING:
            raise ControlError(f"disk {self.name!r} is {self.state}", errno=errno.EBUSY, hint="try again")
        self.state = CLOSING
        self._when_idle(lambda: self._flush_chain(lambda: self.chain.quiesce(lambda: self._close(done))))

    def _close(self, done: Callable[[], None]) -> None:
        if self.state == CLOSED:
            done()
            return
        self.state = CLOSED
        self._watchdog.cancel()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._fail_waiting()
        try:
            self.chain.close()
        finally:
            done()

    def _when_idle(self, action: Callable[[], None]) -> None:
        """`action()` once the chain has nothing of this disk in flight."""
        if self._flying:
            self._idle_waiters.append(action)
        else:
            action()

    # Requests

    def submit(self, batch: Sequence[Request]) -> list[Request]:
        """Send a batch down the chain; returns those that are complete already. The hot loop."""
        if self._gated:
            return self._submit_gated(batch)
        start_ns = time.monotonic_ns()
        queue = self._queue
        done: list[Request] = []
        failed: list[Request] = []
        count = len(batch)
        index = 0
        while index < count:
            request = batch[index]
            index += 1
            if index < count and request.op <= WRITE:
                following = batch[index]
                if following.offset == request.offset + request.length and following.op == request.op:
                    request, index = merge(batch, index - 1, self.request_done)
                    self.statistics.merged += len(request.parts or (request,)) - 1
            if queue[request.op](request):
                if request.error:
                    failed.append(request)
                elif request.parts is None:
                    done.append(request)
                else:
                    done.extend(request.parts)
            else:
                request.started_ns = start_ns
                self._flying[request] = None
        self._submit()
        self.statistics.count(done, time.monotonic_ns() - start_ns)
        for request in failed:
            request.started_ns = start_ns
            done.extend(self._failed(request))
        return done

    def _submit_gated(self, batch: Sequence[Request]) -> list[Request]:
        if self._state == RUNNING:
            assert self.throttle is not None
            return self._submit_now(self.throttle.admit(batch))
        now_ns = time.monotonic_ns()
        for request in batch:
            request.started_ns = now_ns
        if self._state == CLOSED:
            for request in batch:
                request.error = errno.ESHUTDOWN
            return list(batch)
        flushes = [request for request in batch if request.op == FLUSH] if self.fenced else []
        self._held.extend(request for request in batch if request not in flushes)
        return flushes

    def _submit_now(self, batch: Sequence[Request]) -> list[Request]:
        """`submit`, past the throttle."""
        self._gated = False
        try:
            return self.submit(batch)
        finally:
            self._set_gate()

    def _send_slowed(self, batch: list[Request]) -> None:
        """It is their turn, if the disk still runs."""
        if self._state != RUNNING:
            self._held.extend(batch)
            return
        self._deliver(self._submit_now(batch))

    def request_done(self, request: Request) -> None:
        """A driver's late completion."""
        del self._flying[request]
        finished = self._failed(request) if request.error else request.parts or [request]
        if finished or request.parts:
            self._watchdog.ended(request)
        for part in finished:
            if not part.error:
                self.statistics.count((part,), time.monotonic_ns() - request.started_ns)
            part.owner.request_done(part)
        if self._strays:
            self._strays.discard(request)
            if not self._strays:
                _run(self._stray_waiters)
        if not self._flying and self._idle_waiters:
            _run(self._idle_waiters)

    def abandon(self, owner: object) -> None:
        """`owner` wants no answers any more: its requests that wait end with ESHUTDOWN now, and those in flight
        are not tried again. A client that connects anew sends its writes again, and newer ones; an old one that
        came after these would undo them."""
        for request in self._flying:
            for part in request.parts or (request,):
                if part.owner is owner:
                    part.flags |= ABANDONED
                    self._strays.add(request)
        self._fail_waiting(owner)

    def after_strays(self, action: Callable[[], None]) -> None:
        """`action()` once nothing that was abandoned is in flight."""
        if self._strays:
            self._stray_waiters.append(action)
        else:
            action()

    def _failed(self, request: Request) -> list[Request]:
        """What is final of a request that failed: a merged one is split first, so that only the guilty part
        fails; transient errors are put off to the next try."""
        if request.parts is not None:
            final: list[Request] = []
            for part in request.parts:
                part.started_ns = request.started_ns
                if part.flags & ABANDONED:
                    part.error = errno.ESHUTDOWN
                    final.append(part)
                elif self.state != RUNNING:
                    self._held.append(part)
                elif not self._queue[part.op](part):
                    self._flying[part] = None
                elif part.error:
                    final.extend(self._failed(part))
                else:
                    self.statistics.count((part,), time.monotonic_ns() - part.started_ns)
                    final.append(part)
            if self.state == RUNNING:
                self._submit()
            return final
        if (request.error in PERMANENT or request.tries >= self.max_retries
                or request.flags & (BACKGROUND | ABANDONED)):
            request.tries = 0
            self.statistics.errors[request.op] += 1
            return [request]
        logger.log(logging.WARNING if request.tries == 0 else logging.DEBUG,
                   "%s: %s of %d bytes at %d failed (%s), try %d of %d", self.name, OP_NAMES[request.op],
                   request.length, request.offset, os.strerror(request.error), request.tries + 1,
                   self.max_retries + 1)
        request.tries += 1
        request.error = 0
        self.statistics.retries += 1
        self._retrying.append(request)
        if self._retry_timer is None:
            self._retry_timer = self.env.loop.call_later(self.retry_interval_s, self._retry_now)
        return []

    def _retry_now(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        requests, self._retrying = self._retrying, []
        if self.state != RUNNING:
            self._held[:0] = requests
            return
        for request in requests:
            started_ns = request.started_ns
            self._deliver(self.submit((request,)))
            request.started_ns = started_ns

    def _deliver(self, finished: Sequence[Request]) -> None:
        """Give requests that were once late to their owners."""
        for request in finished:
            self._watchdog.ended(request)
            request.owner.request_done(request)

    def _fail_waiting(self, owner: object = None) -> None:
        """End what is not in flight, of one owner or of all."""
        slowed = [self.throttle.waiting] if self.throttle is not None else []
        for queue in (self._retrying, self._held, *slowed):
            ended = [request for request in queue if owner in (None, request.owner)]
            queue[:] = [request for request in queue if owner not in (None, request.owner)]
            for request in ended:
                request.error = errno.ESHUTDOWN
            self._deliver(ended)

    # Looking

    def status_map(self, offset: int, length: int, done: Callable[[int, list[Extent]], None]) -> None:
        """Block status of a range, also of a paused disk: `done(errno, extents)`; the extents may cover less."""
        if self.state in (REPLACING, CLOSING, CLOSED) or not self.chain.drivers:
            done(errno.ESHUTDOWN, [])
            return
        self._ask(Request(STATUS, offset, length, flags=BACKGROUND), done)

    def _ask(self, request: Request, done: Callable[[int, list[Extent]], None]) -> None:
        """Send a request of the vbd's own down the chain, whatever the state: `done(errno, extents)`."""
        request.done = self.request_done
        request.owner = Caller(done)
        if self._queue[request.op](request):
            done(request.error, request.extents)
        else:
            request.started_ns = time.monotonic_ns()
            self._flying[request] = None
            self._submit()

    def stats(self) -> dict[str, Any]:
        """Counters and histograms, ready for JSON."""
        return self.statistics.as_dict() | {
            "state": self.state, "in_flight": self.in_flight, "waiting": self.waiting,
            "drivers": self.chain.counters(),
        }


def _run(waiters: list[Callable[[], None]]) -> None:
    """Call all that wait, once."""
    ready = waiters.copy()
    waiters.clear()
    for action in ready:
        action()
