"""What looking at a log costs the loop."""

from __future__ import annotations

import time
from functools import partial

from tools.benchmarks.outcome import OURS, Outcome
from writelog.bitmap import Bitmap, bitmap_bytes
from writelog.dirtymap import DirtyMap
from writelog.logexport import STEP_RANGES

SHARES = (0.0001, 0.001, 0.01)


def measure(repeat: int) -> list[Outcome]:
    """Milliseconds of the loop's time to look at, and to take, all of a 1 TiB log, and the longest single step of
    it: between two steps guests are served."""
    size_bytes, granularity_bytes = 1 << 40, 4096
    outcomes = []
    for share in SHARES:
        rows = {verb: Outcome(f"log: {verb} 1 TiB, {share:.2%} dirty", "ms") for verb in ("peek", "take")}
        longest = Outcome(f"log: longest step at {share:.2%} dirty", "ms")
        for _ in range(repeat):
            dirty, taken = (Bitmap(bytearray(bitmap_bytes(size_bytes, granularity_bytes)), size_bytes,
                                   granularity_bytes) for _ in range(2))
            dirty.bits[:: int(1 / share)] = 1
            wanted = dirty.bits.count()
            dirty_map = DirtyMap(dirty, taken)
            steps_s: list[float] = []
            for verb, outcome in rows.items():
                step = dirty_map.peek if verb == "peek" else partial(dirty_map.take, dirty_map.open_lease())
                block = found = 0
                first_step = len(steps_s)
                while block < dirty_map.blocks:
                    start_s = time.perf_counter()
                    ranges, block = step(block, dirty_map.blocks, STEP_RANGES)
                    steps_s.append(time.perf_counter() - start_s)
                    found += len(ranges) // 2
                assert found == wanted
                outcome.add(OURS, sum(steps_s[first_step:]) * 1e3)
            longest.add(OURS, max(steps_s) * 1e3)
        outcomes += [*rows.values(), longest]
    return outcomes
