"""The short pause in which what the filters of a disk stand on is exchanged.

    begin ─▶ the image is flushed, so that little is left to flush in the pause
             the disk is paused, nothing is in flight, the image is flushed, no driver does anything
    end   ─▶ the filters stand on what is given, the disk goes on (unless somebody else wants it paused)
"""

from __future__ import annotations

from typing import Final

from tapcore.driver import Driver
from tapcore.errors import ControlError, WritelogError
from tapcore.jobs.job import Job
from tapcore.jobs.steps import Done, asking
from tapcore.request import BACKGROUND, FLUSH, Request
from tapcore.vbd import PAUSED

TRY_AGAIN_S: Final = 0.02
"""Between tries to pause a disk whose chain somebody else is replacing."""


class Switch:
    """One pause of the disk of `job`. `flushes` unless the image is of no further use."""

    def __init__(self, job: Job, *, flushes: bool = True) -> None:
        self._job = job
        self._flushes = flushes
        self._loop = job.env.loop
        self._vbd = job.disk.vbd
        self._began_s = 0.0
        self._done: Done

    def begin(self, done: Done) -> None:
        """A step. If it fails nothing is changed and there is nothing to end."""
        self._done = done
        self._flush_leaf(self._flushed_before)

    def _flushed_before(self, error: WritelogError | None) -> None:
        if error is None:
            self._began_s = self._loop.time_s()
            self._pause()
        else:
            self._done(error)

    def _pause(self) -> None:
        try:
            self._vbd.pause(self._paused)
        except ControlError as error:
            if self._job.disk.closing:
                self._done(error)
            else:
                self._loop.call_later(TRY_AGAIN_S, self._pause)

    def _paused(self) -> None:
        # Others who wait for the pause are told of it first.
        self._loop.call_soon(self._lend)

    def _lend(self) -> None:
        if self._vbd.state == PAUSED:
            self._vbd.lend_chain(self._flush)
        else:
            self._pause()

    def _flush(self) -> None:
        self._flush_leaf(self._flushed)

    def _flush_leaf(self, done: Done) -> None:
        if self._flushes:
            asking(self._vbd.chain.leaf, Request(FLUSH, flags=BACKGROUND))(done)
        else:
            done(None)

    def _flushed(self, error: WritelogError | None) -> None:
        if error is None:
            self._vbd.chain.quiesce(lambda: self._done(None))
        else:
            self._go_on()
            self._done(error)

    def end(self, lower: Driver) -> None:
        """Go on with the filters on `lower`."""
        self._vbd.chain.stand_on(lower)
        self._go_on()

    def end_without_chain(self) -> None:
        """What the filters stood on is closed and cannot be opened again: close them too. The disk stays paused,
        and can be given another chain."""
        chain = self._vbd.chain
        chain.drivers = list(chain.filters)
        try:
            chain.close()
        finally:
            self._go_on()

    def _go_on(self) -> None:
        self._vbd.chain_returned()
        self._job.settle(self._job.disk)
        pause_ms = round(1000 * (self._loop.time_s() - self._began_s), 3)
        self._job.pause_ms = max(self._job.pause_ms, pause_ms)
