"""`tap-ctl`: looks at the disks that tapdisks serve, and works on them, over their control sockets."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final

from tapcore.control import ControlClient, find_disk, processes
from tapcore.errors import ControlError, UsageError, WritelogError
from tapcore.params import size_bytes
from tapcore.request import STATUS_HOLE, STATUS_ZERO
from tapcore.rundir import default_run_dir
from tapcore.tapdisk import seconds
from tapcore.text import size_text

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S: Final = 60.0
LOOK_INTERVAL_S: Final = 0.1
"""Between looks at a job that is waited for."""
RESTART_POLL_S: Final = 0.01
"""Between looks whether a tapdisk is there again."""

EXAMPLES = """\
DISK is a name as `tap-ctl list` shows it. Give paths in a CHAIN or an address in full: the tapdisk has its own
working directory.

exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage

examples:
  tap-ctl spawn 'log:|aio:/vm/disk.img'            a tapdisk in the background; its options come after spawn
  tap-ctl list
  tap-ctl --json info disk.img
  tap-ctl pause disk.img                           the guest's requests wait; none fails
  tap-ctl unpause disk.img --chain 'log:|aio:/vm/moved.img'
  tap-ctl map disk.img
  tap-ctl snapshot disk.img /vm/top.qcow2          from now on writes go there
  tap-ctl commit disk.img --rate 100M              they go into the image below; the disk goes on with that
  tap-ctl stream disk.img                          the top image gets all that is only in those below
  tap-ctl close disk.img
  tap-ctl restart disk.img                         with the program that is installed now, under its guests
  tap-ctl shutdown 1234
