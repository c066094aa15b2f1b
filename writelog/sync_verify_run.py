"""`writelog-sync verify`: are a disk and its copy equal? Found out while the guest writes."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from tapcore.errors import ReplicationError, WritelogError
from tapcore.rundir import default_run_dir
from writelog.plan import Limits
from writelog.sync_command import TIMEOUT_S, ask
from writelog.sync_control import find_sync
from writelog.sync_keys import add_key_options, check_key_options, find_peer
from writelog.sync_link import LinkLost, Peer
from writelog.sync_receipt import DIFFERENT, Receipt
from writelog.sync_report import VERIFYING, Report, Reporter
from writelog.sync_run import Sync
from writelog.sync_source import Source
from writelog.sync_stop import Interrupted
from writelog.sync_verify import Findings, Verifier
from writelog.wire import Release, Released

EXIT_DIFFERENT: Final = 3
LOOK_S: Final = 0.2
"""How often to ask a sync how far it has come."""
SYNC_FIRST_HINT: Final = "make one first, with `writelog-sync --keep-running`"

DESCRIPTION = """\
Compare DISK with its copy at a writelog-replica while the guest writes on, by hashes: only those go over the
link. What the log has dirty the copy is known to lack, and is left out. Whatever else differs is named, to 4 KiB.
Nothing is changed at either end, unless --repair says that DISK is the good one: then what differs is sent, and
whatever else the copy lacks, in a short pause, as by `writelog-sync --keep-running`."""

EXAMPLES = """\
examples:
  writelog-sync verify vm1 tcp://192.0.2.7:5599
  writelog-sync verify --rate 50M --receipt /var/log/vm1.json vm1 tcp://192.0.2.7:5599   slowly, for the records
  writelog-sync verify --repair vm1 tcp://192.0.2.7:5599                                 the copy is the bad one
  writelog-sync verify vm1                               by the `writelog-sync start --hold` that runs

