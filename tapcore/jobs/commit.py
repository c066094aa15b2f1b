"""commit: what the top image of a disk holds goes into its parent, and the disk goes on with the parent.

    guest ─▶ filters ─▶ gate ─▶ top ─backing─▶ parent ─▶ …
                                 └── copied ──▶

    1 open the parent for writing; pause; it takes the place of the one that was open for reading; the gate above
    2 copy, beside the guest: what the top holds hides what is written below it, so the guest sees nothing of this
    3 copy what the guest has changed since, round after round, until little is left or it gets no less; from then
      on the guest's writes go to both
    4 copy and flush what is left; pause; copy and flush the rest; put a new, empty image of the same parent in the
      place of the top
    5 the filters stand on the parent, the guest goes on

What a crash leaves: up to the exchange of files in 4 the top, which has all that was ever flushed, over a parent
whose differences it hides; afterwards an empty top over the parent. So the disk can be opened at the top at any
time, and after the end at the parent too.

While the job runs nobody else may read the parent (its lock says so): for others it is between two states.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Final

from tapcore.chain import close_image, open_image
from tapcore.driver import Driver, OpenFlag
from tapcore.durablefile import sync_folder
from tapcore.errors import ControlError, WritelogError
from tapcore.formats.reader import ImageDriver
from tapcore.formats.tools import Backing, find_tools
from tapcore.imagelock import claim_image, unclaim_image
from tapcore.jobs.copying import COPY, SKIP, ZERO, CopyJob, Plan, refuse_internal_snapshots
from tapcore.jobs.gate import Gate
from tapcore.jobs.snapshot import SAME_FORMAT, backing_for, give_access_of
from tapcore.jobs.steps import Steps, asking, asking_own_status, in_worker
from tapcore.jobs.switch import Switch
from tapcore.request import BACKGROUND, FLUSH, STATUS, STATUS_HOLE, STATUS_ZERO, Request

logger = logging.getLogger(__name__)

PAUSE_S: Final = 0.02
"""How long the last round may take, as estimated."""
PATIENT_ROUNDS: Final = 2
"""After so many the guest's writes go to the parent at once, too."""
MAX_ROUNDS: Final = 6
"""After so many the last round may take twice as long with each further one: it ends, whatever the guest does."""
MIN_SPEED: Final = 50e6
"""Bytes a second: the least that is taken for the speed of copying."""


