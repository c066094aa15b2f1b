"""`writelog-sync simulate`: compares the order by heat with plain address order, in made-up time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Final

from tapcore.text import size_text
from writelog.plan import Limits
from writelog.simulate import BLOCK_BYTES, Idle, Load, Rewrite, Scattered, Scene, Simulation

MIB: Final = 1 << 20

LOADS: Final[dict[str, Callable[[int, float, float, int], Load]]] = {
    "idle": lambda blocks, by, link, seed: Idle(),
    "zipf": lambda blocks, by, link, seed: Scattered(blocks, 40 * MIB * by, seed, 0.99),
    "moving": lambda blocks, by, link, seed: Scattered(blocks, 90 * MIB * by, seed, 0.99, 15, 256),
    "rewrite": lambda blocks, by, link, seed: Rewrite(blocks // 4, 60 * MIB * by),
    "uniform": lambda blocks, by, link, seed: Scattered(blocks // 4, 1.25 * link, seed),
}
"""By blocks of the disk, the scale, rate of the link and seed."""

DESCRIPTION = """\
Run syncs of a made-up disk over a made-up link, with the planner of the real ones. At scale 1 the disk has 4 GiB
and the link carries 112 MiB/s, and the loads are

  idle     nothing is written
  zipf     40 MiB/s in blocks of 4 KiB by Zipf's law (0.99), the popular ones scattered over the disk
  moving   90 MiB/s by Zipf's law, the popular ones neighbours within 1 MiB, and others every 15 s
  rewrite  a quarter of the disk from end to end, over and over, at 60 MiB/s
  uniform  blocks scattered over a quarter of the disk, at 1.25 times the link

A smaller scale makes disk, link and loads smaller."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync simulate", description=DESCRIPTION,
                                     epilog="example:\n  writelog-sync simulate zipf moving --scale 0.1",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="*", metavar="LOAD", help=f"which: {', '.join(LOADS)} (default: all)")
    parser.add_argument("--scale", type=float, default=0.25, help="from 0.01 to 1 (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--downtime", type=float, default=0.3, metavar="S", help="budget (default: %(default)g s)")
    parser.add_argument("--no-throttle", action="store_true", help="never slow the guest down")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    for load in options.loads:
        if load not in LOADS:
            parser.error(f"there is no load {load!r}: {', '.join(LOADS)}")
    if not 0.01 <= options.scale <= 1:
        parser.error("the scale is from 0.01 to 1")
    return options


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code: 1 if a run lost a write."""
    options = parse_arguments(arguments)
    link_rate = 112 * MIB * options.scale
    size_bytes = int(4096 * options.scale) * MIB
    limits = Limits(options.downtime, may_throttle=not options.no_throttle)
    lost = False
    if not options.json:
        print(f"disk {size_text(size_bytes)}, link {size_text(link_rate)}/s")
        print(f"{'load':9}{'order':9}{'time':>9}{'extra':>8}{'pause':>9}{'delayed':>9}  outcome")
    for name in options.loads or LOADS:
        for order in ("heat", "address"):
            load = LOADS[name](size_bytes // BLOCK_BYTES, options.scale, link_rate, options.seed)
            started_s = time.monotonic()
            outcome = Simulation(Scene(size_bytes, link_rate, load), limits, order == "heat").run()
            lost |= outcome.switched and not outcome.equal
            if options.json:
                print(json.dumps({"load": name, "order": order} | asdict(outcome)), flush=True)
                continue
            text = ("switched" if outcome.equal else "LOST A WRITE") if outcome.switched else outcome.reason
            print(f"{name:9}{order:9}{outcome.elapsed_s:7.1f} s{outcome.extra_percent:6.1f} %"
                  f"{outcome.pause_s * 1000:6.0f} ms{outcome.delayed_percent:7.1f} %"
                  f"  {text} ({time.monotonic() - started_s:.1f} s to run)", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
