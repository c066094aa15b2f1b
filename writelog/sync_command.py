"""The commands of `writelog-sync` that start a sync in the background, and steer one that runs."""

from __future__ import annotations

import argparse
import errno
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tapcore.control import MAX_REPLY_BYTES, Lines, decode_reply
from tapcore.errors import ControlError
from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from writelog.sync_control import OPS, find_sync, running_syncs

START_S: Final = 30.0
"""How long a sync may take until its control socket answers."""
LOOK_S: Final = 0.05
TIMEOUT_S: Final = 30.0

HELP: Final = {
    "status": "where it is", "set": "change its limits", "pause": "send no more, until resume", "resume": "go on",
    "switch": "end a --hold: switch over as soon as the pause fits", "cancel": "end it; the guest goes on",
    "wait": "wait until it has ended; exit code 0 if the replica has confirmed its copy",
}


EXAMPLES: Final = {"set": "set vm1 --rate 200M --downtime 0.1", "switch": "switch vm1 --wait"}


def ask(path: Path, op: str, timeout_s: float | None, **params: Any) -> dict[str, Any]:
    """The result of an op. ControlError if it fails, or the sync is gone."""
    return ask_all(path, {op: params}, timeout_s)[-1]


def ask_all(path: Path, ops: Mapping[str, Mapping[str, Any]], timeout_s: float | None) -> list[dict[str, Any]]:
    """The results of several ops, on one connection: a sync that has ended meanwhile answers those that it has
    heard."""
    lines = Lines(MAX_REPLY_BYTES)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(str(path))
            client.sendall(b"".join(json.dumps({"op": op, **params}).encode() + b"\n"
                                    for op, params in ops.items()))
            results: list[dict[str, Any]] = []
            while len(results) < len(ops):
                while (line := lines.next_line()) is None:
                    data = client.recv(1 << 16)
                    if not data:
                        raise ControlError("the sync has gone without an answer", path=str(path))
                    lines.feed(data)
                results.append(decode_reply(line))
            return results
    except OSError as error:
        raise ControlError(f"cannot ask the sync: {error.strerror or error}", errno=error.errno,
                           path=str(path)) from error


def parse_arguments(op: str, arguments: Sequence[str], rate: Callable[[str], float],
                    floor: Callable[[str], float], downtime: Callable[[str], float]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"writelog-sync {op}", description=f"Of a sync that runs: {HELP[op]}.",
                                     epilog=f"example:\n  writelog-sync {EXAMPLES.get(op, op + ' vm1')}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", metavar="DISK", help="name of the disk, or of one of several with one sync")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the tapdisk's control socket is")
    parser.add_argument("--log", metavar="NAME", help="the sync of this write log, if the disk has several")
    parser.add_argument("--json", action="store_true", help="the answer as one JSON object")
    if op == "set":
        parser.add_argument("--rate", type=lambda text: 0.0 if text == "off" else rate(text), metavar="RATE",
                            help="send no faster; 'off': as fast as it goes")
        parser.add_argument("--downtime", type=downtime, metavar="S",
                            help="switch over when the pause is predicted to be this short")
        parser.add_argument("--throttle-floor", type=lambda text: floor(text) or -1.0, metavar="RATE",
                            help="slow the guest's writes down to this at the least; 'off': never")
    elif op == "switch":
        parser.add_argument("--wait", action="store_true", help="until it has ended, as `writelog-sync wait`")
    options = parser.parse_args(arguments)
    if op == "set" and {options.rate, options.downtime, options.throttle_floor} == {None}:
        parser.error("say what to set: --rate, --downtime or --throttle-floor")
    return options


def steer(op: str, options: argparse.Namespace) -> int:
    """Carry out one op; the exit code."""
    path = find_sync(options.run_dir or default_run_dir(), options.disk, options.log)
    params = {}
    if op == "set":
        names = ("rate", "downtime", "throttle_floor")
        params = {name: value for name in names if (value := getattr(options, name)) is not None}
    if op == "switch" and options.wait:
        result = ask_all(path, {"switch": {}, "wait": {}}, None)[-1]
    else:
        result = ask(path, op, None if op == "wait" else TIMEOUT_S, **params)
    print(json.dumps(result) if options.json else describe(result))
    return 0


def describe(status: dict[str, Any]) -> str:
    """A status, or a report, for people. One of several disks has a line for each, and one for all."""
    if "disks" in status:
        whole = {"disk": "all", "replica": f"{len(status['disks'])} replicas"} | status
        del whole["disks"]
        return "\n".join(describe(one) for one in (*status["disks"].values(), whole))
    if "handed_over" in status:
        outcome = "handed over" if status["handed_over"] else "the replica has a consistent copy"
        return (f"{status['disk']} -> {status['replica']}: {outcome}, {size_text(status['sent_bytes'])} sent, "
                f"pause {status['pause_s'] * 1000:.1f} ms")
    parts = [f"{status['disk']} -> {status['replica']}: {status['state']}"]
    if status["is_paused"]:
        parts.append("paused by the operator")
    parts.append(f"{size_text(status['sent_bytes'])} sent, {size_text(status['remaining_bytes'])} remaining")
    parts.append(f"the pause would take {status['pause_s']:.2f} s")
    if last := status.get("verification", {}).get("last"):
        parts.append(f"verified at {last['time']}: {last['outcome']}")
    if status["is_held"]:
        parts.append("held until `writelog-sync switch`")
    return ", ".join(parts)


def start(arguments: Sequence[str], disks: Iterable[str], options: argparse.Namespace) -> int:
    """Run a sync in the background, with the arguments of one in the foreground; returns when it answers."""
    run_dir = options.run_dir or default_run_dir()
    for disk in disks:
        if running := list(running_syncs(run_dir, disk, options.log)):
            raise ControlError(f"a sync of disk {disk!r} is running already", errno=errno.EEXIST,
                               path=str(running[0]), hint=f"writelog-sync status {disk} tells where it is")
    first = next(iter(disks))
    out = run_dir / f"sync:{first}.log"
    out.touch(0o600)
    with out.open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "writelog.sync", *arguments, "--json"],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            lines = out.read_text(errors="replace").splitlines() or [""]
            if process.returncode == 0:
                break
            raise ControlError(lines[-1].removeprefix("writelog-sync: "), path=str(out))
        try:
            find_sync(run_dir, first, options.log)
            break
        except ControlError:
            time.sleep(LOOK_S)
    else:
        raise ControlError(f"the sync does not answer within {START_S:g} s", path=str(out))
    print(f"{process.pid}  (its events: {out})")
    return 0


COMMANDS: Final = frozenset(OPS) - {"verify"}
