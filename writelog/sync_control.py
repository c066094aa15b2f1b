"""The control socket of a running sync, `sync:DISK:LOG.ctl` in the run directory: JSON lines, as tapdisk's. A sync
of several disks listens at the name of each.

    {"op": "status"}   {"ok": true, "result": {"state": "converging", "remaining_bytes": 5242880, …}}

| op     | parameters                       | what it does; its result                                            |
| ------ | -------------------------------- | ------------------------------------------------------------------- |
| status |                                  | where the sync is: state, progress, limits                          |
| set    | rate, downtime, throttle_floor   | changes limits (rate 0: none; throttle_floor 0: half of what is     |
|        |                                  | sent, below 0: the guest is never slowed down); as status           |
| pause  |                                  | sends no more, until `resume`; the log goes on; as status           |
| resume |                                  | as status                                                           |
| switch |                                  | a held sync switches over as soon as the pause fits; as status      |
| verify | repair, rate                    | compares both ends, when the first pass is done; rate in bytes a     |
|        |                                  | second; as status, where `verification` tells what comes of it      |
| cancel |                                  | ends the sync; the guest goes on; as status                         |
| wait   |                                  | is answered when the sync has ended: its report, or its error       |

The sync looks at the socket in between its other work, several times a second.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tapcore import unixsocket
from tapcore.control import Lines, encode_error, encode_result
from tapcore.errors import ControlError, ProtocolError, WritelogError
from writelog.plan import MIN_DOWNTIME_S, Limits

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 4096
MAX_CLIENTS: Final = 16
TURN_S: Final = 0.05
SEND_TIMEOUT_S: Final = 0.5
OPS: Final = ("status", "set", "pause", "resume", "switch", "verify", "cancel", "wait")
SETTINGS: Final = ("rate", "downtime", "throttle_floor")


def control_path(run_dir: Path, disk: str, log_name: str) -> Path:
    """Neither name has a colon."""
    return run_dir / f"sync:{disk}:{log_name}.ctl"


def running_syncs(run_dir: Path, disk: str, log_name: str | None = None) -> list[Path]:
    """The sockets of the syncs that run for a disk."""
    return [path for path in run_dir.glob(f"sync:{disk}:{log_name or '*'}.ctl") if unixsocket.is_alive(path)]


def find_sync(run_dir: Path, disk: str, log_name: str | None = None) -> Path:
    """The socket of the sync that runs for a disk. ControlError if there is none, or more than one."""
    found = running_syncs(run_dir, disk, log_name)
    if not found:
        raise ControlError(f"no sync of disk {disk!r} is running here", errno=errno.ENOENT,
                           hint="writelog-sync start DISK tcp://HOST:PORT starts one")
    if len(found) > 1:
        names = ", ".join(sorted(path.name.split(":")[2].removesuffix(".ctl") for path in found))
        raise ControlError(f"{len(found)} syncs of disk {disk!r} are running", errno=errno.EEXIST,
                           hint=f"choose one by its log, with --log: {names}")
    return found[0]


@dataclass
class Wishes:
    """What the operator wants now."""

    limits: Limits
    is_held: bool = False
    """Stay in sync, and do not switch over."""
    switch_at_s: float | None = None
    """When that ends by itself (time.time())."""
    is_paused: bool = False
    is_cancelled: bool = False
    verifications: int = 0
    """That were asked for so far; the last one with `repairs`, at `verify_rate`."""
    repairs: bool = False
    verify_rate: float | None = None
    version: int = 0
    """Raised with each change."""

    @property
    def may_switch(self) -> bool:
        if self.is_held and self.switch_at_s is not None and time.time() >= self.switch_at_s:
            self.is_held = False
        return not self.is_held

    def verify(self, settings: dict[str, Any]) -> None:
        """ControlError if one of them makes no sense."""
        rate, repair = settings.pop("rate", None), settings.pop("repair", False)
        is_rate = rate is None or (type(rate) in (int, float) and 0 < rate <= 1e15)
        if settings or type(repair) is not bool or not is_rate:
            raise ControlError("cannot verify like that", errno=errno.EINVAL,
                               hint="known: repair, true or false, and rate, a number above 0")
        self.repairs, self.verify_rate = repair, rate
        self.verifications += 1

    def set(self, settings: dict[str, Any]) -> None:
        """ControlError if one of them makes no sense."""
        for name, value in settings.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in SETTINGS or not is_number or not -1 <= value <= 1e15:
                raise ControlError(f"cannot set {name!r:.80} to {value!r:.80}", errno=errno.EINVAL,
                                   hint=f"known: {', '.join(SETTINGS)}; each is a number")
        limits = self.limits
        if "rate" in settings:
            limits = replace(limits, rate=float(settings["rate"]) if settings["rate"] > 0 else None)
        if "downtime" in settings:
            if settings["downtime"] < MIN_DOWNTIME_S:
                raise ControlError(f"no pause is as short as {settings['downtime']} s", errno=errno.EINVAL)
            limits = replace(limits, downtime_s=float(settings["downtime"]))
        if "throttle_floor" in settings:
            floor = float(settings["throttle_floor"])
            limits = replace(limits, may_throttle=floor >= 0, throttle_floor=floor if floor > 0 else None)
        self.limits = limits


class Follower:
    """In place of a control socket, for a sync whose group has one: `changed` is called when the wishes are
    others."""

    def __init__(self, wishes: Wishes, changed: Callable[[], None]) -> None:
        self._wishes = wishes
        self._changed = changed
        self._version = wishes.version

    def turn(self) -> None:
        if self._version != self._wishes.version:
            self._version = self._wishes.version
            self._changed()

    def close(self, report: dict[str, Any] | WritelogError) -> None:
        """The group tells."""


class ControlSocket:
    """Listens until `close`. `status` gives what the op of that name answers, `changed` is called after the wishes
    changed. To be given a `turn` often."""

    def __init__(self, paths: Iterable[Path], wishes: Wishes, status: Callable[[], dict[str, Any]],
                 changed: Callable[[], None]) -> None:
        """ControlError if it cannot listen. A path that is too long for a socket is told: then there is none."""
        self._wishes = wishes
        self._status = status
        self._changed = changed
        self._listeners: dict[Path, socket.socket] = {}
        for path in paths:
            try:
                self._listeners[path] = unixsocket.listen(path)
            except ControlError as error:
                if error.errno != errno.ENAMETOOLONG:
                    self._stop_listening()
                    raise
                logger.warning("this sync cannot be steered: %s", error)
        self._clients: dict[socket.socket, Lines] = {}
        self._waiting: set[socket.socket] = set()
        self._turned_s = 0.0

    def turn(self) -> None:
        """Serve whoever asks, if it is time."""
        now_s = time.monotonic()
        if now_s - self._turned_s < TURN_S:
            return
        self._turned_s = now_s
        for listener in self._listeners.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._accept(listener)
        for client in list(self._clients):
            self._serve(client)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        if len(self._clients) >= MAX_CLIENTS or not unixsocket.peer_allowed(client)[0]:
            client.close()
            return
        client.setblocking(False)
        self._clients[client] = Lines(MAX_REQUEST_BYTES)

    def close(self, report: dict[str, Any] | WritelogError) -> None:
        """Tell those who wait how it ended, and stop."""
        for client in list(self._clients):
            if client in self._waiting:
                self._answer(client, encode_error(report) if isinstance(report, WritelogError)
                             else encode_result(report))
            client.close()
        self._stop_listening()

    def _stop_listening(self) -> None:
        for path, listener in self._listeners.items():
            listener.close()
            path.unlink(missing_ok=True)

    def _serve(self, client: socket.socket) -> None:
        lines = self._clients[client]
        try:
            data = client.recv(MAX_REQUEST_BYTES)
            if not data:
                self._drop(client)
                return
            lines.feed(data)
            while (line := lines.next_line()) is not None:
                answer = self._handle(client, line)
                if answer is not None:
                    self._answer(client, answer)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            self._drop(client)

    def _handle(self, client: socket.socket, line: bytes) -> bytes | None:
        try:
            request = json.loads(line)
            op = request.pop("op", None) if isinstance(request, dict) else None
        except (ValueError, RecursionError):
            op, request = None, {}
        try:
            if op not in OPS or (request and op not in ("set", "verify")):
                raise ControlError("a sync does not know such a request", errno=errno.EINVAL,
                                   hint=f"known: {', '.join(OPS)}")
            return self._carry_out(client, op, request)
        except ControlError as error:
            return encode_error(error)

    def _carry_out(self, client: socket.socket, op: str, settings: dict[str, Any]) -> bytes | None:
        wishes = self._wishes
        if op == "wait":
            self._waiting.add(client)
            return None
        if op == "set":
            wishes.set(settings)
        elif op in ("pause", "resume"):
            wishes.is_paused = op == "pause"
        elif op == "verify":
            wishes.verify(settings)
        elif op == "switch":
            wishes.is_held = False
        elif op == "cancel":
            wishes.is_cancelled = True
        if op != "status":
            wishes.version += 1
            self._changed()
        return encode_result(self._status())

    def _answer(self, client: socket.socket, line: bytes) -> None:
        """Answers are short: a client that does not take one at once is not waited for."""
        try:
            client.settimeout(SEND_TIMEOUT_S)
            client.sendall(line)
            client.setblocking(False)
        except OSError:
            self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        self._waiting.discard(client)
        self._clients.pop(client, None)
        client.close()
