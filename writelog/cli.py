"""writelog-client: a disk's write log from the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from bitarray import bitarray

from tapcore.errors import LogError, UsageError, WritelogError
from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from writelog.client import DEFAULT_TIMEOUT_S, LogClient
from writelog.logstream import StreamInfo, write_stream
from writelog.shm import socket_path

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_CLEAN = 3
"""Nothing is dirty. 2 is argparse's, for a wrong command line."""

Command = Callable[[LogClient, argparse.Namespace], int]

SHADES = " ░▒▓█"
DEFAULT_COLUMNS = 64
PICTURE_ROWS = 16

EXAMPLES = """
LOG is the name of a log (the image's file name, or what log:NAME says), or the path of its control socket; it may
be left out when there is only one.

exit status:
  0   done; for peek, get and read: something was dirty
  1   an error
  2   a wrong command line
  3   peek, get, read: nothing was dirty

examples:
  writelog-client stat disk.img
  writelog-client peek disk.img --picture
  writelog-client get disk.img --out copy.img     bring an old copy up to date, and forget what is in it
  writelog-client read disk.img --out - | ssh backup 'cat > disk.changes'
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        with LogClient(_find_log(options), options.timeout) as log:
            command: Command = options.command
            status = command(log, options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (WritelogError, OSError) as error:
        print(f"writelog-client: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="writelog-client", description="Look at, fetch and clear what was written to a disk.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="where control sockets are (default: $TAPDISK_RUN_DIR, "
                        "/run/tapdisk for root, else $XDG_RUNTIME_DIR/tapdisk)")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS",
                        help="how long to wait for the server (default: %(default)g)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("log", nargs="?", metavar="LOG")
        sub.set_defaults(command=command)
        return sub

    peek = add("peek", _peek, "Show the dirty extents; nothing changes.")
    show = peek.add_mutually_exclusive_group()
    show.add_argument("--json", action="store_true", help="as JSON")
    show.add_argument("--picture", action="store_true", help="draw the disk")
    get = add("get", _get, "Show the dirty extents, or write their data to a file, and take them from the log.")
    get.add_argument("--json", action="store_true", help="as JSON")
    get.add_argument("--out", type=Path, metavar="FILE", help="write the data to FILE, each extent at its own "
                     "offset; the log forgets them when the file is on stable storage")
    add("clear", _clear, "Forget all dirty extents, unseen.")
    figures = add("stat", _stat, "Show the log's figures.")
    figures.add_argument("--json", action="store_true", help="as JSON")
    read = add("read", _read, "Write the dirty extents' data as a stream (writelog.logstream); nothing changes.")
    read.add_argument("--out", required=True, metavar="FILE", help="a file, or - for standard output")
    return parser


def _find_log(options: argparse.Namespace) -> Path:
    """The control socket that the command line means."""
    if options.log is not None and "/" in options.log:
        return Path(options.log)
    run_dir: Path = options.run_dir or default_run_dir()
    if options.log is not None:
        return socket_path(run_dir, options.log)
    found = sorted(run_dir.glob("log__*.ctl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError("no log is served here", path=str(run_dir), hint="name its socket, or a --run-dir")
    names = ", ".join(path.name.removeprefix("log__").removesuffix(".ctl") for path in found)
    raise UsageError(f"several logs are served in {run_dir}", hint=f"name one of {names}")


# The commands

def _peek(log: LogClient, options: argparse.Namespace) -> int:
    if options.picture:
        bits = log.peek_bitmap()
        _print_picture(log, bits)
        return EXIT_OK if bits.any() else EXIT_CLEAN
    return _print_extents(log, _joined(log.peek()), options.json)


def _get(log: LogClient, options: argparse.Namespace) -> int:
    lease, extents = _take_all(log)
    if options.out is None:
        status = _print_extents(log, iter(extents), options.json)
        sys.stdout.flush()
    else:
        _write_at_offsets(log, options.out, extents)
        status = _print_total(extents, f"written to {options.out}", options.json)
    log.commit(lease)
    return status


def _clear(log: LogClient, options: argparse.Namespace) -> int:
    log.clear()
    return EXIT_OK


def _stat(log: LogClient, options: argparse.Namespace) -> int:
    figures = log.stat()
    if options.json:
        print(json.dumps(asdict(figures) | {"size_bytes": log.size_bytes}))
        return EXIT_OK
    block = figures.granularity_bytes
    print(f"disk         {size_text(log.size_bytes)} ({figures.sectors} sectors)")
    print(f"granularity  {size_text(block)}")
    print(f"dirty        {size_text(figures.dirty_blocks * block)} ({figures.dirty_blocks} blocks)")
    print(f"leased       {size_text(figures.leased_blocks * block)} ({figures.leased_blocks} blocks, "
          f"{figures.leases} leases)")
    print(f"in flight    {figures.in_flight} writes")
    print(f"clients      {figures.clients}")
    print(f"generation   {figures.generation:016x}")
    print(f"current      {figures.current:016x}")
    print(f"base         {figures.base:016x}")
    print(f"former       {figures.former:016x}")
    return EXIT_OK


def _read(log: LogClient, options: argparse.Namespace) -> int:
    extents = list(_joined(log.peek()))
    info = StreamInfo(log.granularity_bytes, log.size_bytes, log.stat().generation)
    if options.out == "-":
        write_stream(sys.stdout.buffer, info, log.read_extents(extents))
        sys.stdout.buffer.flush()
    else:
        path = Path(options.out)
        with path.open("wb") as out:
            write_stream(out, info, log.read_extents(extents))
            _make_durable(out, path)
    return EXIT_OK if extents else EXIT_CLEAN


def _take_all(log: LogClient) -> tuple[int, list[tuple[int, int]]]:
    """Everything that can be taken, in one lease."""
    taken = log.get()
    extents = taken.extents
    while taken.next_offset is not None:
        taken = log.get(taken.lease, taken.next_offset)
        extents += taken.extents
    return taken.lease, list(_joined(iter(extents)))


def _write_at_offsets(log: LogClient, path: Path, extents: list[tuple[int, int]]) -> None:
    """Write the extents' data into the file at `path` where it is on the disk, durably. A regular file becomes as
    long as the disk; what it has elsewhere stays."""
    path.touch(mode=0o600)
    with path.open("r+b", buffering=0) as out:
        status = os.fstat(out.fileno())
        if stat.S_ISREG(status.st_mode):
            if status.st_size > log.size_bytes:
                raise LogError("the file is longer than the disk", path=str(path),
                               hint="is it another disk's copy?")
            out.truncate(log.size_bytes)
        for offset, data in log.read_extents(extents):
            while data:
                written = os.pwrite(out.fileno(), data, offset)
                offset += written
                data = data[written:]
        _make_durable(out, path)


def _make_durable(out: BinaryIO | FileIO, path: Path) -> None:
    """See a file, its name included, or a block device onto stable storage; a pipe has none."""
    out.flush()
    mode = os.fstat(out.fileno()).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        os.fsync(out.fileno())
    if stat.S_ISREG(mode):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# Output

def _joined(extents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The extents with adjacent ones as one."""
    last_offset = last_length = 0
    for offset, length in extents:
        if last_length and offset == last_offset + last_length:
            last_length += length
            continue
        if last_length:
            yield last_offset, last_length
        last_offset, last_length = offset, length
    if last_length:
        yield last_offset, last_length


