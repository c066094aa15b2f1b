"""One copy, with or without a guest that works meanwhile: what rows of replication and migration consist of."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tools.benchmarks import disks
from tools.benchmarks.copiers import Copier, Copy, Place
from tools.benchmarks.link import SOURCE_HOST, TARGET_HOST, Link
from tools.benchmarks.load import Trace
from tools.benchmarks.processes import Watched

WARM_UP_S: Final = 3.0
"""How long a guest works before the copy begins; its IOPS then are what it loses of."""


@dataclass
class Run:
    """A copy that is equal to its disk. `trace` is the guest's, who ran alone for WARM_UP_S before `copy`."""

    copy: Copy
    sent_bytes: int = 0
    """On the link, if it is a limited one."""
    trace: Trace | None = None

    def kept_percent(self) -> float:
        """How many of the IOPS that the guest had before it has while it is copied."""
        assert self.trace is not None
        start_s = self.copy.start_s
        before = self.trace.iops(start_s - WARM_UP_S, start_s)
        return 100 * self.trace.iops(start_s, self.copy.ready_s) / before

    def latency_ms(self, percent: float) -> float:
        """Of the guest's requests while it is copied."""
        assert self.trace is not None
        return 1e3 * self.trace.percentile_s(percent, self.copy.start_s, self.copy.ready_s)


class GuestProcess:
    """The load generator. `stop()` returns when nothing of it is in flight; `finish()`, after that, what it has
    seen."""

    def __init__(self, place: Place, load: str, link_rate: float, socket: Path | None = None) -> None:
        self._path = place.folder / "trace"
        self._process = Watched("load", [
            sys.executable, "-m", "tools.benchmarks.load", str(socket or place.guest), load,
            "--link", str(link_rate), "--trace", str(self._path)], place.deadline_s)
        self._stopped = False
        try:
            self._line()
        except BaseException:
            self.end()
            raise

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._process.terminate()
            self._line()

    def finish(self) -> Trace:
        return Trace.load(self._path, json.loads(self._line())["changed_blocks"])

    def end(self) -> None:
        self._process.end()

    def _line(self) -> bytes:
        line = self._process.read_line()
        if not line:
            raise self._process.failure()
        return line


@contextlib.contextmanager
def prepared(kind: type[Copier], source: Path, limit_s: float, link: Link | None = None,
             encrypted: bool = False) -> Iterator[Copier]:
    """A copier that serves `source`, with an empty target beside it. All of it ends within `limit_s`."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=source.parent))
    place = Place(folder, source, folder / "target.img", time.monotonic() + limit_s, encrypted=encrypted)
    if link is not None:
        place = replace(place, host=TARGET_HOST, source_host=SOURCE_HOST, at_source=link.at(link.source),
                        at_target=link.at(link.target))
    disks.make_empty(place.target, source.stat().st_size)
    copier = kind(place)
    try:
        copier.serve()
        yield copier
    finally:
        copier.close()
        shutil.rmtree(folder)
        for pattern in (f"{source.name}.*", "*.writelog"):
            for path in source.parent.glob(pattern):
                path.unlink()


def run(kind: type[Copier], source: Path, limit_s: float, *, load: str = "", link: Link | None = None,
        encrypted: bool = False) -> Run:
    """One copy from beginning to end; RunFailed if it does not count."""
    with prepared(kind, source, limit_s, link, encrypted) as copier:
        place = copier.place
        guest = GuestProcess(place, load, link.payload_rate if link else 0.0) if load else None
        try:
            if guest is not None:
                time.sleep(WARM_UP_S)
            before_bytes = link.sent_bytes() if link else 0
            copy = copier.copy(guest.stop if guest else lambda: None)
            sent_bytes = link.sent_bytes() - before_bytes if link else 0
            trace = None
            if guest is not None:
                guest.stop()
                trace = guest.finish()
        finally:
            if guest is not None:
                guest.end()
        disks.must_be_equal(place.source, place.target)
        return Run(copy, sent_bytes, trace)
