"""`writelog-sync`: replicates a live disk to a writelog-replica, and switches over to it."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from tapcore.errors import WritelogError
from tapcore.params import size_bytes
from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from writelog import sync_command, sync_plan, sync_simulate, sync_verify_run
from writelog.plan import Limits
from writelog.replica import downtime, run_command, seconds, some_seconds
from writelog.sync_check import must_take
from writelog.sync_control import Wishes
from writelog.sync_disks import parse_disks
from writelog.sync_group import DiskGroup
from writelog.sync_group_report import GroupReporter
from writelog.sync_hooks import Hooks
from writelog.sync_keys import add_key_options, check_key_options, find_peer
from writelog.sync_pack import AUTO, OFF, ON
from writelog.sync_receipt import Receipt
from writelog.sync_report import Report
from writelog.sync_run import Sync
from writelog.sync_source import Source
from writelog.sync_stop import Interrupted
from writelog.sync_together import Together

MIN_RATE: Final = 64 << 10
HOW: Final = ("verify", "keep_running", "overwrite", "in_place", "epoch_s", "compress", "compare", "verify_every")
"""The options that each disk's Sync has, too."""

DESCRIPTION = """\
Copy DISK, which a tapdisk serves with a write log, to a writelog-replica while its guest writes on; when little is
left, pause the guest, send the rest, have the replica confirm it, and hand the disk over. If anything fails before
that, the guest goes on as if nothing had happened, and the log keeps what the replica lacks. Several disks of a
guest (--disk) are paused and handed over together, all or none; what their replicas hold is of one moment."""

EXAMPLES = """\
examples:
  writelog-sync vm1 tcp://192.0.2.7:5599                             after `writelog pair`, which makes the keys
  writelog-sync --keep-running --verify vm1 tcp://192.0.2.7:5599     a copy, or a drill: the disk stays here
  writelog-sync --rate 40M --max-rate 80M vm1 tcp://192.0.2.7:5599   leave room for others on the link
  writelog-sync --insecure-loopback-only vm1 tcp://127.0.0.1:5599    to another place on this machine, without keys
  writelog-sync start --hold vm1 tcp://192.0.2.7:5599                in the background, in sync, until you say
  writelog-sync switch vm1                                         so; or status, set, pause, resume, cancel, wait
  writelog-sync --overwrite --compare vm1 tcp://192.0.2.7:5599       over an old copy: what is equal stays
  writelog-sync --disk vm1=tcp://192.0.2.7:5599 --disk vm1-data=tcp://192.0.2.7:5600
                                                                     two disks with one switch-over
  writelog-sync start --hold --epoch 60 vm1 tcp://192.0.2.7:5599     and the replica has a disk of each minute
  writelog-sync plan --rate 110M vm1 tcp://192.0.2.7:5599            ask the replica, watch the guest, forecast
  writelog-sync verify vm1 tcp://192.0.2.7:5599                      is the copy good? --repair mends it
  writelog-sync verify vm1                                           the same, by a sync that runs
  writelog-sync simulate                                             what to expect, in made-up time

exit codes: 0 the replica has confirmed its copy (and taken over), 1 it has not, 2 wrong usage, 130 interrupted
"""


def rate(text: str) -> float:
    """An option's bytes a second."""
    try:
        value = size_bytes("a rate", text)
    except WritelogError:
        value = 0
    if value < MIN_RATE:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: {size_text(MIN_RATE)}/s or more, such as 40M")
    return value


def floor(text: str) -> float:
    """A rate, or 0 for 'off'."""
    return 0.0 if text == "off" else rate(text)


