"""`writelog-replica`: receives a disk from `writelog-sync`, and becomes the primary at the switch-over."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from tapcore import logs, reach
from tapcore.beside import beside
from tapcore.chain import parse
from tapcore.disk import Disk
from tapcore.driver import Env
from tapcore.drivers.log import SIDECAR_SUFFIX, Log
from tapcore.engine import NAME, NAME_HINT, Engine, default_name
from tapcore.errors import LogError, UsageError, WritelogError
from tapcore.loop import Loop
from tapcore.namelock import lock_name, unlock_name
from tapcore.nbd.server import NbdServer
from tapcore.params import size_bytes
from tapcore.restart import execute
from tapcore.tapdisk import make_run_dir
from tapcore.vbd import CLOSED, Vbd
from tapcore.workers import Workers
from writelog import replica_command
from writelog.keyring import create_keys
from writelog.logstore import forget
from writelog.plan import MIN_DOWNTIME_S
from writelog.replica_command import open_copy, open_store, recover
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
CLOSE_S: Final = 60.0
"""Longest wait for what ends or is recorded."""
MIN_OPTION_S: Final = 0.1
"""Of times that must not be 0."""

DESCRIPTION = """\
Receive a disk from writelog-sync into CHAIN, which must exist and be as large as the disk. Until the switch-over
the export's clients can connect, and their requests wait; then they are served, and the disk is one of tap-ctl's:
what is written to it is logged from then on, so that it can go on to another host, or back to where it came from,
where only what has changed is sent. One sync at a time.
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
    parser.add_argument("--name",
                        help="the disk's name, in its export and for tap-ctl (default: that of its image's file)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR",
                        help="where the control socket is, as for tapdisk")
    reach.add_option(parser)
    parser.add_argument("--discard-my-data", action="store_true",
                        help="let a sync overwrite what the image here holds, though it is a disk of its own, as "
                             "the half of a split is, or a copy of something else")
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
                                     description="Make a CURVE key pair: NAME.key (public) and NAME.key_secret.",
                                     epilog="example:\n  writelog-replica keygen /etc/writelog --name host-b",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--name", default="writelog", help="base name of the two files (default: %(default)s)")
    options = parser.parse_args(arguments)
    for path in create_keys(options.directory, options.name):
        print(path)
    return 0


COMMANDS: Final = {"keygen": keygen, "status": replica_command.status, "promote": replica_command.promote}