class Commit(CopyJob):
    kind = "commit"

    def steps(self) -> Steps[None]:
        top = self._check()
        parent_id = top.get_parent_id()
        assert parent_id is not None and top.path is not None
        self.source = top
        path = top.path
        yield in_worker(self.env, lambda: refuse_internal_snapshots(top, path))
        yield in_worker(self.env, lambda: setattr(self, "target", open_image(self.env, parent_id)))
        yield from self._take_over(top)
        empty = Path(f"{os.path.realpath(top.path)}.empty")
        try:
            yield from self._copy_all()
            self.check_cancelled()
            yield in_worker(self.env, lambda: self._make_empty(top, empty))
            yield from self._finish(top, empty)
        except WritelogError:
            yield in_worker(self.env, lambda: empty.unlink(missing_ok=True))
            yield from self._give_back(top)
            raise
        self.result = {"chain": self.chain.text, "emptied": top.path}

    def _check(self) -> ImageDriver:
        """ControlError if it cannot be done."""
        top = self.chain.leaf
        if top.backing is None:
            raise ControlError(f"{top.name}:{top.params} has no parent that it could go into", errno=errno.EINVAL)
        if not isinstance(top, ImageDriver):
            raise ControlError(f"a {top.name} is not committed while in use: after a crash it would refuse the "
                               "parent, which has changed", errno=errno.EOPNOTSUPP,
                               hint="tap-ctl stream, or td-img commit when the disk is closed")
        parent = top.backing
        if parent.info.size_bytes != top.info.size_bytes:
            raise ControlError(f"the parent {parent.path} has {parent.info.size_bytes} bytes, the disk "
                               f"{top.info.size_bytes}", errno=errno.EINVAL,
                               hint="give them one size: td-img resize")
        missing = top.info.features & ~parent.info.features
        if missing:
            raise ControlError(f"the parent {parent.path} lacks {missing!r}, which the guest was told of",
                               errno=errno.EOPNOTSUPP)
        if top.file.is_device:
            raise ControlError("an image on a block device cannot be exchanged for an empty one at once",
                               errno=errno.EOPNOTSUPP, path=top.path)
        return top

    def _take_over(self, top: ImageDriver) -> Steps[None]:
        """The parent that can be written becomes the backing."""
        switch = Switch(self)
        former, parent = top.backing, self.target
        assert former is not None
        try:
            yield switch.begin
        except WritelogError:
            close_image(parent)
            raise
        failure: Exception | None = None
        top.backing = parent
        try:
            close_image(former)
            descriptor = parent.fileno()
            if descriptor is not None:
                claim_image(descriptor, parent.path or parent.params)
        except (WritelogError, OSError) as error:
            failure = error
        self.gate = Gate(self.env, top)
        switch.end(self.gate)
        if failure is not None:
            yield from self._give_back(top)
            raise failure

    def _copy_all(self) -> Steps[None]:
        self.phase = "copying"
        yield self.copy_disk
        began_s, before_bytes, allowed_s, rounds = self.env.loop.time_s(), self.copied_bytes, PAUSE_S, 0
        while True:
            took_s = max(self.env.loop.time_s() - began_s, 0.001)
            speed = max((self.copied_bytes - before_bytes) / took_s, MIN_SPEED)
            if self.gate.changed_bytes() / speed <= allowed_s:
                return
            rounds += 1
            self.phase = f"copying what has changed, round {rounds}"
            if rounds > PATIENT_ROUNDS:
                self.gate.mirror = self.target
            if rounds > MAX_ROUNDS:
                allowed_s *= 2
            began_s, before_bytes = self.env.loop.time_s(), self.copied_bytes
            yield self.copy_changed

    def _finish(self, top: ImageDriver, empty: Path) -> Steps[None]:
        self.phase = "switching"
        parent, place = self.target, Path(os.path.realpath(top.path or ""))
        self.gate.mirror = parent
        yield self.copy_changed
        yield asking(parent, Request(FLUSH, flags=BACKGROUND))
        switch = Switch(self, flushes=False)
        yield switch.begin
        try:
            yield self.copy_changed
            yield asking(parent, Request(FLUSH, flags=BACKGROUND))
            yield in_worker(self.env, lambda: empty.rename(place))
        except WritelogError:
            switch.end(self.gate)
            raise
        # There is no way back from here: the top that is open has no name any more.
        try:
            yield in_worker(self.env, lambda: sync_folder(place.parent))
        except WritelogError as error:
            logger.error("%s: a power loss may bring back what %s was: %s", self.disk.name, place, error)
        top.backing = None
        self._unclaim()
        switch.end(parent)
        try:
            yield in_worker(self.env, lambda: close_image(top))
        except WritelogError as error:
            logger.warning("%s: closing %s, which was replaced: %s", self.disk.name, top.path, error)

    def _make_empty(self, top: ImageDriver, empty: Path) -> None:
        """In a worker: the image that is to take the top's place."""
        assert top.path is not None
        empty.unlink(missing_ok=True)
        name = backing_for(top.path, self.target)
        if Path(top.path).is_symlink():
            name = Backing(str(Path(self.target.path or "").absolute()), name.driver)
        tools = find_tools(SAME_FORMAT.get(top.name, top.name))
        tools.create(str(empty), top.info.size_bytes, backing=name)
        give_access_of(top.path, str(empty))

    def _give_back(self, top: ImageDriver) -> Steps[None]:
        """After a failure: the top over its parent, read-only, as it was."""
        parent_id = top.get_parent_id()
        assert parent_id is not None
        opened: list[Driver] = []
        flags = OpenFlag.RDONLY | OpenFlag.SHAREABLE
        switch = Switch(self, flushes=False)
        yield switch.begin
        self._unclaim()
        try:
            # All its tables are in the file then, and its close changes none of them.
            yield asking(self.target, Request(FLUSH, flags=BACKGROUND))
            yield in_worker(self.env, lambda: opened.append(open_image(self.env, parent_id, flags)))
        except WritelogError as error:
            logger.error("%s: the parent stays open for writing: %s", self.disk.name, error)
            switch.end(top)
            return
        top.backing = opened[0]
        switch.end(top)
        close_image(self.target)

    def _unclaim(self) -> None:
        descriptor = self.target.fileno()
        if descriptor is not None:
            unclaim_image(descriptor)

    def plan(self, offset: int, length: int, plan: Plan) -> Steps[None]:
        status = Request(STATUS, offset, length, flags=BACKGROUND)
        yield asking_own_status(self.source, status)
        for extent_length, state in status.extents:
            plan.append((extent_length, SKIP if state & STATUS_HOLE else ZERO if state & STATUS_ZERO else COPY))
