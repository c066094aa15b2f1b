"""The syncs of the disks of one guest, each in a thread of its own.

They have in common one rate cap, one judgement (`writelog.planner_group`), one control socket, and gates that keep
them in step. How far they may go says who drives them: `writelog.sync_together`, or `writelog.migrate_run` for a
guest that moves with its memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from tapcore.errors import ReplicationError, WritelogError
from writelog.plan import Limits
from writelog.sync_control import ControlSocket, Wishes
from writelog.sync_copy import Shared
from writelog.sync_gate import Aborted, Gate, Group
from writelog.sync_group_report import DiskReporter
from writelog.sync_link import Peer
from writelog.sync_report import Report
from writelog.sync_run import Sync
from writelog.sync_source import Source
from writelog.sync_stop import Interrupted

JOIN_S: Final = 60.0
"""Longest wait for a sync to give up."""


class DiskSync:
    """One disk's sync, in a thread of its own. `options` are those of Sync."""

    def __init__(self, source: Source, peer: Peer, limits: Limits, gate: Gate, **options: Any) -> None:
        self.report: Report | None = None
        self.error: WritelogError | None = None
        self.reporter = DiskReporter()
        self._name = source.name
        self._sync = Sync(source, peer, limits, self.reporter, gate=gate, **options)
        self.status = self._sync.status
        self._thread = threading.Thread(target=self._run, name=source.name, daemon=True)
        self.start = self._thread.start

    def _run(self) -> None:
        try:
            self.report = self._sync.run()
        except WritelogError as error:
            self.error = error
        except Interrupted:
            self.error = Aborted(f"the sync of disk {self._name!r} was cancelled")
        except BaseException as error:
            self.error = ReplicationError(f"the sync of disk {self._name!r} failed: {error!r}")
            raise

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> bool:
        """Wait for its end, which is to be near; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        return self.has_ended


class DiskGroup:
    """Of the disks of `sources`; `peers` has the replica of each. `state` is where their driver says that they
    are."""

    def __init__(self, sources: Mapping[str, Source], peers: Mapping[str, Peer], wishes: Wishes,
                 **options: Any) -> None:
        """`options` are those of each Sync."""
        self.state = ""
        self.wishes = wishes
        self.gates = Group(sources)
        self.endpoints = {name: peers[name].endpoint for name in sources}
        self._shared = Shared(wishes.limits, sources)
        self.disks = {
            name: DiskSync(source, peers[name], wishes.limits, self.gates.gates[name], wishes=wishes,
                           shared=self._shared, **options)
            for name, source in sources.items()}
        self._control = ControlSocket([source.control_path for source in sources.values()], wishes, self.status,
                                      lambda: None)

    def start(self) -> None:
        for disk in self.disks.values():
            disk.start()

    def turn(self) -> None:
        """Serve whoever asks at the control socket. To be called often."""
        self._control.turn()

    def close(self, outcome: dict[str, Any] | WritelogError) -> None:
        """Tell those who wait how it ended."""
        self._control.close(outcome)

    def failure(self) -> tuple[str, WritelogError] | None:
        """(name, error) of a disk whose sync has given up by itself."""
        for name, disk in self.disks.items():
            if disk.error is not None and not isinstance(disk.error, Aborted):
                return name, disk.error
        return None

    def status(self) -> dict[str, Any]:
        disks = {name: disk.status() for name, disk in self.disks.items()}
        planner, wishes = self._shared.planner, self.wishes
        outlook = planner.outlook
        pause_s = sum(disk["pause_s"] for disk in disks.values()) if outlook is None else outlook.pause_s
        sums = {name: sum(disk[name] for disk in disks.values()) for name in ("sent_bytes", "remaining_bytes")}
        return {"state": self.state, "disks": disks, **sums, "pause_s": pause_s,
                "rate": None if outlook is None else outlook.send_rate, "rate_cap": planner.rate,
                "is_held": wishes.is_held, "is_paused": wishes.is_paused, "downtime": wishes.limits.downtime_s}
