"""`writelog-sync plan`: asks the replica whether it can take a disk, watches what the guest writes for a while,
and forecasts how a sync would go."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from writelog.dirtymap import CHUNK_BYTES
from writelog.forecast import Forecast, forecast
from writelog.heat import Heat, Spread, sample_s
from writelog.plan import bytes_a_touch
from writelog.sync_check import Target, check
from writelog.sync_keys import add_key_options, check_key_options, find_peer
from writelog.sync_source import Source

FIXED_S: Final = 0.05
"""What a pause takes besides sending: round trips and the replica's flush, about."""

DESCRIPTION = """\
Ask the replica, if one is given, whether it can take DISK: reachable, of this version and with the right keys,
as large, writable, with room for the data, and no copy of something else. Watch what the guest writes for some
seconds, and forecast a sync at a given rate: time, data sent again, the pause, and whether it would converge
without slowing the guest down. Nothing is started, nothing is changed. The exit code is 1 if the replica cannot
take the disk, or it would not converge."""


def parse_arguments(
    arguments: Sequence[str], rate: Callable[[str], float], seconds: Callable[[str], float],
    some_seconds: Callable[[str], float], downtime: Callable[[str], float]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync plan", description=DESCRIPTION)
    parser.add_argument("disk", metavar="DISK", help="name of the disk, as tap-ctl list shows it")
    parser.add_argument("replica", metavar="tcp://HOST:PORT", nargs="?", help="where writelog-replica listens")
    parser.add_argument("--rate", type=rate, required=True, metavar="RATE",
                        help="what the link carries, such as 110M")
    parser.add_argument("--for", dest="watch_s", type=seconds, default=10.0, metavar="S",
                        help="watch for so long (default: %(default)g s); longer is better")
    parser.add_argument("--downtime", type=downtime, default=0.3, metavar="S",
                        help="budget (default: %(default)g s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="as for the sync: the replica may hold another copy")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="which write log to use, if the disk has several")
    parser.add_argument("--peer", metavar="NAME",
                        help="whose key the replica must have (default: HOST, or the only one that is known)")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    add_key_options(parser, "--server-key", "the public key of the replica")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    check_key_options(parser, options, "--server-key")
    return options


def watch(source: Source, watch_s: float) -> tuple[Spread, float]:
    """The heat of the disk after so long, and what was written a second."""
    heat = Heat(-(-source.size_bytes // CHUNK_BYTES))
    source.touched()
    start_s = now_s = time.monotonic()
    before_bytes = source.written_bytes()
    while now_s - start_s < watch_s:
        time.sleep(min(sample_s(heat.chunks), max(watch_s - (now_s - start_s), 0.0)))
        now_s = time.monotonic()
        heat.feed(now_s, source.touched())
    return heat.spread(), (source.written_bytes() - before_bytes) / max(now_s - start_s, 1e-9)


def run(options: argparse.Namespace) -> int:
    """Ask, watch, and print; the exit code is 0 if a sync would end well."""
    peer = find_peer(options.replica, options) if options.replica else None
    source = Source(options.run_dir or default_run_dir(), options.disk, options.log)
    try:
        target = check(source, peer, options.downtime, options.overwrite) if peer is not None else None
        data_bytes = source.data_bytes()
        spread, write_rate = watch(source, options.watch_s)
        changed_bytes = sum(source.dirty_bytes()) if source.bases()[0] else None
    finally:
        source.close()
    touch_bytes = bytes_a_touch(spread, write_rate)
    sizes = {"full": data_bytes} | ({} if changed_bytes is None else {"resync": changed_bytes})
    found = {name: forecast(size, spread, touch_bytes, options.rate, FIXED_S, options.downtime)
             for name, size in sizes.items() if is_meant(name, target)}
    if options.json:
        print(json.dumps({"disk": options.disk, "size_bytes": source.size_bytes, "write_rate": write_rate}
                         | ({} if target is None else {"target": target.figures()})
                         | {name: asdict(one) for name, one in found.items()}))
    else:
        print(f"{options.disk}: {size_text(source.size_bytes)}, {size_text(data_bytes)} of data; the guest writes "
              f"{size_text(write_rate)}/s, to {size_text(spread.chunks * CHUNK_BYTES)} of it lately")
        if target is not None:
            print(f"  target: {target}")
        for name, one in found.items():
            what = "a full copy" if name == "full" else "a replica that has the former copy"
            print(f"  {what}: {describe(one, options.rate, options.downtime)}")
    return 0 if (target is None or target.problem is None) and all(one.converges for one in found.values()) else 1


def is_meant(forecast_name: str, target: Target | None) -> bool:
    """Whether that is what would be sent, as far as it is known."""
    if target is None or target.facts is None:
        return True
    return (forecast_name == "resync") == (target.facts.base != 0)


def describe(found: Forecast, send_rate: float, downtime_s: float) -> str:
    """A forecast for people."""
    text = f"{size_text(found.first_bytes)} at {size_text(send_rate)}/s in {found.total_s:.0f} s, "
    if found.converges:
        return f"{text}{size_text(found.extra_bytes)} of it again, a pause of {found.pause_s * 1000:.0f} ms"
    return (f"{text}then it would not converge: the pause would stay at {found.pause_s:.1f} s, above the budget "
            f"of {downtime_s:g} s, unless the guest is slowed down")
