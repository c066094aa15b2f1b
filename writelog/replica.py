"""`writelog-replica`: receives a disk from `writelog-sync`, and becomes the primary at the switch-over."""

from __future__ import annotations

import argparse
import ctypes
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from tapcore.chain import parse
from tapcore.driver import Env, leaf_of
from tapcore.drivers.log import Log
from tapcore.errors import UsageError, WritelogError
from tapcore.loop import Loop
from tapcore.nbd.server import NbdServer
from tapcore.params import size_bytes
from tapcore.rundir import default_run_dir
from tapcore.vbd import Vbd
from tapcore.workers import Workers
from writelog import replica_command
from writelog.keyring import create_keys
from writelog.plan import MIN_DOWNTIME_S
from writelog.replica_command import open_copy, recover
from writelog.replica_copy import SUFFIX as JOURNAL_SUFFIX
from writelog.replica_server import ReplicaServer
from writelog.replica_session import CREDIT_BYTES
from writelog.replica_state import SUFFIX
from writelog.sync_keys import add_key_options, check_key_options, open_door
from writelog.wire import MAX_DATA_BYTES

MAX_OPTION_S: Final = 1_000_000
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""Of mallopt(3)."""
MIN_OPTION_S: Final = 0.1
"""Of times that must not be 0."""

DESCRIPTION = """\
Receive a disk from writelog-sync into CHAIN, which must exist and be as large as the disk. Until the switch-over
the export's clients can connect, and their requests wait; then they are served. One sync at a time.
A consistent copy stays one while it is brought up to date: what comes goes into a journal beside it, IMAGE.redo,
and is applied in one step when it is complete.
SIGTERM and SIGINT end it when the requests under way are completed; a second one at once."""

EXAMPLES = """\
examples:
  truncate -s 20G /vm/copy.img
  writelog pair listen              once: it shows a code for `writelog pair connect` on the other host
  writelog-replica --listen tcp://192.0.2.7:5599 --nbd unix:/run/copy.sock aio:/vm/copy.img

  writelog-replica status aio:/vm/copy.img      what the copy is good for
  writelog-replica promote aio:/vm/copy.img     the primary is lost: this becomes the disk

  with a key of its own instead of the host's:
  writelog-replica keygen /etc/writelog --name replica
  writelog-replica --listen tcp://192.0.2.7:5599 --key /etc/writelog/replica.key_secret \\
                   --authorized /etc/writelog/syncs.d aio:/vm/copy.img
"""


def seconds(text: str) -> float:
    """An option's time, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_OPTION_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {MAX_OPTION_S:,}")
    return value


def downtime(text: str) -> float:
    """An option's budget for a pause."""
    value = seconds(text)
    if value < MIN_DOWNTIME_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no downtime: a pause takes at least an answer of the "
                                         "replica and its flush; give 0.01 or more")
    return value


def some_seconds(text: str) -> float:
    """An option's time, more than 0."""
    value = seconds(text)
    if value < MIN_OPTION_S:
        raise argparse.ArgumentTypeError(f"{text!r} is too short: {MIN_OPTION_S} s or more")
    return value


def journal_limit(text: str) -> int:
    """An option's size in bytes."""
    try:
        return size_bytes("a size", text)
    except WritelogError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog-replica", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", metavar="CHAIN", help="where to write, such as aio:/vm/copy.img")
    parser.add_argument("--listen", required=True, metavar="tcp://HOST:PORT",
                        help="where the sync connects to; port 0 takes a free one, which is printed")
    parser.add_argument("--nbd", metavar="ADDR",
                        help="serve the disk here after the switch-over (unix:/path or tcp:127.0.0.1:10809)")
    parser.add_argument("--name", default="replica", help="the disk's name in its export (default: %(default)s)")
    add_key_options(parser, "--authorized", "the public key of the sync, or a directory of such *.key files")
    parser.add_argument("--peer-timeout", type=some_seconds, default=10.0, metavar="S",
                        help="a sync that is silent for so long is gone (default: %(default)g s)")
    parser.add_argument("--state", type=Path, metavar="FILE",
                        help="where to keep what is known of the image, so that a sync goes on after a restart "
                             f"(default: IMAGE{SUFFIX}, for an image that is a file)")
    parser.add_argument("--journal", type=Path, metavar="FILE",
                        help=f"where the journal is (default: IMAGE{JOURNAL_SUFFIX}, beside the state)")
    parser.add_argument("--journal-limit", type=journal_limit, metavar="SIZE",
                        help="how long it may become, such as 20G; a sync that needs more fails, and the copy "
                             "stays as it was (default: what is free there, less a twentieth)")
    parser.add_argument("--once", action="store_true",
                        help="exit after one sync: 0 if its copy was confirmed, 1 if not; a promoted disk "
                             "with --nbd is served until SIGTERM")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more")
    options = parser.parse_args(arguments)
    check_key_options(parser, options, "--authorized")
    return options


