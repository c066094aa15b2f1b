"""`writelog-migrate`: moves a running QEMU guest, its disks included, to a replica and a QEMU on another host."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from tapcore.control import find_disk
from tapcore.errors import ReplicationError, WritelogError
from tapcore.rundir import default_run_dir
from writelog.migrate_check import (
    STOPPED,
    UNCHECKED,
    UNDER_WAY,
    capabilities_to_set,
    check_disks,
    check_memory_uri,
)
from writelog.migrate_qmp import Monitor, parse_monitor
from writelog.migrate_report import MigrationReporter
from writelog.migrate_run import MemoryMove, Migration
from writelog.migrate_there import Destination
from writelog.migrate_undo import Settings
from writelog.plan import Limits
from writelog.replica import downtime, run_command, seconds, some_seconds
from writelog.sync import floor, rate
from writelog.sync_control import Wishes
from writelog.sync_disks import parse_disks
from writelog.sync_group import DiskGroup
from writelog.sync_keys import add_key_options, check_key_options, find_peer
from writelog.sync_source import Source

DESCRIPTION = """\
Move a running QEMU guest to another host: copy its disks, which tapdisks serve with write logs, while it writes;
then its memory, by QEMU's own migration; stop it for a moment, send the disks' last round, hand them over to their
replicas, and let QEMU go on there. If anything fails before the replicas are promoted, the guest runs on here."""

EXAMPLES = """\
examples:
  on the other host, first the replica, then QEMU with the same machine, waiting:
    writelog-replica --listen tcp://192.0.2.7:5599 … --name vm1 --nbd unix:/run/vm1.nbd aio:/vm/copy.img
    qemu-system-x86_64 … -incoming tcp:192.0.2.7:4444 \\
      -drive file=nbd+unix:///vm1?socket=/run/vm1.nbd,file.reconnect-delay=60,format=raw,if=none,id=disk \\
      -device virtio-blk-pci,drive=disk,cyls=16383,heads=16,secs=63
  (without a geometry QEMU wants to read the disk when it starts, and waits: the replica serves no requests yet)

  writelog-migrate --qmp unix:/run/vm.qmp --to tcp:192.0.2.7:4444 --disk vm1=tcp://192.0.2.7:5599 …

  encrypted, and with the other QEMU's monitor (it has -qmp, and -incoming defer; both have the object tls0):
    ssh -f -N -L /run/vm-b.qmp:/run/vm.qmp 192.0.2.7
    writelog-migrate … --dest-qmp unix:/run/vm-b.qmp --tls-creds tls0

exit codes: 0 the guest runs at the destination, 1 it does not (the error says where it is), 2 wrong usage, 130
interrupted: it runs on here
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-migrate", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qmp", required=True, metavar="ADDR",
                        help="the guest's monitor, unix:/path or tcp:HOST:PORT; nothing else may use it meanwhile")
    parser.add_argument("--to", required=True, metavar="tcp:HOST:PORT",
                        help="where the other QEMU waits, which was started with -incoming")
    parser.add_argument("--disk", required=True, action="append", metavar="NAME=tcp://HOST:PORT",
                        help="a disk, and where its replica listens; once for each disk of the guest")
    parser.add_argument("--dest-qmp", metavar="ADDR",
                        help="the other QEMU's monitor: it is looked at, and told to listen after -incoming defer")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisks' control sockets are")
    parser.add_argument("--log", metavar="NAME", help="which write log to use of disks that have several")
    parser.add_argument("--downtime", type=downtime, default=0.3, metavar="S",
                        help="stop the guest when the rest of the disks is predicted to take no longer than this, "
                             "and the rest of the memory (each; default: %(default)g s)")
    parser.add_argument("--max-pause", type=some_seconds, default=10.0, metavar="S",
                        help="break a switch-over off that takes longer (default: %(default)g s)")
    parser.add_argument("--patience", type=seconds, default=60.0, metavar="S",
                        help="give up when the disks' predicted pause gets no shorter for so long, or the memory "
                             "no nearer to its end (default: %(default)g)")
    parser.add_argument("--rate", type=rate, metavar="RATE",
                        help="send the disks together no faster, such as 40M (bytes a second)")
    parser.add_argument("--max-rate", type=rate, metavar="RATE",
                        help="how far --rate may be raised, if the disks would not converge otherwise")
    parser.add_argument("--memory-rate", type=rate, metavar="RATE",
                        help="send the memory no faster (default: as QEMU's max-bandwidth is set)")
    parser.add_argument("--throttle-floor", type=floor, metavar="RATE",
                        help="slow the guest's writes down to this at the least, if the disks would not converge, "
                             "or 'off': never, nor its processors (default: half of what is sent)")
    parser.add_argument("--max-time", type=seconds, metavar="S",
                        help="give up when the disks are not handed over after so long")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="send full copies, whatever else the replicas hold")
    parser.add_argument(UNCHECKED, action="store_true",
                        help="do not compare the guest's disks with --disk: it has others, on shared storage "
                             "maybe, or QEMU knows them by other names")
    parser.add_argument("--peer", metavar="NAME",
                        help="whose key the replicas must have, as `writelog pair list` shows it (default: HOST, "
                             "or the only one that is known)")
    add_key_options(parser, "--server-key", "the public key of the replicas")
    parser.add_argument("--tls-creds", metavar="ID",
                        help="encrypt the memory: the id of a tls-creds object that both QEMUs have")
    parser.add_argument("--insecure-memory", action="store_true",
                        help="send memory without QEMU's tls-creds to another host: anyone on the way can read it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: states, progress, the report")
    options = parser.parse_args(arguments)
    if options.max_rate is not None and (options.rate is None or options.max_rate < options.rate):
        parser.error("--max-rate goes with a lower --rate")
    check_key_options(parser, options, "--server-key")
    return options


