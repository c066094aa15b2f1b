"""What no order can beat: loads of `writelog-sync simulate`, sent by an order that knows how often each chunk is
written, now or until the end. Run as `python -m tools.benchmarks.oracle`; it takes some minutes.
"""

from __future__ import annotations

import math

from bitarray import bitarray

from writelog.backlog import Backlog
from writelog.dirtymap import CHUNK_BYTES
from writelog.plan import Limits
from writelog.simulate import BLOCK_BYTES, Scattered, Scene, Simulation
from writelog.sync_simulate import LOADS, MIB

SIZE_BYTES = 4096 * MIB
LINK_RATE = 112.0 * MIB
CHUNK_BLOCKS = CHUNK_BYTES // BLOCK_BYTES


class Oracle(Backlog):
    """Sends first what is expected to be written to least often: by the present rates, or, if `is_prophet`, by
    all those until what is pending is sent."""

    def __init__(self, size_bytes: int, load: Scattered, is_prophet: bool) -> None:
        super().__init__(size_bytes)
        self._load = load
        self._is_prophet = is_prophet
        self._now_s = 0.0
        self._rates: dict[float, list[float]] = {}
        self._order: list[int] = []

    def touch(self, now_s: float, touched: bitarray, send_rate: float | None = None) -> None:
        self._now_s = now_s
        super().touch(now_s, touched, send_rate)

    def sort(self) -> None:
        expected = [0.0] * self.chunks
        at_s, end_s = self._now_s, self._now_s + max(self.pending_bytes / LINK_RATE, 1.0)
        moving_s = self._load.moving_s
        while at_s < end_s:
            until_s = min(end_s, (at_s // moving_s + 1) * moving_s) if moving_s < math.inf else end_s
            rates = self._rates_at(at_s)
            expected = [sum_ + rate * (until_s - at_s) for sum_, rate in zip(expected, rates, strict=True)]
            at_s = until_s if self._is_prophet else end_s
        ready = self._pending & ~self._out
        self._order = sorted(ready.search(1), key=expected.__getitem__, reverse=True)

    @property
    def is_lined_up(self) -> bool:
        return bool(self._order)

    def next(self, limit_bytes: int) -> list[tuple[int, int]]:
        count = -(-limit_bytes // CHUNK_BYTES)
        chosen = sorted(self._order[-count:])
        del self._order[-count:]
        for chunk in chosen:
            self._pending[chunk] = 0
        return [(chunk * CHUNK_BYTES, CHUNK_BYTES) for chunk in chosen]

    def _rates_at(self, at_s: float) -> list[float]:
        """Of each chunk: writes a second."""
        epoch = at_s // self._load.moving_s if self._load.moving_s < math.inf else 0.0
        if epoch not in self._rates:
            rates = self._rates[epoch] = [0.0] * self.chunks
            for block, rate in self._load.rates(at_s):
                rates[block // CHUNK_BLOCKS] += rate
        return self._rates[epoch]


def main() -> None:
    print("| load | knows | extra data |")
    print("| --- | --- | --- |")
    for name in ("zipf", "moving"):
        for is_prophet, knows in ((False, "the present rates"), (True, "those to come, too")):
            load = LOADS[name](SIZE_BYTES // BLOCK_BYTES, 1.0, LINK_RATE, 1)
            assert isinstance(load, Scattered)
            backlog = Oracle(SIZE_BYTES, load, is_prophet)
            outcome = Simulation(Scene(SIZE_BYTES, LINK_RATE, load), Limits(), backlog=backlog).run()
            assert outcome.equal
            print(f"| {name} | {knows} | {outcome.extra_percent:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