"""

Command = Callable[[argparse.Namespace], None]
"""Raises WritelogError, or sets the `status` of its options, if it fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    logging.basicConfig(format="tap-ctl: %(message)s", level=logging.WARNING)
    try:
        options.run_dir = (options.run_dir or default_run_dir()).absolute()
        command: Command = options.command
        command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"tap-ctl: {error}", file=sys.stderr)
        return 2
    except (WritelogError, OSError) as error:
        print(f"tap-ctl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    return int(options.status)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    everywhere = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    everywhere.add_argument("--run-dir", type=Path, metavar="DIR", help="where the control sockets are (default: "
                            "$TAPDISK_RUN_DIR, /run/tapdisk for root, else $XDG_RUNTIME_DIR/tapdisk)")
    everywhere.add_argument("--json", action="store_true", help="print JSON")
    everywhere.add_argument("--timeout", type=seconds, metavar="S",
                            help=f"how long to wait for an answer (default: {DEFAULT_TIMEOUT_S:g} s)")
    parser = argparse.ArgumentParser(prog="tap-ctl", description="Look at disks and work on them.",
                                     epilog=EXAMPLES, parents=[everywhere],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[everywhere], epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(command=command)
        return sub

    def add_for_disk(name: str, command: Command, text: str, nargs: str | None = None) -> argparse.ArgumentParser:
        sub = add(name, command, text)
        sub.add_argument("disk", metavar="DISK", nargs=nargs)
        return sub

    add("list", _list, "Show every disk.")
    opening = add("open", _open, "Open a disk in a tapdisk that runs.")
    opening.add_argument("chain", metavar="CHAIN")
    opening.add_argument("--pid", type=int, help="in which tapdisk, if several run")
    opening.add_argument("--name", help="the disk's name (default: that of the image's file)")
    opening.add_argument("--nbd", action="append", metavar="ADDR",
                         help="serve this disk alone here: unix:/path, tcp:127.0.0.1:10809, or a URI; may be "
                         "repeated")
    opening.add_argument("--read-only", action="store_true")
    closing = add_for_disk("close", _close, "Drain a disk, drop its clients and close it.")
    closing.add_argument("--forget", action="store_true", help="remove its write logs: what they know is lost")
    add_for_disk("pause", _pause, "Hold a disk's requests back; returns when none is under way.")
    unpause = add_for_disk("unpause", _unpause, "Let a paused disk go on.")
    unpause.add_argument("--chain", help="with this chain instead of the former one")
    unpause.add_argument("--force", action="store_true",
                         help="also if it was handed over, or a program holds it (which fails then)")
    add_for_disk("stats", _stats, "Show counters and latencies.", nargs="?")
    add_for_disk("info", _info, "Show all about a disk.")
    mapping = add_for_disk("map", _map, "Show which parts of a disk are data, zeroes and holes.")
    mapping.add_argument("--offset", type=int, default=0, metavar="BYTES")
    mapping.add_argument("--length", type=int, metavar="BYTES")
    _add_jobs(add_for_disk)
    add("spawn", _spawn, "Start a tapdisk in the background: give it CHAINs and options as to tapdisk.")
    ending = add("shutdown", _shutdown, "Close every disk of a tapdisk and end it.")
    ending.add_argument("pid", metavar="PID", type=int, nargs="?", help="which, if several run")
    restarting = add("restart", _restart, "Have a tapdisk go on as the program that is installed now, with the "
                     "same pid, disks and addresses: its disks are closed and opened again, their logs go on. NBD "
                     "clients have to connect again, as QEMU's do with reconnect-delay; their requests wait.")
    restarting.add_argument("which", metavar="DISK|PID", nargs="?", help="the one with this disk, or this pid, if "
                            "several run")
    defaults = argparse.Namespace(run_dir=None, json=False, timeout=DEFAULT_TIMEOUT_S, status=0)
    options, rest = parser.parse_known_args(arguments, defaults)
    options.for_tapdisk = rest
    if rest and options.command is not _spawn:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _add_jobs(add_for_disk: Callable[..., argparse.ArgumentParser]) -> None:
    taking = add_for_disk("snapshot", _snapshot, "Put a new, empty overlay on top of the image of a disk that "
                          "runs. From then on open the overlay, and nothing that is below it.")
    taking.add_argument("path", metavar="PATH", help="the overlay's file, which must not exist")
    taking.add_argument("--format", default="qcow2", help="qcow2 (the default), qcow or vhd")
    taking.add_argument("--option", action="append", metavar="KEY=VALUE", dest="image_options",
                        help="of the new image; may be repeated")
    committing = add_for_disk("commit", _begin_job, "Move what the top image holds into its parent, and let the "
                              "disk go on with the parent. After a crash the top image is the one to open. "
                              "Other overlays of the parent become useless.")
    streaming = add_for_disk("stream", _begin_job, "Copy what only the parents hold into the top image, and let "
                             "it stand alone.")
    streaming.add_argument("--base", metavar="PATH", help="a parent that is to stay, with all that is below it")
    for sub, op in ((committing, "commit"), (streaming, "stream")):
        sub.set_defaults(op=op, base=None)
        sub.add_argument("--rate", metavar="BYTES", help="at most so much a second: 50M")
        sub.add_argument("--no-wait", action="store_true", help="do not wait for its end: see tap-ctl jobs")
    add_for_disk("cancel", _cancel, "End the job of a disk; its chain stays what it was.")
    add_for_disk("jobs", _jobs, "Show the last job of a disk, or of each.", nargs="?")


# Commands


def _call(options: argparse.Namespace, op: str, **params: Any) -> dict[str, Any]:
    """The result of an op on the disk `options.disk`."""
    with find_disk(options.run_dir, options.disk, options.timeout) as client:
        return client.call(op, disk=options.disk, **params)


def _tapdisk(options: argparse.Namespace) -> ControlClient:
    """The tapdisk `options.pid`, or the only one."""
    running = processes(options.run_dir)
    found = [process for process in running if options.pid in (None, process.pid)]
    if not running:
        raise ControlError(f"no tapdisk runs in {options.run_dir}", hint="start one: tap-ctl spawn CHAIN")
    if len(found) != 1:
        pids = ", ".join(str(process.pid) for process in running)
        what = f"no tapdisk {options.pid} runs" if options.pid else f"{len(running)} tapdisks run"
        raise ControlError(f"{what} in {options.run_dir}", hint=f"choose one by its pid: {pids}")
    return ControlClient(found[0].path, options.timeout)


def _ask_all(options: argparse.Namespace, op: str) -> list[dict[str, Any]]:
    """The results of every tapdisk. Those that do not answer are reported, and make the exit code 1."""
    results = []
    silent = []
    for process in processes(options.run_dir):
        try:
            with ControlClient(process.path, options.timeout) as client:
                results.append(client.call(op))
        except ControlError as error:
            logger.warning("%s", error)
            silent.append(process.pid)
    options.status = 1 if silent else 0
    return results


def _list(options: argparse.Namespace) -> None:
    tapdisks = _ask_all(options, "list")
    if options.json:
        _print_json({"tapdisks": tapdisks})
        return
    rows = []
    for tapdisk in tapdisks:
        pid = str(tapdisk["pid"])
        for disk in tapdisk["disks"]:
            rows.append([disk["name"], pid, _state(disk), size_text(disk["size"]), str(disk["clients"]),
                         disk["chain"], " ".join(disk["uris"])])
        if not tapdisk["disks"]:
            rows.append(["-", pid, "no disk", "", "", "", ""])
    _print_table(["NAME", ">PID", "STATE", ">SIZE", ">CLIENTS", "CHAIN", "NBD"], rows)


def _state(disk: dict[str, Any]) -> str:
    parts = [disk["state"], "read-only" if disk["read_only"] else None, disk["fenced"]]
    return ", ".join(part for part in parts if part)


def _open(options: argparse.Namespace) -> None:
    with _tapdisk(options) as client:
        disk = client.call("open", chain=options.chain, name=options.name, nbd=options.nbd,
                           read_only=options.read_only)
    if options.json:
        _print_json(disk)
    else:
        print(disk["name"], *disk["uris"])


def _close(options: argparse.Namespace) -> None:
    _print_result(options, _call(options, "close", forget=options.forget), f"{options.disk} is closed")


def _pause(options: argparse.Namespace) -> None:
    result = _call(options, "pause")
    _print_result(options, result, f"{options.disk} is {result['state']}")


def _unpause(options: argparse.Namespace) -> None:
    result = _call(options, "unpause", chain=options.chain, force=options.force)
    _print_result(options, result, f"{options.disk} is {result['state']}")


def _info(options: argparse.Namespace) -> None:
    disk = _call(options, "info")
    if options.json:
        _print_json(disk)
        return
    for key, value in disk.items():
        if key == "size":
            text = f"{value} ({size_text(value)})"
        elif key == "logs":
            text = ", ".join(f"{log['name']} at {log['socket']} (side-car {log['sidecar'] or 'none'}, "
                             f"current {log['current']}, base {log['base']})" for log in value)
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        else:
            text = "" if value is None else str(value)
        print(f"{key.replace('_', ' '):14}{text or '-'}")


def _stats(options: argparse.Namespace) -> None:
    if options.disk is None:
        disks = {name: stats for answer in _ask_all(options, "stats") for name, stats in answer["disks"].items()}
    else:
        disks = _call(options, "stats")["disks"]
    if options.json:
        _print_json({"disks": disks})
        return
    rows = []
    for name, stats in disks.items():
        for op, figures in stats["ops"].items():
            if figures["requests"] or figures["errors"]:
                latencies = [f"{figures['latency_us'][key]:.0f}" for key in ("p50", "p99", "p99.9")]
                rows.append([name, op, str(figures["requests"]), size_text(figures["bytes"]),
                             str(figures["errors"]), *latencies])
    _print_table(["NAME", "OP", ">REQUESTS", ">BYTES", ">ERRORS", ">P50 µs", ">P99 µs", ">P99.9 µs"], rows)
    counters = ("in_flight", "waiting", "retries", "merged", "stalls")
    _print_table(["NAME", "STATE", *(f">{key.replace('_', ' ').upper()}" for key in counters)],
                 [[name, stats["state"], *(str(stats[key]) for key in counters)] for name, stats in disks.items()])
    for name, stats in disks.items():
        for driver, figures in stats["drivers"].items():
            print(f"{name}, {driver}: {', '.join(f'{count} {what}' for what, count in figures.items())}")


def _map(options: argparse.Namespace) -> None:
    stop = None if options.length is None else options.offset + options.length
    offset: int | None = options.offset
    listed = []
    if not options.json:
        print(f"{'OFFSET':>16} {'LENGTH':>16}  STATE")
    with find_disk(options.run_dir, options.disk, options.timeout) as client:
        while offset is not None:
            length = None if stop is None else stop - offset
            answer = client.call("map", disk=options.disk, offset=offset, length=length)
            for start, size, flags in answer["extents"]:
                if options.json:
                    listed.append({"offset": start, "length": size, "hole": bool(flags & STATUS_HOLE),
                                   "zero": bool(flags & STATUS_ZERO)})
                else:
                    names = [name for bit, name in ((STATUS_HOLE, "hole"), (STATUS_ZERO, "zero")) if flags & bit]
                    print(f"{start:16} {size:16}  {', '.join(names) or 'data'}")
            offset = answer["next"]
    if options.json:
        _print_json({"extents": listed})


def _snapshot(options: argparse.Namespace) -> None:
    with find_disk(options.run_dir, options.disk, options.timeout) as client:
        result = client.call("snapshot", disk=options.disk, path=str(Path(options.path).absolute()),
                             format=options.format, options=options.image_options)
    _print_result(options, result, f"{options.disk} was paused for {result['pause_ms']} ms; its chain is "
                  f"{result['chain']}")


def _begin_job(options: argparse.Namespace) -> None:
    params: dict[str, Any] = {"rate": None if options.rate is None else size_bytes("--rate", options.rate)}
    if options.base is not None:
        params["base"] = str(Path(options.base).absolute())
    with find_disk(options.run_dir, options.disk, options.timeout) as client:
        job = client.call(options.op, disk=options.disk, **params)["job"]
        while job["state"] == "running" and not options.no_wait:
            time.sleep(LOOK_INTERVAL_S)
            (job,) = client.call("jobs", disk=options.disk)["jobs"]
    if job["state"] not in ("running", "done"):
        raise ControlError(f"{options.op} {job['state']}: {job['error']}")
    text = f"{options.disk} was paused for {job['pause_ms']} ms; its chain is {job.get('chain')}"
    _print_result(options, job, f"{options.op} has begun: tap-ctl jobs" if options.no_wait else text)


def _cancel(options: argparse.Namespace) -> None:
    result = _call(options, "cancel")
    _print_result(options, result, f"{result['job']['kind']} of {options.disk}: {result['job']['state']}")


def _jobs(options: argparse.Namespace) -> None:
    if options.disk is None:
        jobs = [job for answer in _ask_all(options, "jobs") for job in answer["jobs"]]
    else:
        jobs = _call(options, "jobs")["jobs"]
    if options.json:
        _print_json({"jobs": jobs})
        return
    rows = []
    for job in jobs:
        total = job.get("total_bytes")
        progress = f"{100 * job['done_bytes'] / total:.0f} %" if total else ""
        rows.append([job["disk"], job["kind"], job["state"], progress, size_text(job.get("copied_bytes", 0)),
                     f"{job['seconds']:.1f}", f"{job['pause_ms']:.1f}", job["error"] or job["phase"] or ""])
    _print_table(["DISK", "JOB", "STATE", ">SEEN", ">COPIED", ">SECONDS", ">PAUSE ms", "PHASE"], rows)


def _spawn(options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "tapcore.tapdisk", "--daemon", "--run-dir", str(options.run_dir)]
    spawned = subprocess.run([*command, *options.for_tapdisk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             text=True, check=False)
    options.status = spawned.returncode
    if options.status or not options.json:
        print(spawned.stdout, end="")
        return
    disks = []
    for line in spawned.stdout.splitlines():
        options.disk = line.split()[0]
        disks.append(_call(options, "info"))
    _print_json({"disks": disks})


def _shutdown(options: argparse.Namespace) -> None:
    with _tapdisk(options) as client:
        result = client.call("shutdown")
    _print_result(options, result, f"tapdisk {result['pid']} has closed its disks and ends")


def _restart(options: argparse.Namespace) -> None:
    # A program that cannot even begin is found out about while the old one still serves.
    check = subprocess.run([sys.executable, "-m", "tapcore.tapdisk", "help"], stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, check=False, timeout=options.timeout)
    if check.returncode:
        raise ControlError(f"the tapdisk that is installed now does not work: {check.stderr.strip()[-400:]}",
                           hint="nothing was done")
    which = options.which
    options.pid = int(which) if which is not None and which.isdecimal() else None
    is_named = which is not None and options.pid is None
    with find_disk(options.run_dir, which, options.timeout) if is_named else _tapdisk(options) as client:
        before = client.call("list")
        start_s = time.monotonic()
        pid = client.call("restart")["pid"]
        path = client.path
    deadline_s = start_s + options.timeout
    while True:
        try:
            with ControlClient(path, options.timeout) as client:
                after = client.call("list")
            break
        except ControlError as error:
            if not _is_running(pid) or time.monotonic() > deadline_s:
                chains = " ".join(f"'{disk['name']}={disk['chain']}'" for disk in before["disks"])
                raise ControlError(
                    f"tapdisk {pid} closed its disks and did not open them again: {error.message}",
                    hint=f"it says why where its errors go; start one with tapdisk {chains}") from error
            time.sleep(RESTART_POLL_S)
    took_ms = (time.monotonic() - start_s) * 1e3
    _print_result(options, after | {"took_ms": took_ms},
                  f"tapdisk {pid} serves {', '.join(disk['name'] for disk in after['disks'])} again, after "
                  f"{took_ms:.0f} ms")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Printing


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _print_result(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    if options.json:
        _print_json(result)
    else:
        print(text)


def _print_table(headings: list[str], rows: list[list[str]]) -> None:
    """A heading that begins with '>' is of a column of numbers."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold")
        for heading in headings:
            table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left",
                             overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console(highlight=False).print(table)
        return
    lines = [[heading.removeprefix(">") for heading in headings], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [text.rjust(width) if heading.startswith(">") else text.ljust(width)
                 for text, width, heading in zip(line, widths, headings, strict=True)]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
