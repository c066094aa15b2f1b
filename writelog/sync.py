"""`writelog-sync`: replicates a live disk to a writelog-replica, and switches over to it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tapcore.errors import WritelogError
from tapcore.rundir import default_run_dir
from writelog.plan import Limits
from writelog.replica import run_command, seconds, some_seconds
from writelog.sync_link import Peer
from writelog.sync_report import Reporter
from writelog.sync_run import Interrupted, Sync
from writelog.sync_source import Source
from writelog.sync_transport import check_endpoint, load_keys, load_public_key

DESCRIPTION = """\
Copy DISK, which a tapdisk serves with a write log, to a writelog-replica while its guest writes on; when little is
left, pause the guest, send the rest, have the replica confirm it, and hand the disk over. If anything fails before
that, the guest goes on as if nothing had happened, and the log keeps what the replica lacks."""

EXAMPLES = """\
examples:
  writelog-sync vm1 tcp://127.0.0.1:5599
  writelog-sync --keep-running --verify vm1 tcp://127.0.0.1:5599     a copy, or a drill: the disk stays here
  writelog-sync --key sync.key_secret --server-key replica.key --json vm1 tcp://192.0.2.7:5599

exit codes: 0 the replica has confirmed its copy (and taken over), 1 it has not, 2 wrong usage, 130 interrupted
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", metavar="DISK", help="name of the disk, as tap-ctl list shows it")
    parser.add_argument("replica", metavar="tcp://HOST:PORT", help="where writelog-replica listens")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="which write log to use, if the disk has several")
    parser.add_argument("--downtime", type=seconds, default=0.3, metavar="S",
                        help="switch over when the pause is predicted to be this short (default: %(default)g s)")
    parser.add_argument("--max-pause", type=some_seconds, default=10.0, metavar="S",
                        help="break a switch-over off that takes longer (default: %(default)g s; --verify apart)")
    parser.add_argument("--patience", type=seconds, default=60.0, metavar="S",
                        help="give up when the predicted pause gets no shorter for so long (default: %(default)g)")
    parser.add_argument("--max-time", type=seconds, metavar="S", help="give up when it is not done after so long")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    parser.add_argument("--keep-running", action="store_true",
                        help="do all but hand over: the disk stays here, the replica keeps a consistent copy")
    parser.add_argument("--verify", action="store_true",
                        help="compare the whole disks during the pause, which makes it much longer: both are read")
    parser.add_argument("--key", type=Path, metavar="FILE",
                        help="this sync's secret key: encrypt and authenticate")
    parser.add_argument("--server-key", type=Path, metavar="FILE", help="with --key: the replica's public key")
    parser.add_argument("--insecure", action="store_true", help="send the disk to another host without keys")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: states, progress, the report")
    options = parser.parse_args(arguments)
    if (options.key is None) != (options.server_key is None):
        parser.error("--key and --server-key go together")
    return options


def run(options: argparse.Namespace) -> int:
    """Sync as the options say. WritelogError if it fails."""
    check_endpoint(options.replica, options.key is not None, options.insecure)
    keys = load_keys(options.key) if options.key else None
    server_public = load_public_key(options.server_key) if options.server_key else None
    peer = Peer(options.replica, keys, server_public, options.peer_timeout)
    limits = Limits(options.downtime, options.patience, options.max_pause, options.max_time)
    reporter = Reporter("json" if options.json else "tty" if sys.stdout.isatty() else "plain")
    source = None
    try:
        source = Source(options.run_dir or default_run_dir(), options.disk, options.log)
        sync = Sync(source, peer, limits, reporter, verify=options.verify, keep_running=options.keep_running)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(sync, "interrupted", True))
        reporter.done(sync.run())
    except Interrupted:
        reporter.failed("interrupted")
        print("writelog-sync: interrupted; the disk runs on", file=sys.stderr)
        return 130
    except WritelogError as error:
        reporter.failed(str(error))
        raise
    finally:
        reporter.close()
        if source is not None:
            source.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: run(options), "writelog-sync")


if __name__ == "__main__":
    sys.exit(main())
