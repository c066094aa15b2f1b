"""`writelog-sync plan`: asks the replica whether it can take a disk, watches what the guest writes for a while,
and forecasts how a sync would go."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from writelog.dirtymap import CHUNK_BYTES
from writelog.forecast import Forecast, forecast, together
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
without slowing the guest down. Several disks (--disk) are forecast together, as they go over one link and switch
over at once. Nothing is started, nothing is changed. The exit code is 1 if a replica cannot take its disk, or it
would not converge."""


def parse_arguments(
    arguments: Sequence[str], rate: Callable[[str], float], seconds: Callable[[str], float],
    some_seconds: Callable[[str], float], downtime: Callable[[str], float]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync plan", description=DESCRIPTION,
                                     epilog="example:\n  writelog-sync plan --rate 110M vm1 tcp://192.0.2.7:5599",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", metavar="DISK", nargs="?", help="name of the disk, as tap-ctl list shows it")
    parser.add_argument("replica", metavar="tcp://HOST:PORT", nargs="?", help="where writelog-replica listens")
    parser.add_argument("--disk", dest="pairs", action="append", default=[], metavar="NAME[=tcp://HOST:PORT]",
                        help="instead, once for each disk of a guest that are to switch over together")
    parser.add_argument("--rate", type=rate, required=True, metavar="RATE",
                        help="what the link carries, such as 110M")
    parser.add_argument("--for", dest="watch_s", type=seconds, default=10.0, metavar="S",
                        help="watch for so long (default: %(default)g s); longer is better")
    parser.add_argument("--downtime", type=downtime, default=0.3, metavar="S",
                        help="budget (default: %(default)g s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="as for the sync: the replica may hold another copy")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="which write log to use, if a disk has several")
    parser.add_argument("--peer", metavar="NAME",
                        help="whose key the replica must have (default: HOST, or the only one that is known)")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    add_key_options(parser, "--server-key", "the public key of the replica")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.pairs) == (options.disk is not None):
        parser.error("give DISK, or --disk for each of several")
    check_key_options(parser, options, "--server-key")
    return options


@dataclass(frozen=True)
class Watched:
    """A disk, what its guest does, and what its replica says of itself, if there is one. `changed_bytes`: since
    the copy was complete; None if there is none."""

    size_bytes: int
    data_bytes: int
    changed_bytes: int | None
    spread: Spread
    write_rate: float
    target: Target | None

    @property
    def touch_bytes(self) -> float:
        """What a touch of a chunk writes."""
        return bytes_a_touch(self.spread, self.write_rate)

    @property
    def is_resumed(self) -> bool | None:
        """Whether the replica has the copy; None if that is not known."""
        return None if self.target is None or self.target.facts is None else self.target.facts.base != 0

    def first_bytes(self, resumed: bool) -> int | None:
        """What is to be sent to a replica that has the copy, or has not, if it does not say which. None if no
        replica can have it."""
        resumed = resumed if self.is_resumed is None else self.is_resumed
        return self.changed_bytes if resumed else self.data_bytes

    def figures(self) -> dict[str, Any]:
        """Ready for JSON."""
        target = {} if self.target is None else {"target": self.target.figures()}
        return {"size_bytes": self.size_bytes, "write_rate": self.write_rate} | target

    def __str__(self) -> str:
        text = (f"{size_text(self.size_bytes)}, {size_text(self.data_bytes)} of data; the guest writes "
                f"{size_text(self.write_rate)}/s, to {size_text(self.spread.chunks * CHUNK_BYTES)} of it lately")
        return text if self.target is None else f"{text}\n  target: {self.target}"


def watch(sources: Mapping[str, Source], targets: Mapping[str, Target], watch_s: float) -> dict[str, Watched]:
    """The disks, after so long."""
    heats = {name: Heat(-(-source.size_bytes // CHUNK_BYTES)) for name, source in sources.items()}
    interval_s = min(sample_s(heat.chunks) for heat in heats.values())
    data_bytes = {name: source.data_bytes() for name, source in sources.items()}
    for source in sources.values():
        source.touched()
    start_s = now_s = time.monotonic()
    before_bytes = {name: source.written_bytes() for name, source in sources.items()}
    while now_s - start_s < watch_s:
        time.sleep(min(interval_s, max(watch_s - (now_s - start_s), 0.0)))
        now_s = time.monotonic()
        for name, source in sources.items():
            heats[name].feed(now_s, source.touched())
    watched_s = max(now_s - start_s, 1e-9)
    return {name: Watched(source.size_bytes, data_bytes[name],
                          sum(source.dirty_bytes()) if source.bases()[0] else None, heats[name].spread(),
                          (source.written_bytes() - before_bytes[name]) / watched_s, targets.get(name))
            for name, source in sources.items()}


def foretell(disks: Collection[Watched], send_rate: float, downtime_s: float) -> dict[str, Forecast]:
    """Of a full copy of all, and of a resync if all may have a copy; if all replicas are known, of what it is."""
    known = [disk.is_resumed for disk in disks]
    spread = together((disk.spread, disk.touch_bytes) for disk in disks)
    found = {}
    for name, resumed in (("full", False), ("resync", True)):
        sizes = [size for disk in disks if (size := disk.first_bytes(resumed)) is not None]
        if len(sizes) == len(disks) and (None in known or all(known) == resumed):
            found[name] = forecast(sum(sizes), spread, CHUNK_BYTES, send_rate, FIXED_S, downtime_s)
    return found


def run(options: argparse.Namespace) -> int:
    """Ask, watch, and print; the exit code is 0 if a sync would end well."""
    pairs = [text.partition("=")[::2] for text in options.pairs] or [(options.disk, options.replica)]
    peers = {name: find_peer(endpoint, options) for name, endpoint in pairs if endpoint}
    with ExitStack() as stack:
        run_dir = options.run_dir or default_run_dir()
        sources = {name: stack.enter_context(closing(Source(run_dir, name, options.log)))
                   for name in dict(pairs)}
        targets = {name: check(sources[name], peer, options.downtime, options.overwrite)
                   for name, peer in peers.items()}
        disks = watch(sources, targets, options.watch_s)
    found = foretell(disks.values(), options.rate, options.downtime)
    if options.json:
        figures = [{"disk": name} | disk.figures() for name, disk in disks.items()]
        whole = figures[0] if len(figures) == 1 else {"disks": figures}
        print(json.dumps(whole | {name: asdict(one) for name, one in found.items()}))
    else:
        for name, disk in disks.items():
            print(f"{name}: {disk}")
        for name, one in found.items():
            what = "a full copy" if name == "full" else "a replica that has the former copy"
            of_all = ", of each" if len(disks) > 1 else ""
            print(f"  {what}{of_all}: {describe(one, options.rate, options.downtime)}")
    can_take = all(target.problem is None for target in targets.values())
    return 0 if can_take and all(one.converges for one in found.values()) else 1


def describe(found: Forecast, send_rate: float, downtime_s: float) -> str:
    """A forecast for people."""
    text = f"{size_text(found.first_bytes)} at {size_text(send_rate)}/s in {found.total_s:.0f} s, "
    if found.converges:
        return f"{text}{size_text(found.extra_bytes)} of it again, a pause of {found.pause_s * 1000:.0f} ms"
    return (f"{text}then it would not converge: the pause would stay at {found.pause_s:.1f} s, above the budget "
            f"of {downtime_s:g} s, unless the guest is slowed down")
