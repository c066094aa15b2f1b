"""stream: what only the parents of a disk's top image hold is copied into it, and then it stands without them.

    guest ─▶ filters ─▶ gate ─▶ top ─backing─▶ parent ─▶ … ─▶ base
                                 ◀── copied ─────┘

    1 pause; the gate above the top
    2 copy, beside the guest, each part with its range locked: what the guest writes is never overwritten
    3 pause; flush; close the top; write into its header that it has no backing (or `base`); open it again

What a crash leaves: a top that holds more than before of what its parents hold, and reads the same.
"""

from __future__ import annotations

import errno
from pathlib import Path

from tapcore.chain import Level, close_image, levels_from, open_image
from tapcore.disk import Disk
from tapcore.driver import Driver, Env
from tapcore.errors import ControlError, WritelogError
from tapcore.formats.tools import find_tools
from tapcore.jobs.copying import COPY, SKIP, ZERO, CopyJob, Plan, refuse_internal_snapshots
from tapcore.jobs.gate import Gate
from tapcore.jobs.job import Settle
from tapcore.jobs.snapshot import SAME_FORMAT, backing_for, open_again
from tapcore.jobs.steps import Steps, asking, asking_own_status, in_worker
from tapcore.jobs.switch import Switch
from tapcore.request import BACKGROUND, STATUS, STATUS_HOLE, STATUS_ZERO, Request


class Stream(CopyJob):
    kind = "stream"

    def __init__(self, env: Env, disk: Disk, settle: Settle, rate: int | None, base: str | None) -> None:
        """`base` is the path of the parent that is to stay."""
        super().__init__(env, disk, settle, rate)
        self._base_path = base
        self.base: Driver | None = None
        self.between: list[Driver] = []
        """The parents that are to go."""

    def steps(self) -> Steps[None]:
        top = self._check()
        assert top.path is not None
        tools = find_tools(SAME_FORMAT.get(top.name, top.name))
        backing = None if self.base is None else backing_for(str(Path(top.path).absolute()), self.base)
        path, image = top.path, Level(top.name, top.params)
        self.source = self.target = top
        yield in_worker(self.env, lambda: refuse_internal_snapshots(top, path))
        switch = Switch(self)
        yield switch.begin
        self.gate = Gate(self.env, top)
        switch.end(self.gate)
        try:
            self.phase = "copying"
            yield self.copy_disk
            self.check_cancelled()
            self.phase = "switching"
            switch = Switch(self)
            yield switch.begin
        except WritelogError:
            switch = Switch(self, flushes=False)
            yield switch.begin
            switch.end(top)
            raise
        opened: list[Driver] = []

        def exchange() -> None:
            tools.set_backing(path, backing)
            opened.append(open_image(self.env, image))

        try:
            close_image(top)
            yield in_worker(self.env, exchange)
        except (WritelogError, OSError) as error:
            yield from open_again(self, switch, image, error)
            raise
        switch.end(opened[0])
        self.result = {"chain": self.chain.text}

    def _check(self) -> Driver:
        """ControlError if it cannot be done."""
        top = self.chain.leaf
        if top.backing is None:
            raise ControlError(f"{top.name}:{top.params} has no parent to be copied from", errno=errno.EINVAL)
        self.between = list(levels_from(top.backing))
        if self._base_path is not None:
            self._find_base(self.between, self._base_path)
        return top

    def _find_base(self, parents: list[Driver], path: str) -> None:
        found = [parent for parent in parents if parent.path is not None and Path(path).exists()
                 and Path(path).samefile(parent.path)]
        if not found:
            known = ", ".join(str(parent.path) for parent in parents)
            raise ControlError("is no parent of this disk", errno=errno.EINVAL, path=path,
                               hint=f"its parents are {known}")
        (base,) = found
        self.base, self.between = base, parents[: parents.index(base)]
        for between in self.between:
            if between.info.size_bytes < base.info.size_bytes:
                raise ControlError(f"{between.path} is shorter than {path}, which would show past its end",
                                   errno=errno.EINVAL, hint="stream without a base")
        if not self.between:
            raise ControlError("is the parent already", errno=errno.EINVAL, path=path)

    def plan(self, offset: int, length: int, plan: Plan) -> Steps[None]:
        """What the top has stays; of what it has not, what is between it and the base counts."""
        own = Request(STATUS, offset, length, flags=BACKGROUND)
        yield asking_own_status(self.source, own)
        for extent_length, state in own.extents:
            if not state & STATUS_HOLE:
                plan.append((extent_length, SKIP))
            elif self.base is None:
                if not (yield from self._plan_all_below(offset, extent_length, plan)):
                    return
            else:
                yield from self._plan_between(offset, extent_length, plan)
            offset += extent_length

    def _plan_all_below(self, offset: int, length: int, plan: Plan) -> Steps[bool]:
        """Without a backing zeroes are read there, so they need not be written. False if the answer has an end
        before that of the range."""
        whole = Request(STATUS, offset, length, flags=BACKGROUND)
        yield asking(self.source, whole)
        plan.extend((part, SKIP if state & STATUS_ZERO else COPY) for part, state in whole.extents)
        return sum(part for part, _ in whole.extents) == length

    def _plan_between(self, offset: int, length: int, plan: Plan) -> Steps[None]:
        end = offset + length
        while offset < end:
            length, action = end - offset, SKIP
            for level in self.between:
                if offset >= level.info.size_bytes:
                    break  # nothing shows from here on, of the base neither, which is not longer
                length = min(length, level.info.size_bytes - offset)
                status = Request(STATUS, offset, length, flags=BACKGROUND)
                yield asking_own_status(level, status)
                length, state = status.extents[0]
                if not state & STATUS_HOLE:
                    action = ZERO if state & STATUS_ZERO else COPY
                    break
            plan.append((length, action))
            offset += length