def moment(text: str) -> float:
    """A time of day, the next one, or a date with a time; seconds of time.time()."""
    now = datetime.now()
    try:
        if "T" in text or "-" in text:
            when = datetime.fromisoformat(text)
        else:
            clock = datetime.strptime(text, "%H:%M")
            when = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
            when += timedelta(days=when <= now)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: HH:MM, or 2026-01-31T23:05") from None
    if when.timestamp() <= now.timestamp():
        raise argparse.ArgumentTypeError(f"{text!r} has passed")
    return when.timestamp()


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true",
                        help="compare the whole disks during the pause, which makes it much longer: both are read")
    parser.add_argument("--verify-every", type=some_seconds, metavar="S",
                        help="compare both ends in the background, and again so long after that is done; "
                             "`writelog-sync status` tells what was found")
    parser.add_argument("--receipt", type=Path, metavar="FILE",
                        help="with --verify: that they are equal, and when, as JSON")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", metavar="DISK", nargs="?", help="name of the disk, as tap-ctl list shows it")
    parser.add_argument("replica", metavar="tcp://HOST:PORT", nargs="?", help="where writelog-replica listens")
    parser.add_argument("--disk", dest="pairs", action="append", default=[], metavar="NAME=tcp://HOST:PORT",
                        help="instead, once for each disk of a guest that are to switch over together; each has a "
                             "writelog-replica of its own")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="which write log to use, if a disk has several")
    parser.add_argument("--downtime", type=downtime, default=0.3, metavar="S",
                        help="switch over when the pause is predicted to be this short (default: %(default)g s)")
    parser.add_argument("--max-pause", type=some_seconds, default=10.0, metavar="S",
                        help="break a switch-over off that takes longer (default: %(default)g s; --verify apart)")
    parser.add_argument("--patience", type=seconds, default=60.0, metavar="S",
                        help="give up when the predicted pause gets no shorter for so long (default: %(default)g)")
    parser.add_argument("--rate", type=rate, metavar="RATE",
                        help="send no faster, such as 40M (bytes a second, of all disks together)")
    parser.add_argument("--max-rate", type=rate, metavar="RATE",
                        help="how far --rate may be raised, if the sync would not converge otherwise")
    parser.add_argument("--throttle-floor", type=floor, metavar="RATE",
                        help="if it still would not, slow the guest's writes down, step by step, to this at the "
                             "least, or 'off': never (default: half of what is sent)")
    parser.add_argument("--compress", choices=(AUTO, ON, OFF), default=AUTO,
                        help="auto: what becomes smaller, on a link that is slower than this processor; on: on "
                             "any link (default: %(default)s)")
    parser.add_argument("--max-time", type=seconds, metavar="S", help="give up when it is not done after so long")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    parser.add_argument("--keep-running", action="store_true",
                        help="do all but hand over: the disk stays here, the replica keeps a consistent copy")
    parser.add_argument("--hold", action="store_true",
                        help="stay in sync, and switch over when `writelog-sync switch DISK` says so")
    parser.add_argument("--at", type=moment, metavar="TIME",
                        help="stay in sync until then: HH:MM, the next time, or 2026-01-31T23:05")
    parser.add_argument("--epoch", type=some_seconds, dest="epoch_s", metavar="S", default=math.inf,
                        help="with --hold or --at: while in sync, pause the guest every S seconds for as long as "
                             "a switch-over would, so that the replica has the disk of that moment")
    parser.add_argument("--before-switch", metavar="FILE",
                        help="an executable to run before the pause, with each DISK and its replica; if it fails, "
                             "so does the sync")
    parser.add_argument("--after-switch", metavar="FILE", help="and one to run after the replicas have taken over")
    parser.add_argument("--undo-switch", metavar="FILE",
                        help="and one to run after --before-switch if the guest goes on here: the switch-over was "
                             "broken off, or it was to with --keep-running")
    parser.add_argument("--overwrite", action="store_true",
                        help="send a full copy, whatever else the replica holds; it is not kept meanwhile")
    parser.add_argument("--compare", action="store_true",
                        help="send no more than digests of what the replica has already, be it an old copy or a "
                             "template; where next to nothing is equal, extents are sent as they are")
    parser.add_argument("--in-place", action="store_true",
                        help="write over the consistent copy that the replica holds, which else is kept until "
                             "this one is complete: quicker, but if the sync breaks off there is neither")
    add_verify_options(parser)
    parser.add_argument("--peer", metavar="NAME",
                        help="whose key the replica must have, as `writelog pair list` shows it (default: HOST, "
                             "or the only one that is known)")
    add_key_options(parser, "--server-key", "the public key of the replica")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: states, progress, the report")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.pairs) == (options.replica is not None) or (options.pairs and options.disk is not None):
        parser.error("give DISK tcp://HOST:PORT, or --disk NAME=tcp://HOST:PORT for each of several")
    if options.max_rate is not None and (options.rate is None or options.max_rate < options.rate):
        parser.error("--max-rate goes with a lower --rate")
    if options.receipt is not None and (not options.verify or options.pairs):
        parser.error("--receipt goes with --verify, and with one disk")
    if options.epoch_s != math.inf and (options.pairs or not (options.hold or options.at)):
        parser.error("--epoch goes with --hold or --at, and one disk")
    check_key_options(parser, options, "--server-key")
    return options


