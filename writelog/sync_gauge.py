"""Measures a running sync, for the plan and for the operator."""

from __future__ import annotations

import time
from typing import Final

from writelog.plan import Improvement, Meter, Outlook, flush_estimate_s
from writelog.sync_pipeline import Pipeline, Portion
from writelog.sync_report import Progress
from writelog.wire import Ack

WINDOW_S: Final = 2.0


class Gauge:
    """`sample` makes an Outlook from what is known now; the rates are means over WINDOW_S."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.round_trip_s = 0.0
        self.ack = Ack(0, 0, 0, 0)
        """The replica's last one."""
        self._pipeline = pipeline
        self._start_s = time.monotonic()
        self._sampled_s = self._start_s
        self._busy_s = 0.0
        self._committed_bytes = 0
        self._moved_s = self._start_s
        """When the replica was last seen to apply something, or had nothing to."""
        self._moved_seq = 0
        self._sent = Meter(WINDOW_S)
        self._dirtied = Meter(WINDOW_S)
        self._improvement = Improvement()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    def start_over(self) -> None:
        """The log was filled: what was measured of it means nothing any more."""
        self._dirtied = Meter(WINDOW_S)
        self._improvement = Improvement()

    def committed(self, portion: Portion) -> None:
        self._committed_bytes += sum(length for _, _, length in portion.items)

    def sample(self, dirty_bytes: int, leased_bytes: int, first_pass_done: bool, failed_pauses: int) -> Outlook:
        """The outlook, with the log's figures of now."""
        now_s = time.monotonic()
        pipeline = self._pipeline
        if pipeline.todo_bytes:
            # Only while there is something to send does what was sent tell what the link can carry.
            self._busy_s += now_s - self._sampled_s
            self._sent.feed(self._busy_s, pipeline.applied_bytes)
        self._sampled_s = now_s
        self._dirtied.feed(now_s, dirty_bytes + leased_bytes + self._committed_bytes)
        if pipeline.applied_seq != self._moved_seq or not pipeline.unacked_bytes:
            self._moved_s, self._moved_seq = now_s, pipeline.applied_seq
        ack = self.ack
        outlook = Outlook(
            elapsed_s=self.elapsed_s,
            first_pass_done=first_pass_done,
            remaining_bytes=dirty_bytes + pipeline.todo_bytes + pipeline.unacked_bytes,
            send_rate=self._sent.rate or None,
            dirty_rate=max(self._dirtied.rate or 0.0, 0.0),
            round_trip_s=self.round_trip_s,
            flush_s=flush_estimate_s(ack.flush_ns / 1e9, ack.flush_bytes, dirty_bytes + leased_bytes),
            failed_pauses=failed_pauses,
            stalled_s=now_s - self._moved_s,
            is_untried=pipeline.unacked_bytes > 0 and pipeline.applied_seq == 0,
        )
        if first_pass_done:
            outlook = outlook.with_unimproved(self._improvement.unimproved_s(now_s, outlook.pause_s))
        return outlook

    def progress(self, outlook: Outlook) -> Progress:
        return Progress(elapsed_s=outlook.elapsed_s, sent_bytes=self._pipeline.sent_bytes,
                        zero_bytes=self._pipeline.zero_bytes, remaining_bytes=outlook.remaining_bytes,
                        rate=outlook.send_rate, dirty_rate=outlook.dirty_rate, pause_s=outlook.pause_s,
                        eta_s=outlook.eta_s)
