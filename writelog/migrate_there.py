"""The QEMU at the destination, as far as its monitor can be asked. Often it is reached through a forwarded socket,
and lost in the hours that a disk takes: then it is connected to anew, but not while the guest stands still."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from tapcore.errors import ReplicationError
from writelog.migrate_qmp import Monitor, MonitorError, Refusal
from writelog.migrate_twin import check_twin, machine_of

WAITS: Final = "inmigrate"
ARRIVED: Final = frozenset({"running", "paused"})
"""Of a guest: QEMU has all of it. The second: it was started with -S."""
BRIEFLY_S: Final = 2.0
"""Longest wait for an answer while the guest stands still."""


class Destination:
    """`monitor` is None if there is none to ask; then nothing is known of it."""

    def __init__(self, monitor: Monitor | None) -> None:
        self._monitor = monitor
        self._status = ""

    def prepare(self, uri: str, tls_creds: str | None, here: Monitor) -> None:
        """Check that it waits for a guest, and is a machine for that of `here`; have it listen if it waits for
        that. ReplicationError if not."""
        monitor = self._monitor
        if monitor is None:
            return
        if complaint := self.complaint():
            raise ReplicationError(f"{monitor.name}: {complaint}", hint="start it with -incoming")
        check_twin(machine_of(_asking(here)), machine_of(_asking(monitor)))
        answer = monitor.call("query-migrate")
        is_listening = "status" in answer or "socket-address" in answer
        if tls_creds is not None and is_listening:
            if monitor.call("query-migrate-parameters").get("tls-creds") != tls_creds:
                raise ReplicationError(f"{monitor.name}: the destination QEMU listens without --tls-creds already",
                                       hint="start it with -incoming defer")
        elif tls_creds is not None:
            monitor.call("migrate-set-parameters", **{"tls-creds": tls_creds})
        if not is_listening:  # -incoming defer
            monitor.call("migrate-incoming", uri=uri)

    def complaint(self, guest_stands: bool = False) -> str:
        """Why it cannot take the guest; "" if it waits for it, or there is no way to know."""
        if self._monitor is None:
            return ""
        self.look(guest_stands)
        return "" if self._status == WAITS else f"{self.told}: it waits for no guest"

    def look(self, guest_stands: bool = False) -> None:
        """Ask it how it is."""
        monitor = self._monitor
        if monitor is None:
            return
        self._status = ""
        former_s = monitor.answer_s
        monitor.answer_s = BRIEFLY_S if guest_stands else former_s
        try:
            self._status = str(monitor.call("query-status")["status"])
        except MonitorError:
            if not guest_stands:
                with contextlib.suppress(MonitorError):
                    monitor.reconnect()
                    self._status = str(monitor.call("query-status")["status"])
        finally:
            monitor.answer_s = former_s

    @property
    def has_the_guest(self) -> bool:
        """Whether that was seen when it was looked at."""
        return self._status in ARRIVED

    @property
    def told(self) -> str:
        """What was seen, for people."""
        if self._monitor is None:
            return ""
        return f"the destination QEMU {f'is {self._status}' if self._status else 'does not answer'}"

    def start(self) -> bool:
        """Have a guest that has arrived go on, if it stands still. MonitorError if that cannot be known."""
        monitor = self._monitor
        if monitor is None:
            return False
        self.look()
        if not self._status:
            raise MonitorError(f"{monitor.name}: {self.told}")
        if self._status == "running":
            return False
        monitor.call("cont")
        return True


def _asking(monitor: Monitor) -> Any:
    def ask(command: str, **arguments: object) -> Any:
        try:
            return monitor.call(command, **arguments)
        except Refusal:  # a machine that has no such thing
            return None

    return ask
