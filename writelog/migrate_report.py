"""What a migration tells: disks and memory together, and at the end where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tapcore.text import size_text
from writelog.migrate_memory import Memory
from writelog.sync_group_report import DiskReporter
from writelog.sync_report import Report, Reporter


class MigrationReporter(Reporter):
    """As `Reporter`, for a whole guest."""

    def __init__(self, style: str) -> None:
        super().__init__(style, program="writelog-migrate")

    def moving(self, elapsed_s: float, disks: dict[str, DiskReporter], memory: Memory | None) -> None:
        """Tell where the migration is, if it is time."""
        self.tell(
            lambda: {"elapsed_s": elapsed_s, "disks": {name: disk.figures() for name, disk in disks.items()},
                     "memory": asdict(memory) if memory is not None else None},
            lambda: "; ".join([*(f"{name} {disk}" for name, disk in disks.items()),
                               *([f"memory {memory}"] if memory is not None else [])]))


@dataclass
class MigrationReport:
    """What a finished migration has done. `downtime_parts_s` are the parts of the guest's stop, in their order."""

    disks: list[Report]
    memory: Memory | None
    destination: str
    elapsed_s: float
    downtime_parts_s: dict[str, float] = field(default_factory=dict)
    warning: str = ""

    @property
    def downtime_s(self) -> float:
        return sum(self.downtime_parts_s.values())

    def figures(self) -> dict[str, Any]:
        return asdict(self) | {"downtime_s": self.downtime_s}

    def lines(self) -> list[str]:
        parts = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in self.downtime_parts_s.items())
        memory_bytes = self.memory.sent_bytes if self.memory is not None else 0
        disk_bytes = sum(disk.sent_bytes for disk in self.disks)
        lines = [line for disk in self.disks for line in disk.lines()]
        lines += [
            f"the guest runs at {self.destination}; quit its QEMU here",
            f"  total    {self.elapsed_s:.1f} s, disks {size_text(disk_bytes)}, memory {size_text(memory_bytes)}",
            f"  downtime {self.downtime_s * 1000:.1f} ms: {parts}",
        ]
        return [*lines, f"  but      {self.warning}"] if self.warning else lines