def disks_of(options: argparse.Namespace) -> dict[str, str]:
    """The disks, and where the replica of each listens. UsageError if that makes no sense."""
    return parse_disks(options.pairs) if options.pairs else {options.disk: options.replica}


def run(options: argparse.Namespace) -> int:
    """Sync as the options say. WritelogError if it fails."""
    peers = {name: find_peer(endpoint, options) for name, endpoint in disks_of(options).items()}
    limits = Limits(options.downtime, options.patience, options.max_pause, options.max_time, options.rate,
                    options.max_rate, options.throttle_floor != 0, options.throttle_floor or None)
    wishes = Wishes(limits, options.hold or options.at is not None, options.at)
    reporter = GroupReporter("json" if options.json else "tty" if sys.stdout.isatty() else "plain")
    run_dir = options.run_dir or default_run_dir()
    hooks = Hooks(options.before_switch, options.after_switch, options.undo_switch)
    how = {name: getattr(options, name) for name in HOW}
    with ExitStack() as stack:
        stack.callback(reporter.close)
        try:
            sources = {name: stack.enter_context(closing(Source(run_dir, name, options.log))) for name in peers}
            for name, source in sources.items():
                must_take(source, peers[name], options.downtime, options.overwrite)
            sync: Sync | Together
            if len(sources) == 1:
                (name, source), = sources.items()
                sync = Sync(source, peers[name], limits, reporter, wishes=wishes, hooks=hooks, **how)
            else:
                sync = Together(DiskGroup(sources, peers, wishes, **how), run_dir, reporter, hooks,
                                keep_running=options.keep_running, verify=options.verify)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    signal.signal(number, lambda *_: setattr(sync, "interrupted", True))
            report = sync.run()
        except Interrupted:
            reporter.failed("interrupted")
            with suppress(OSError):  # its terminal may be gone
                print(f"writelog-sync: interrupted; {'the disk runs' if len(peers) == 1 else 'the disks run'} on",
                      file=sys.stderr)
            return 130
        except WritelogError as error:
            reporter.failed(str(error))
            raise
        reporter.end(report.figures(), report.lines())
    if options.receipt is not None and isinstance(report, Report):
        keep_receipt(report, options.receipt)
    return 0


def keep_receipt(report: Report, path: Path) -> None:
    """That it cannot be written does not undo what was done."""
    try:
        Receipt.of(report).write(path)
    except WritelogError as error:
        print(f"writelog-sync: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "simulate":
        return sync_simulate.main(arguments[1:])
    if arguments and arguments[0] == "start":
        options = parse_arguments(arguments[1:])
        return run_command(lambda: sync_command.start(arguments[1:], disks_of(options), options), "writelog-sync")
    if arguments and arguments[0] == "plan":
        options = sync_plan.parse_arguments(arguments[1:], rate, seconds, some_seconds, downtime)
        return run_command(lambda: sync_plan.run(options), "writelog-sync")
    if arguments and arguments[0] == "verify":
        options = sync_verify_run.parse_arguments(arguments[1:], rate, some_seconds)
        return run_command(lambda: sync_verify_run.run(options), "writelog-sync")
    if arguments and arguments[0] in sync_command.COMMANDS:
        op = arguments[0]
        options = sync_command.parse_arguments(op, arguments[1:], rate, floor, downtime)
        return run_command(lambda: sync_command.steer(op, options), "writelog-sync")
    options = parse_arguments(arguments)
    return run_command(lambda: run(options), "writelog-sync")


if __name__ == "__main__":
    sys.exit(main())