def keygen(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="writelog-replica keygen",
                                     description="Make a CURVE key pair: NAME.key (public) and NAME.key_secret.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--name", default="writelog", help="base name of the two files (default: %(default)s)")
    options = parser.parse_args(arguments)
    for path in create_keys(options.directory, options.name):
        print(path)
    return 0


COMMANDS: Final = {"keygen": keygen, "status": replica_command.status, "promote": replica_command.promote}


class Replica:
    """The process: a loop, a paused disk, its export and the replica's socket."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.status = 0
        self._options = options
        self._loop = Loop()
        self._workers = Workers(self._loop)
        self._env = Env(self._loop, self._workers)
        self._vbd = Vbd(self._env, options.name)
        self._nbd = NbdServer(self._env, {options.name: self._vbd})
        self._server: ReplicaServer | None = None
        self._stopping = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or with --once one sync; WritelogError if it cannot start."""
        keep_buffers()
        options = self._options
        door = open_door(options.listen, options)
        if any(level.driver == Log.name for level in parse(options.chain)):
            self._env.run_dir = default_run_dir().absolute()
        self._vbd.open(options.chain)
        self._vbd.pause(lambda: None)
        image = leaf_of(self._vbd.chain.head).path
        try:
            copy = open_copy(self._env, self._vbd, options.state, options.journal, options.journal_limit)
            if copy.state.promoted:
                raise UsageError("this image was promoted: it is the primary, not a replica", path=image,
                                 hint=f"serve it with tapdisk; or remove {copy.record} if it may be overwritten")
            recover(self._loop, copy)
            export = self._nbd.listen(options.nbd) if options.nbd else ""
            self._server = ReplicaServer(self._env, self._vbd, export, keys=door.keys,
                                         authorize=door.authorize, peer_timeout_s=options.peer_timeout,
                                         on_end=self._on_end, copy=copy)
            endpoint = self._server.listen(options.listen)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            print(f"listening on {endpoint}", flush=True)
            self._loop.run()
        finally:
            if self._server is not None and not self._stopping:
                self._server.close(lambda: None)
            self._nbd.close()
            if self._vbd.state != "closed":
                self._vbd.close(lambda: None)
            self._workers.close()
        return self.status

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End in good order; a second signal ends it at once."""
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        self._loop.call_threadsafe(self.stop)

    def stop(self) -> None:
        """Close the socket, let what is in flight end, close the disk, leave the loop."""
        if self._stopping:
            return
        self._stopping = True
        assert self._server is not None
        self._server.close(lambda: self._vbd.close(self._loop.stop))

    def _on_end(self, succeeded: bool) -> None:
        if not self._options.once:
            return
        assert self._server is not None
        if self._server.promoted and self._options.nbd:
            return
        self.status = 0 if succeeded else 1
        self._loop.call_soon(self.stop)


def keep_buffers() -> None:
    """Have malloc keep what zmq receives into, instead of giving it back to the system after each message and
    fetching it again, a page fault for every 4 KiB. Credit bounds how much that is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2 * MAX_DATA_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * CREDIT_BYTES)


def run_command(command: Callable[[], int], name: str) -> int:
    """The exit code of `command`; an error is one line on stderr, with 2 for bad usage, 130 for an interrupt that
    came before the command was ready for it, and 1 otherwise."""
    try:
        return command()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (WritelogError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return run_command(lambda: COMMANDS[arguments[0]](arguments[1:]), "writelog-replica")
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING,
                        format="writelog-replica: %(message)s")
    return run_command(lambda: Replica(options).run(), "writelog-replica")


if __name__ == "__main__":
    sys.exit(main())
