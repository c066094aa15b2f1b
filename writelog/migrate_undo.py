"""How a migration that is not to be is undone: QEMU's part of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tapcore.errors import ReplicationError
from writelog.migrate_check import UNDER_WAY
from writelog.migrate_qmp import Monitor, Silence

POLL_S: Final = 0.02
SETTLE_S: Final = 10.0
"""Longest wait for QEMU to have done what it was told to."""
STOP_S: Final = 2.0
"""Longest wait for QEMU to start a guest after a failure, and to say that it is stopped."""
STANDS_STILL: Final = frozenset({"paused", "postmigrate", "finish-migrate"})
SHUT_DOWN: Final = "shutdown"
"""A guest that was, in a QEMU that stays."""


@dataclass(frozen=True)
class Settings:
    """Of QEMU's migration."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, int | str]

    def apply(self, monitor: Monitor) -> None:
        if self.capabilities:
            monitor.call("migrate-set-capabilities", capabilities=[
                {"capability": name, "state": state} for name, state in self.capabilities.items()])
        if self.parameters:
            monitor.call("migrate-set-parameters", **self.parameters)


NOTHING_SET: Final = Settings({}, {})


def status_of(monitor: Monitor) -> str:
    """Of QEMU's migration; "none" if there was none."""
    return str(monitor.call("query-migrate").get("status", "none"))


def undo_memory(monitor: Monitor, was_running: bool, former: Settings) -> str:
    """End QEMU's migration, if there is one, see that a guest that ran runs on, and undo what was set for it.
    Returns what is not as it was, if anything. MonitorError or ReplicationError if the guest does not run."""
    status = status_of(monitor)
    if status in UNDER_WAY:
        monitor.call("migrate_cancel")
    # One that waits for an answer to its first packet cannot be told not to. It does the guest no harm.
    is_connecting = status == "setup"
    _await_guest(monitor, was_running, is_connecting)
    if is_connecting and status_of(monitor) in UNDER_WAY:
        Settings({}, former.parameters).apply(monitor)
        return ("QEMU has not ended its migration: it still waits for a connection, maybe for two minutes, and "
                f"keeps {', '.join(former.capabilities)} set")
    former.apply(monitor)
    return ""


def _await_guest(monitor: Monitor, was_running: bool, is_connecting: bool) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        migration = status_of(monitor)
        ended = migration not in UNDER_WAY or (is_connecting and migration == "cancelling")
        status: dict[str, Any] = monitor.call("query-status")
        if ended and (status["running"] or not was_running or status["status"] == SHUT_DOWN):
            return
        if ended and status["status"] in STANDS_STILL:
            monitor.call("cont")
        if time.monotonic() > deadline_s:
            raise ReplicationError(f"QEMU's migration is {migration}, and the guest {status['status']}",
                                   hint="'migrate_cancel' and 'cont' in QEMU's monitor let it run on")
        monitor.events(POLL_S)


def stop_guest(monitor: Monitor) -> None:
    """See that the guest does not run here. When a migration has failed QEMU starts it, a moment after it has said
    so. Told to stop it, QEMU does not answer before its disks do: if the guest has asked something of a fenced
    one, only once that is resumed. Nor does it answer anything while it sends to a host that is gone: then the
    migration is broken off."""
    monitor.answer_s = STOP_S
    try:
        monitor.call("query-status")
    except Silence:
        monitor.yank()
    deadline_s = time.monotonic() + STOP_S
    while not monitor.call("query-status")["running"]:
        if time.monotonic() > deadline_s:
            return
        monitor.events(POLL_S)
    monitor.call("stop")
