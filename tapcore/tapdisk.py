"""`tapdisk`: serves disks over NBD, and itself to tap-ctl over a control socket."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from tapcore import logs, reach
from tapcore.errors import UsageError, WritelogError
from tapcore.rundir import default_run_dir

if TYPE_CHECKING:
    from tapcore.driver import Driver
    from tapcore.engine import Engine
    from tapcore.restart import HandedOn

CLOSE_TIMEOUT_S: Final = 60.0
"""How long a start that failed waits for what it had opened already."""

DESCRIPTION = """\
Serve disks over NBD, in the foreground, until SIGTERM or SIGINT: then the requests under way are completed and the
disks closed. A second signal ends it at once.

Each CHAIN is a disk: drivers from the guest's end down to the image, such as log:|aio:/vm/disk.img. NAME=CHAIN
names it; an '=' after the first ':' is part of the chain, so a path may contain one. A disk without a name is
called after its image's file. When all are open, one line each is printed: the name and the NBD URIs.

`tapdisk help` lists the drivers, `tapdisk help DRIVER` explains one."""

EXAMPLES = """\
where a disk is reached:
  one CHAIN       at each --nbd address, by its name or by none; without --nbd at NAME.nbd in the run directory
  several CHAINs  by their names at each --nbd address; without --nbd at tapdisk-PID.nbd in the run directory
  UNIX sockets are for their owner and root alone.

exit codes: 0 ended by a signal or by tap-ctl shutdown, 1 an error, 2 wrong usage

examples:
  tapdisk 'log:|aio:/vm/disk.img'
  tapdisk --name vm1 --nbd unix:/run/vm1.nbd --nbd tcp:127.0.0.1:10809 'log:|aio:/vm/disk.img'
  tapdisk --nbd tcp:192.0.2.7:10809 --tls-creds /etc/tapdisk/tls 'log:|aio:/vm/disk.img'
  tapdisk --daemon --nbd unix:/run/vm2.nbd 'root=log:root|aio:/vm/root.img' 'data=log:data|aio:/vm/data.img'
  qemu-system-x86_64 … -drive file=nbd+unix:///vm1?socket=/run/vm1.nbd,format=raw
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "help":
            return _help(arguments[1:])
        options = parse_arguments(arguments)
        run_dir = make_run_dir(options.run_dir)
        if options.daemon:
            return _daemon(options, run_dir)
        return _serve(options, run_dir, lambda: None)
    except UsageError as error:
        print(f"tapdisk: {error}", file=sys.stderr)
        return 2
    except (WritelogError, OSError) as error:
        print(f"tapdisk: {error}", file=sys.stderr)
        return 1


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `disks` are pairs of a name (or None) and a chain."""
    parser = argparse.ArgumentParser(prog="tapdisk", description=DESCRIPTION, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chains", nargs="*", metavar="[NAME=]CHAIN", help="a disk to serve")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the control socket is (default: "
                        "$TAPDISK_RUN_DIR, /run/tapdisk for root, else $XDG_RUNTIME_DIR/tapdisk)")
    parser.add_argument("--name", help="the name of the only disk")
    parser.add_argument("--nbd", action="append", default=[], metavar="ADDR",
                        help="serve here: unix:/path, tcp:127.0.0.1:10809, or a URI; may be given several times")
    parser.add_argument("--tls-creds", type=Path, metavar="DIR", help="TCP clients must use TLS, with a "
                        "certificate that ca-cert.pem in DIR has signed; this server's own are server-cert.pem "
                        "and server-key.pem")
    parser.add_argument("--insecure", action="store_true",
                        help="listen for other hosts without TLS: whoever reaches the port may use the disk")
    reach.add_option(parser)
    parser.add_argument("--read-only", action="store_true", help="serve all of them read-only")
    parser.add_argument("--max-retries", type=_count, default=100, metavar="N",
                        help="try a failed request again so often before the guest sees it (default: %(default)s)")
    parser.add_argument("--retry-interval", type=seconds, default=1.0, metavar="S",
                        help="wait between tries (default: %(default)g s)")
    parser.add_argument("--daemon", action="store_true", help="go into the background once the disks are served; "
                        "what it says then is in tapdisk-PID.log in the run directory")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more")
    parser.add_argument("--handed-on", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.chains and options.handed_on is None:
        parser.error("a CHAIN is needed")
    options.disks = [split_name(text) for text in options.chains]
    if options.name is not None:
        if len(options.disks) > 1 or options.disks[0][0] is not None:
            parser.error("--name is for one CHAIN without a NAME= of its own")
        options.disks = [(options.name, options.disks[0][1])]
    return options


def split_name(text: str) -> tuple[str | None, str]:
    """(name, chain) of `[NAME=]CHAIN`: the '=' counts if it stands before the first ':'."""
    match = re.match(r"([^=:|]*)=", text)
    return (match[1], text[match.end() :]) if match else (None, text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def seconds(text: str) -> float:
    """A time of a command line."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def make_run_dir(given: Path | None) -> Path:
    """The run directory, absolute, made if it is missing. UsageError if it cannot be."""
    if given is None:
        return default_run_dir().absolute()
    try:
        given.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run directory: {error.strerror}", path=str(given)) from error
    return given.absolute()


