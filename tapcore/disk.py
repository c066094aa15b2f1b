"""A disk of the engine: a vbd, and who serves it, holds it and wants it paused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tapcore import fence
from tapcore.control_server import Connection
from tapcore.driver import leaf_of
from tapcore.drivers.log import Log
from tapcore.loop import Timer
from tapcore.nbd.server import NbdServer
from tapcore.vbd import Vbd

if TYPE_CHECKING:
    from tapcore.jobs.job import Job


class Disk:
    """A vbd, and what the engine adds to it."""

    def __init__(self, vbd: Vbd, server: NbdServer, exports: dict[str, Vbd], lock_fd: int) -> None:
        self.vbd = vbd
        self.name = vbd.name
        self.server = server
        self.exports = exports
        """What `server` serves: this disk alone, or all that have no addresses of their own."""
        self.lock_fd = lock_fd
        self.pinned = False
        self.holder: Connection | None = None
        self.hold_timer: Timer | None = None
        self.overdue: Connection | None = None
        """Whose hold ran out, until it says `unpause`."""
        self.throttler: Connection | None = None
        """Who slows its writes down."""
        self.handing_over = False
        self.forcing = 0
        """Unpauses by force that are under way: it is not handed over meanwhile."""
        self.closing = False
        self.job: Job | None = None
        """The last one."""

    @property
    def is_busy(self) -> bool:
        """Does a job work on its images?"""
        return self.job is not None and not self.job.is_over

    def without_job(self, action: Callable[[], None]) -> None:
        """`action()` when no job works on its images; one that does is ended."""
        if self.job is None or self.job.is_over:
            action()
        else:
            self.job.cancel()
            self.job.when_over(action)

    @property
    def image(self) -> str | None:
        """The path of the image at the bottom of the chain, where that is a file."""
        drivers = self.vbd.chain.drivers
        return leaf_of(self.vbd.chain.head).path if drivers else None

    def let_go(self) -> None:
        """End the hold, if there is one."""
        self.holder = None
        if self.hold_timer is not None:
            self.hold_timer.cancel()
            self.hold_timer = None

    @property
    def logs(self) -> list[Log]:
        return [driver for driver in self.vbd.chain.drivers if isinstance(driver, Log)]

    def heed_fence(self) -> None:
        """See whether the image has a fence, unless the disk cannot be written anyway."""
        image = self.image
        if image is not None and not self.vbd.read_only:
            self.vbd.fenced = fence.read(image)