class Replica:
    """The process: a loop, a paused disk, its export, the replica's socket, and the engine that gets the disk when
    it is promoted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.status = 0
        self._options = options
        self._loop = Loop()
        self._workers = Workers(self._loop)
        self._env = Env(self._loop, self._workers, make_run_dir(options.run_dir),
                        reach.given(options.backing_dirs))
        self._engine = Engine(self._env, on_down=self._engine_is_down)
        self._name: str = default_name(options.chain) if options.name is None else options.name
        self._vbd = Vbd(self._env, self._name)
        self._exports = {self._name: self._vbd}
        self._nbd = NbdServer(self._env, self._exports)
        self._server: ReplicaServer | None = None
        self._lock_fd = -1
        self._unused_logs: list[tuple[str, Path | None]] = []
        """Name and side-car of the log that nobody needs unless the disk is promoted."""
        self._is_adopted = False
        """Whether the disk is the engine's."""
        self._stopping = False
        self._is_told_to_end = False
        """By a signal."""

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or with --once one sync; WritelogError if it cannot start."""
        keep_buffers()
        options = self._options
        door = open_door(options.listen, options)
        if not NAME.fullmatch(self._name):
            raise UsageError(f"{self._name!r} cannot be the name of a disk", hint=NAME_HINT)
        self._lock_fd = lock_name(self._env.run_dir, self._name)
        try:
            store = open_store(self._env, options.chain, options.state)
            if store.own and options.discard_my_data:
                store.discard()
            elif store.own:
                raise UsageError(store.own, path=store.image,
                                 hint="serve it with tapdisk; or, if it may be overwritten: --discard-my-data")
            store.claim()
            log = self._open_disk(store.image)
            copy = open_copy(self._env, self._vbd.chain.head if log is None else log.next, store, options.journal,
                             options.journal_limit)
            recover(self._loop, copy)
            export = self._nbd.listen(options.nbd) if options.nbd else ""
            self._server = ReplicaServer(self._env, self._vbd, export, keys=door.keys,
                                         authorize=door.authorize, key_source=door.source,
                                         peer_timeout_s=options.peer_timeout,
                                         on_end=self._on_end, copy=copy, log=log,
                                         may_discard=options.discard_my_data)
            endpoint = self._server.listen(options.listen)
            self._engine.listen()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            print(f"listening on {endpoint}", flush=True)
            self._loop.run()
        finally:
            self._release()
        if self._engine.handed_on is not None and not self._is_told_to_end:
            execute(self._engine.handed_on, self._env.run_dir, backing_dirs=options.backing_dirs,
                    verbose=options.verbose)
        return self.status

    def _release(self) -> None:
        """After the end, be it one in good order or not."""
        if self._server is not None and not self._stopping:
            self._server.close(lambda: None)
        self._stopping = True
        if not self._engine.is_down:
            self._engine.shutdown()
            self._loop.run_until(lambda: self._engine.is_down, CLOSE_S)
        self._nbd.close()
        if self._vbd.state != CLOSED:
            self._vbd.close(lambda: None)
            self._loop.run_until(lambda: self._vbd.state == CLOSED, CLOSE_S)
        if not self._is_adopted:
            for name, sidecar in self._unused_logs:
                with contextlib.suppress(LogError):
                    forget(self._env.run_dir, name, sidecar)
            unlock_name(self._env.run_dir, self._name, self._lock_fd)
        self._workers.close()

    def _open_disk(self, image: str | None) -> Log | None:
        """Open the disk, paused, with a log on top of it unless CHAIN has one; the log for what is written once it
        is promoted."""
        levels = parse(self._options.chain)
        has_log = any(level.driver == Log.name for level in levels)
        self._vbd.open(self._options.chain if has_log else f"{self._own_log(image)}|{self._options.chain}")
        self._vbd.pause(lambda: None)
        log = self._vbd.chain.head
        if not isinstance(log, Log) or (has_log and log.generations.base):
            return None  # the log counts for a copy of the copy: it has to hear of all that is applied
        codes: list[int] = []
        if not has_log:
            self._unused_logs.append((log.log_name, log.sidecar_path))
        log.start_over(0, codes.append)
        self._loop.run_until(lambda: bool(codes), CLOSE_S)
        if codes[0]:
            raise LogError(f"the log's side-car cannot be written: {os.strerror(codes[0])}", errno=codes[0])
        return log

    def _own_log(self, image: str | None) -> str:
        """A log that no other disk can have the name of, with its side-car where `log:` looks for it."""
        sidecar = beside(image, SIDECAR_SUFFIX) if image is not None else None
        if sidecar is None or "," in str(sidecar):
            return f"{Log.name}:{self._name}"
        with contextlib.suppress(OSError):  # the log tells what is wrong there
            sidecar.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        escaped = str(sidecar).replace("|", r"\|")
        return f"{Log.name}:{self._name},sidecar={escaped}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """End in good order; a second signal ends it at once."""
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        self._is_told_to_end = True
        self._loop.call_threadsafe(self.stop)

    def stop(self) -> None:
        """Close the socket, let what is in flight end, close the disk, leave the loop."""
        if self._stopping:
            return
        self._stopping = True
        assert self._server is not None
        self._server.close(self._close_disk)

    def _close_disk(self) -> None:
        if self._is_adopted:
            self._close_engine()
        else:
            self._vbd.close(self._close_engine)

    def _close_engine(self) -> None:
        if self._engine.is_down:
            self._loop.stop()
        else:
            self._engine.shutdown()

    def _engine_is_down(self) -> None:
        """By `tap-ctl shutdown`, or at the end."""
        if self._stopping:
            self._loop.stop()
        else:
            self.stop()

    def _on_end(self, succeeded: bool) -> None:
        assert self._server is not None
        if self._server.promoted and not self._is_adopted:
            self._is_adopted = True
            self._engine.adopt(Disk(self._vbd, self._nbd, self._exports, self._lock_fd))
        if not self._options.once or (self._server.promoted and self._options.nbd):
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
    logs.begin("writelog-replica: %(message)s", verbose=options.verbose)
    return run_command(lambda: Replica(options).run(), "writelog-replica")


if __name__ == "__main__":
    sys.exit(main())