# Serving


def _serve(options: argparse.Namespace, run_dir: Path, ready: Callable[[], None]) -> int:
    """Serve until a signal or a shutdown; `ready()` is called when the disks are and their lines are printed.
    WritelogError if one cannot be opened: then nothing stays open."""
    from tapcore.driver import Env
    from tapcore.engine import Engine
    from tapcore.loop import Loop
    from tapcore.nbd.tls import load_credentials
    from tapcore.restart import execute, read
    from tapcore.workers import Workers

    handed_on = read(options.handed_on) if options.handed_on is not None else None
    tls = load_credentials(options.tls_creds) if options.tls_creds else None
    logs.begin("%(asctime)s tapdisk: %(message)s", verbose=options.verbose)
    loop = Loop()
    workers = Workers(loop)
    allowed = reach.given(options.backing_dirs, handed_on.named if handed_on else ())
    engine = Engine(Env(loop, workers, run_dir, allowed), max_retries=options.max_retries,
                    retry_interval_s=options.retry_interval, on_down=loop.stop, tls=tls,
                    allow_remote=options.insecure)

    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        loop.call_threadsafe(engine.shutdown)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        try:
            if handed_on is not None:
                _open_handed(engine, handed_on)
            else:
                _open_disks(engine, options, run_dir)
            for disk in engine.disks.values():
                print(disk.name, *engine.uris(disk))
            sys.stdout.flush()
            ready()
        except BaseException:
            engine.shutdown()
            loop.run_until(lambda: engine.is_down, CLOSE_TIMEOUT_S)
            raise
        loop.run()
    finally:
        workers.close()
        loop.close()
    if engine.handed_on is not None and not stopping:
        execute(engine.handed_on, run_dir, backing_dirs=options.backing_dirs, verbose=options.verbose,
                max_retries=options.max_retries, retry_interval_s=options.retry_interval,
                tls_creds=options.tls_creds, insecure=options.insecure)
    return 0


def _open_disks(engine: Engine, options: argparse.Namespace, run_dir: Path) -> None:
    own: Sequence[str] = options.nbd
    if len(options.disks) > 1:
        own = ()
        for address in options.nbd or [f"unix:{run_dir}/tapdisk-{os.getpid()}.nbd"]:
            engine.share(address)
    for name, chain in options.disks:
        engine.open(chain, name, read_only=options.read_only, nbd=own)
    engine.listen()


def _open_handed(engine: Engine, handed_on: HandedOn) -> None:
    """What the program served that this one follows."""
    for address, fd in handed_on.shared:
        engine.share(address, fd)
    for handed in handed_on.disks:
        disk = engine.open(handed.chain, handed.name, read_only=handed.read_only,
                           nbd=[address for address, _ in handed.nbd], listener_fds=dict(handed.nbd))
        if handed.paused and not disk.pinned:
            disk.vbd.pause(lambda: None)
            disk.pinned = True
    engine.listen()


# In the background


def _daemon(options: argparse.Namespace, run_dir: Path) -> int:
    """Serve in a process of its own session; returns when its disks are served, or with its exit code."""
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_fd)
        is_ready = os.read(read_fd, 1)
        os.close(read_fd)
        return 0 if is_ready else abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) or 1
    os.close(read_fd)
    os.setsid()
    log = run_dir / f"tapdisk-{os.getpid()}.log"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
    log_fd = os.open(log, flags, 0o600)
    try:
        return _serve(options, run_dir, lambda: _detach(log_fd, write_fd))
    finally:
        if os.fstat(log_fd).st_size == 0:
            log.unlink(missing_ok=True)


def _detach(log_fd: int, ready_fd: int) -> None:
    """Leave the terminal: errors go to the log from now on; and tell the parent that it may end."""
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, source_fd in ((0, null_fd), (1, null_fd), (2, log_fd)):
        os.dup2(source_fd, fd)
    os.close(null_fd)
    os.write(ready_fd, b"\n")
    os.close(ready_fd)


# Help


def _help(names: Sequence[str]) -> int:
    from tapcore.driver import Driver, find_driver
    from tapcore.drivers import load_all

    load_all()
    if not names:
        print("drivers; `tapdisk help DRIVER` explains one:")
        for _, kind in sorted(Driver.registry.items()):
            print(f"  {_document(kind).splitlines()[0]}")
    for name in names:
        print(_document(find_driver(name)))
    return 0


def _document(kind: type[Driver]) -> str:
    """What a driver's module says about it."""
    return (sys.modules[kind.__module__].__doc__ or kind.name).strip()


if __name__ == "__main__":
    sys.exit(main())
