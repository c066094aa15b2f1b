"""A job: something that takes a while and changes the images of a disk that runs. One at a time for a disk.

    running ─▶ done
       │ └───▶ failed      `error` says why; the disk runs on the chain that it had
       └─────▶ cancelled   the same
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from tapcore.chain import Chain
from tapcore.disk import Disk
from tapcore.driver import Env
from tapcore.errors import WritelogError
from tapcore.jobs.steps import Steps, drive

logger = logging.getLogger(__name__)

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"

Settle = Callable[[Disk], None]
"""Lets a disk go on if nobody wants it paused."""


class Job:
    """A subclass says in `steps` what it does: whether they come to their end or raise, the job has then let go of
    everything."""

    kind: ClassVar[str] = ""

    def __init__(self, env: Env, disk: Disk, settle: Settle) -> None:
        self.env = env
        self.disk = disk
        self.settle = settle
        self.state = RUNNING
        self.phase = "starting"
        self.error: WritelogError | None = None
        self.pause_ms = 0.0
        """The longest pause of the disk so far."""
        self.result: dict[str, Any] = {}
        self.cancelling = False
        self._began_s = env.loop.time_s()
        self._ended_s = 0.0
        self._waiting: list[Callable[[], None]] = []

    def steps(self) -> Steps[None]:
        raise NotImplementedError

    def start(self) -> None:
        drive(self.steps(), self._ended)

    @property
    def chain(self) -> Chain:
        return self.disk.vbd.chain

    @property
    def is_over(self) -> bool:
        return self.state != RUNNING

    def cancel(self) -> None:
        """End soon, with the disk on the chain that it had; without effect when the end is near anyway."""
        self.cancelling = True

    def when_over(self, action: Callable[[], None]) -> None:
        if self.is_over:
            action()
        else:
            self._waiting.append(action)

    def _ended(self, error: WritelogError | None) -> None:
        self.error = error
        self.state = DONE if error is None else CANCELLED if self.cancelling else FAILED
        self._ended_s = self.env.loop.time_s()
        if error is not None:
            logger.warning("%s: %s %s: %s", self.disk.name, self.kind, self.state, error)
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def as_dict(self) -> dict[str, Any]:
        """What is known of it, ready for JSON."""
        until_s = self._ended_s if self.is_over else self.env.loop.time_s()
        return {
            "disk": self.disk.name, "kind": self.kind, "state": self.state,
            "phase": None if self.is_over else self.phase, "seconds": round(until_s - self._began_s, 3),
            "pause_ms": self.pause_ms, "error": str(self.error) if self.error else None,
        } | self.result
