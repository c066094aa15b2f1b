"""The copying of a sync: feeds the pipeline with what is dirty, coldest first, and looks where that leads.

Orders and judgements are those of `writelog.backlog` and `writelog.planner`; here are the clock and the calls.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from bitarray import bitarray
from bitarray.util import ones, zeros

from writelog.backlog import Backlog
from writelog.plan import Limits, Outlook
from writelog.planner import Planner, Seen
from writelog.planner_group import GroupPlanner
from writelog.sync_cap import Cap
from writelog.sync_compare import Comparison
from writelog.sync_control import Wishes
from writelog.sync_gate import Gate, Step
from writelog.sync_pack import Packer
from writelog.sync_pipeline import Pipeline, Portion
from writelog.sync_report import CONVERGING, IN_SYNC, PAUSED, SYNCING, Progress
from writelog.sync_source import Source
from writelog.wire import Ack

MAX_OPEN_PORTIONS: Final = 60
"""Of the leases that a connection may have."""
MAX_ZERO_TAKE_BYTES: Final = 256 << 20
"""Taken at once where all is holes."""
NEWS_S, CALM_NEWS_S = 0.05, 1.0
"""When nothing is left to take, ask what was written no more often than this."""
LOOK_S: Final = 0.1


class Shared:
    """What the syncs of a group have in common: they send over one link, and judge together."""

    def __init__(self, limits: Limits, names: Iterable[str]) -> None:
        self.cap = Cap(limits.rate)
        self.planner = GroupPlanner(limits, names, threading.Lock())


class Copier:
    """Of one sync. `first_pass_done` once all that was dirty at the beginning was sent."""

    def __init__(self, source: Source, limits: Limits, compress: str, shared: Shared,
                 compare: bool = False) -> None:
        self.ack = Ack(0, 0, 0, 0)
        """The replica's last one."""
        self.backlog = Backlog(source.size_bytes)
        self.planner = Planner(limits, self.backlog, time.monotonic(), shared.planner, source.name)
        self.pipeline = Pipeline(source.log, self._durable, self.planner.window.answered, shared.cap)
        self.pipeline.packer = Packer(compress)
        self.pipeline.comparison = Comparison() if compare else None
        self.source = source
        self._committed_bytes = 0
        self._asked_s = self._looked_s = -math.inf
        self._zero_growth = 1
        self.on_news: Callable[[bitarray], None] | None = None
        """Who else wants to hear it."""
        self.is_calm = False
        """Nobody waits for a switch-over: what is hot is sent less often."""

    def set_limits(self, limits: Limits) -> None:
        self.planner.group.set_limits(limits)
        self.escalate()

    def begin(self, is_all: bool) -> None:
        """The replica lacks what the log has: `is_all` of the disk, or some of it."""
        log = self.source.log
        blocks = -(-log.size_bytes // log.granularity_bytes)
        self.ask()  # from here on the log tells of new writes
        if is_all:
            self.backlog.add_all()
            self.pipeline.begin_pass(ones(blocks, "little"))
        else:
            dirty = list(log.peek())
            self.backlog.add(dirty)
            unsent = zeros(blocks, "little")
            for offset, length in dirty:
                unsent[offset // log.granularity_bytes : -(-(offset + length) // log.granularity_bytes)] = 1
            self.pipeline.begin_pass(unsent)
        self.backlog.sort()
        self.planner.start_over()

    @property
    def first_pass_done(self) -> bool:
        return not self.pipeline.unsent_blocks

    def add(self, portion: Portion) -> None:
        """Send it."""
        self.backlog.took(portion.chunks)
        self.pipeline.add(portion)

    def _durable(self, portion: Portion) -> None:
        if portion.lease:
            self.source.commit(portion)
            self._committed_bytes += sum(length for _, _, length in portion.items)
        self.backlog.confirmed(portion.chunks)

    def give_back(self) -> None:
        """The connection is gone: what is not confirmed is dirty again. Nothing may be on its way any more."""
        self.source.reclaim()
        self.backlog.give_back()
        self.planner.start_over()

    def take_more(self) -> None:
        """Keep enough at hand to send."""
        pipeline, backlog, planner = self.pipeline, self.backlog, self.planner
        pipeline.window_bytes = planner.window_bytes
        portion_bytes = planner.portion_bytes
        while pipeline.todo_bytes < portion_bytes and pipeline.open_portions < MAX_OPEN_PORTIONS:
            ranges = backlog.next(min(portion_bytes * self._zero_growth, MAX_ZERO_TAKE_BYTES))
            if not ranges:
                if time.monotonic() - self._asked_s >= (CALM_NEWS_S if self.is_calm else NEWS_S):
                    self.ask()
                return
            portion = self.source.take_listed(ranges)
            if portion is not None:
                self.add(portion)
            is_data = portion is not None and not all(is_zero for is_zero, _, _ in portion.items)
            self._zero_growth = 1 if is_data else min(2 * self._zero_growth, MAX_ZERO_TAKE_BYTES // portion_bytes)

    def ask(self) -> None:
        """Hear from the log what was written."""
        self._asked_s = time.monotonic()
        touched = self.source.touched()
        self.backlog.touch(self._asked_s, touched, self.planner.outlook.send_rate)
        if self.on_news is not None:
            self.on_news(touched)

    @property
    def look_is_due(self) -> bool:
        has_caught_up = self.first_pass_done and self.pipeline.is_all_sent and not self.pipeline.unacked_bytes
        return has_caught_up or time.monotonic() - self._looked_s >= LOOK_S

    def look(self) -> Outlook:
        """Where the sync is now."""
        if time.monotonic() - self._asked_s >= self.backlog.sample_s:
            self.ask()
        dirty_bytes, leased_bytes = self.source.dirty_bytes()
        pipeline = self.pipeline
        now_s = self._looked_s = time.monotonic()
        pipeline.packer.look(now_s, pipeline.wire_bytes, pipeline.equal_bytes)
        return self.planner.look(Seen(
            now_s=now_s, dirty_bytes=dirty_bytes, leased_bytes=leased_bytes, todo_bytes=pipeline.todo_bytes,
            unacked_bytes=pipeline.unacked_bytes, applied_bytes=pipeline.applied_bytes,
            applied_seq=pipeline.applied_seq, committed_bytes=self._committed_bytes,
            written_bytes=self.source.written_bytes(), first_pass_done=self.first_pass_done,
            flush_s=self.ack.flush_ns / 1e9, flush_bytes=self.ack.flush_bytes, equal_bytes=pipeline.equal_bytes))

    def escalate(self) -> None:
        """Do what the planner has decided on."""
        self.pipeline.cap.set_rate(self.planner.group.rate)
        if self.planner.throttle is not None:
            self.source.slow_down(self.planner.throttle)

    def relax(self) -> None:
        """Let the guest write as it likes: it would be slowed down in vain."""
        if self.planner.throttle is not None:
            self.planner.relax()
            self.source.slow_down(None)

    def usual_state(self, wishes: Wishes, gate: Gate) -> str:
        """What to call the state of a sync that copies; a closed gate holds it, too."""
        if wishes.is_paused:
            return PAUSED
        if not self.first_pass_done:
            return SYNCING
        fits = self.planner.prospect.pause_s <= wishes.limits.downtime_s
        return IN_SYNC if fits and (wishes.is_held or not gate.may(Step.CONFIRMED)) else CONVERGING

    def progress(self) -> Progress:
        outlook, pipeline = self.planner.outlook, self.pipeline
        return Progress(elapsed_s=outlook.elapsed_s, sent_bytes=pipeline.sent_bytes,
                        zero_bytes=pipeline.zero_bytes, equal_bytes=pipeline.equal_bytes,
                        remaining_bytes=outlook.remaining_bytes,
                        rate=outlook.send_rate, dirty_rate=outlook.dirty_rate, pause_s=outlook.pause_s,
                        eta_s=outlook.eta_s, best_pause_s=self.planner.prospect.best_pause_s,
                        rate_cap=self.planner.group.rate, write_limit=self.planner.throttle)