exit codes: 0 equal (now), 1 not found out, 2 wrong usage, 3 different, 130 interrupted
"""


class Verification(Sync):
    """A sync that sends nothing, but for repairs, and ends when it has `found` out. After a repair it goes on as
    one that keeps the disk here: what was sent is in the copy when that is a disk of one instant again."""

    def __init__(self, source: Source, peer: Peer, limits: Limits, reporter: Reporter, *, repair: bool = False,
                 rate: float | None = None) -> None:
        super().__init__(source, peer, limits, reporter, keep_running=True)
        self._verifier = Verifier(self._copier, is_copying=False, repair=repair, rate=rate)

    @property
    def found(self) -> Findings:
        return self._verifier.found

    def _start_over(self) -> None:
        raise ReplicationError(f"the replica at {self._peer.endpoint} holds no copy of disk {self._source.name!r} "
                               "that the write log here knows of", hint=SYNC_FIRST_HINT)

    def _wait_for_disk(self, error: WritelogError) -> None:
        raise error

    def _recover(self) -> None:
        super()._recover()
        self._verifier.lost()

    def _converge_and_switch(self) -> Report:
        verifier, talk = self._verifier, self._talk
        self._reporter.state(VERIFYING)
        while not verifier.is_done:
            self._pipeline.window_bytes = self._planner.window_bytes
            verifier.turn()
            talk.pump()
            self._reporter.tell(self._figures, lambda: str(verifier.found))
            if verifier.stalled_s > self._wishes.limits.patience_s:
                raise ReplicationError(f"the replica has compared nothing for {verifier.stalled_s:.0f} s",
                                       hint="see what its disk does, or wait longer with --patience")
        talk.pump_until(lambda: self._pipeline.is_all_sent)
        if verifier.found.repaired_bytes:
            return super()._converge_and_switch()
        self._switch_over.barrier()
        with contextlib.suppress(LinkLost, WritelogError):  # it is confirmed, whatever comes now
            talk.send(Release())
            talk.answer(Released)
        return self._finished_report()

    def _figures(self) -> dict[str, Any]:
        figures = asdict(self._verifier.found)
        del figures["differences"]
        return figures


def parse_arguments(
    arguments: Sequence[str], rate: Callable[[str], float], seconds: Callable[[str], float]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-sync verify", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", metavar="DISK", help="name of the disk, as tap-ctl list shows it")
    parser.add_argument("replica", metavar="tcp://HOST:PORT", nargs="?",
                        help="where writelog-replica listens; left out: a sync of DISK that runs does it, when "
                             "its first pass is done")
    parser.add_argument("--repair", action="store_true",
                        help="DISK is the good one: send what differs, look at it again, and bring the copy up to "
                             "date")
    parser.add_argument("--rate", type=rate, metavar="RATE", help="read no faster, such as 50M (bytes a second)")
    parser.add_argument("--receipt", type=Path, metavar="FILE",
                        help="what was found, as JSON, when it was found out")
    parser.add_argument("--patience", type=seconds, default=60.0, metavar="S",
                        help="give up when the replica compares nothing for so long (default: %(default)g s)")
    parser.add_argument("--peer-timeout", type=seconds, default=10.0, metavar="S",
                        help="a replica that is silent for so long is gone (default: %(default)g s)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="which write log to use, if the disk has several")
    parser.add_argument("--peer", metavar="NAME",
                        help="whose key the replica must have, as `writelog pair list` shows it (default: HOST, "
                             "or the only one that is known)")
    add_key_options(parser, "--server-key", "the public key of the replica")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: progress, the receipt")
    options = parser.parse_intermixed_args(arguments)
    check_key_options(parser, options, "--server-key")
    return options


def run(options: argparse.Namespace) -> int:
    """Verify as the options say; the exit code. WritelogError if it cannot be found out."""
    reporter = Reporter("json" if options.json else "tty" if sys.stdout.isatty() else "plain")
    try:
        receipt = verify_alone(options, reporter) if options.replica else have_verified(options, reporter)
        reporter.end(receipt.figures(), receipt.lines())
        if options.receipt is not None:
            receipt.write(options.receipt)
    except Interrupted:
        reporter.failed("interrupted")
        print("writelog-sync: interrupted", file=sys.stderr)
        return 130
    except WritelogError as error:
        reporter.failed(str(error))
        raise
    finally:
        reporter.close()
    return EXIT_DIFFERENT if receipt.outcome == DIFFERENT else 0


def verify_alone(options: argparse.Namespace, reporter: Reporter) -> Receipt:
    """Over a connection of its own."""
    peer = find_peer(options.replica, options)
    with closing(Source(options.run_dir or default_run_dir(), options.disk, options.log)) as source:
        verification = Verification(source, peer, Limits(patience_s=options.patience), reporter,
                                    repair=options.repair, rate=options.rate)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(verification, "interrupted", True))
        report = verification.run()
        return Receipt.of(report, verification.found)


def have_verified(options: argparse.Namespace, reporter: Reporter) -> Receipt:
    """By the sync of the disk that runs. ControlError if there is none."""
    path = find_sync(options.run_dir or default_run_dir(), options.disk, options.log)

    def status() -> dict[str, Any]:
        whole = ask(path, "status", TIMEOUT_S)
        found: dict[str, Any] = whole.get("disks", {}).get(options.disk, whole)
        return found

    before = status()["verification"]
    ask(path, "verify", TIMEOUT_S, repair=options.repair, rate=options.rate)
    wanted = before["ended"] + (1 if before["running"] is None else 2)
    while (now := status())["verification"]["ended"] < wanted:
        reporter.state(VERIFYING if now["verification"]["running"] else now["state"])
        if running := now["verification"]["running"]:
            reporter.tell(partial(dict, running), lambda: str(Findings(**running)))
        time.sleep(LOOK_S)
    last = now["verification"]["last"]
    names = ("outcome", "time", "left_out_bytes", "differing_bytes", "repaired_bytes", "differences")
    return Receipt(now["disk"], now["replica"], last["size_bytes"], now["base"], now["session"], "",
                   **{name: last[name] for name in names})