def prepare_memory(options: argparse.Namespace, monitor: Monitor) -> MemoryMove:
    """Check that QEMU can migrate; what to tell it."""
    status = monitor.call("query-migrate").get("status")
    if status in UNDER_WAY:
        fate = ", and the guest stands still" if status == STOPPED else ""
        raise ReplicationError(f"a migration of this guest is under way already ({status}){fate}",
                               hint="wait until QEMU has ended it" if status == "cancelling" else
                               "'migrate_cancel' in QEMU's monitor ends it, and the guest runs on")
    may_throttle = options.throttle_floor != 0
    capabilities = capabilities_to_set(monitor.call("query-migrate-capabilities"), may_throttle)
    parameters: dict[str, int | str] = {"downtime-limit": int(options.downtime * 1000)}
    if options.memory_rate is not None:
        parameters["max-bandwidth"] = int(options.memory_rate)
    if options.tls_creds is not None:
        parameters["tls-creds"] = options.tls_creds
    current: dict[str, int | str] = monitor.call("query-migrate-parameters")
    check_memory_uri(options.to, bool((current | parameters).get("tls-creds")) or options.insecure_memory)
    return MemoryMove(options.to, Settings(capabilities, parameters),
                      Settings({name: not state for name, state in capabilities.items()},
                               {name: current.get(name, "") for name in parameters}))


def exports(run_dir: Path, name: str) -> list[str]:
    """The URIs at which a disk is served."""
    with find_disk(run_dir, name) as control:
        return list(control.call("info", disk=name)["uris"])


def run(options: argparse.Namespace) -> int:
    """Migrate as the options say. WritelogError if it fails."""
    disks = parse_disks(options.disk)
    parse_monitor(options.qmp)
    peers = {name: find_peer(endpoint, options) for name, endpoint in disks.items()}
    limits = Limits(options.downtime, options.patience, options.max_pause, options.max_time, options.rate,
                    options.max_rate, options.throttle_floor != 0, options.throttle_floor or None)
    run_dir = options.run_dir or default_run_dir()
    reporter = MigrationReporter("json" if options.json else "tty" if sys.stdout.isatty() else "plain")
    with ExitStack() as stack:
        stack.callback(reporter.close)
        migration = None
        try:
            sources = {name: stack.enter_context(closing(Source(run_dir, name, options.log))) for name in disks}
            monitor = stack.enter_context(closing(Monitor(options.qmp)))
            if not options.no_disk_check:
                check_disks(monitor.call("query-block"), {name: exports(run_dir, name) for name in disks})
            memory_move = prepare_memory(options, monitor)
            destination = Destination(
                stack.enter_context(closing(Monitor(options.dest_qmp))) if options.dest_qmp else None)
            destination.prepare(options.to, options.tls_creds, monitor)
            was_running = bool(monitor.call("query-status")["running"])
            group = DiskGroup(sources, peers, Wishes(limits), overwrite=options.overwrite)
            migration = Migration(monitor, destination, memory_move, run_dir, group, reporter, was_running)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                    signal.signal(number, migration.interrupt)
            report = migration.run()
        except WritelogError as error:
            reporter.failed(str(error))
            if migration is not None and migration.was_interrupted:
                print(f"writelog-migrate: {error}", file=sys.stderr)
                return 130
            raise
        reporter.end(report.figures(), report.lines())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: run(options), "writelog-migrate")


if __name__ == "__main__":
    sys.exit(main())
