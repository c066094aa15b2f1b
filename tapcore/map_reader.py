"""The `map` op of the control protocol: the block status of a disk, a page of it at a time."""

from __future__ import annotations

import errno
import os
from typing import Final

from tapcore.control_server import Call
from tapcore.errors import ControlError
from tapcore.loop import Loop
from tapcore.request import Extent
from tapcore.vbd import REPLACING, Vbd

MAP_STEP_BYTES: Final = 1 << 30
"""Asked of the chain at once."""
MAP_MAX_EXTENTS: Final = 4096
"""In one reply."""
TRY_AGAIN_S: Final = 0.01
"""Between looks whether the disk has its chain again."""


class MapReader:
    """Asks for the block status of [offset, stop) piece by piece, between which the guest has its turn."""

    def __init__(self, loop: Loop, vbd: Vbd, call: Call, offset: int, stop: int) -> None:
        self._loop = loop
        self._vbd = vbd
        self._call = call
        self._at = offset
        self._stop = stop
        self._extents: list[tuple[int, int, int]] = []

    def step(self) -> None:
        if self._at == self._stop or len(self._extents) >= MAP_MAX_EXTENTS:
            self._call.finish({"extents": self._extents, "next": self._at if self._at < self._stop else None})
        else:
            self._vbd.status_map(self._at, min(MAP_STEP_BYTES, self._stop - self._at), self._add)

    def _add(self, code: int, extents: list[Extent]) -> None:
        if code == errno.ESHUTDOWN and self._vbd.state == REPLACING:
            self._loop.call_later(TRY_AGAIN_S, self.step)
            return
        if code or not extents:
            self._call.fail(ControlError(f"no block status at {self._at}: {os.strerror(code or errno.EIO)}",
                                         errno=code or errno.EIO))
            return
        for length, flags in extents[:MAP_MAX_EXTENTS]:
            last = self._extents[-1] if self._extents else None
            if last is not None and last[2] == flags:
                self._extents[-1] = (last[0], last[1] + length, flags)
            else:
                self._extents.append((self._at, length, flags))
            self._at += length
        self._loop.call_soon(self.step)