def _print_extents(log: LogClient, extents: Iterator[tuple[int, int]], as_json: bool) -> int:
    if as_json:
        listed = [{"offset": offset, "length": length} for offset, length in extents]
        print(json.dumps({"size_bytes": log.size_bytes, "granularity_bytes": log.granularity_bytes,
                          "dirty_bytes": sum(extent["length"] for extent in listed), "extents": listed}))
        return EXIT_OK if listed else EXIT_CLEAN
    count = total = 0
    for offset, length in extents:
        if count == 0:
            print(f"{'offset':>16} {'length':>16}")
        print(f"{offset:16} {length:16}")
        count += 1
        total += length
    print(f"{count} extents, {size_text(total)} of {size_text(log.size_bytes)}")
    return EXIT_OK if count else EXIT_CLEAN


def _print_total(extents: list[tuple[int, int]], what: str, as_json: bool) -> int:
    total = sum(length for _, length in extents)
    if as_json:
        print(json.dumps({"extents": len(extents), "bytes": total}))
    else:
        print(f"{len(extents)} extents, {size_text(total)}, {what}")
    return EXIT_OK if extents else EXIT_CLEAN


def picture(bits: bitarray, columns: int, rows: int) -> list[str]:
    """The bits as lines of cells, each from ' ' (all clean) to '█' (all dirty); any dirt shows."""
    cells = max(1, min(columns * rows, len(bits)))
    text = ""
    for cell in range(cells):
        first, stop = cell * len(bits) // cells, (cell + 1) * len(bits) // cells
        dirty = bits.count(1, first, stop)
        text += SHADES[-(-dirty * (len(SHADES) - 1) // max(1, stop - first))]
    return [text[start : start + columns] for start in range(0, cells, columns)]


def _print_picture(log: LogClient, bits: bitarray) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    columns = min(DEFAULT_COLUMNS, max(8, console.width - 4))
    lines = picture(bits, columns, PICTURE_ROWS)
    per_cell = log.size_bytes / max(1, sum(len(line) for line in lines))
    dirty = bits.count() * log.granularity_bytes
    console.print(Panel("\n".join(line.ljust(columns) for line in lines), title=Path(log.path).name, expand=False))
    console.print(Text(f"one cell is {size_text(int(per_cell))}; "
                       f"{size_text(dirty)} of {size_text(log.size_bytes)} dirty"))


if __name__ == "__main__":
    sys.exit(main())
