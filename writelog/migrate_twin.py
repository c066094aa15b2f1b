"""Is the QEMU at the destination a machine that the guest can go on in? No I/O.

QEMU sends the state of the devices last, after the switch-over; a destination that lacks one of them breaks the
migration off when there is no way back without an operator. So it is compared before anything moves, as far as the
monitors can tell. QEMU's answers: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tapcore.errors import ReplicationError
from tapcore.text import size_text

HINT = "start it with the options of the guest's own QEMU, and -incoming"


@dataclass(frozen=True)
class Machine:
    """What a QEMU is."""

    kind: str
    memory_bytes: int
    processors: tuple[str, ...]
    """The model of each."""
    devices: Mapping[str, str]
    """What is in each slot of the first PCI bus."""
    disks: Mapping[int, int]
    """How many disks of each size are written to."""


def machine_of(ask: Callable[..., Any]) -> Machine:
    """`ask` puts a command to a monitor; None if that does not know it."""
    memory = ask("query-memory-size-summary") or {}
    buses: list[Any] = ask("query-pci") or []
    return Machine(
        str(ask("qom-get", path="/machine", property="type") or "").removesuffix("-machine"),
        int(memory.get("base-memory", 0)) + int(memory.get("plugged-memory", 0)),
        tuple(str(ask("qom-get", path=cpu["qom-path"], property="type") or "")
              for cpu in ask("query-cpus-fast") or ()),
        _devices(buses[0].get("devices", ()) if buses else ()),
        Counter(_sizes(ask("query-block") or ())))


def _devices(devices: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    found = {}
    for device in devices:
        ids, kind = device.get("id", {}), device.get("class_info", {}).get("desc") or "device"
        found[f"{device.get('slot')}.{device.get('function')}"] = (
            f"{kind} {int(ids.get('vendor', 0)):04x}:{int(ids.get('device', 0)):04x}")
    return found


def _sizes(blocks: Iterable[Mapping[str, Any]]) -> Iterable[int]:
    for block in blocks:
        inserted = block.get("inserted")
        if isinstance(inserted, dict) and not inserted.get("ro") and isinstance(inserted.get("image"), dict):
            yield int(inserted["image"].get("virtual-size", 0))


def check_twin(here: Machine, there: Machine) -> None:
    """ReplicationError unless the guest of `here` can go on in `there`. What that has besides does no harm."""
    differences = [f"is a {there.kind}, the guest's own a {here.kind}"] if there.kind != here.kind else []
    if there.memory_bytes != here.memory_bytes:
        differences.append(f"has {size_text(there.memory_bytes)} of memory instead of "
                           f"{size_text(here.memory_bytes)}")
    if there.processors != here.processors:
        differences.append(f"has {_processors(there)} instead of {_processors(here)}")
    for slot, device in here.devices.items():
        other = there.devices.get(slot, "nothing")
        if other != device:
            differences.append(f"has {other} in PCI slot {slot} instead of {device}")
    for size_bytes, count in here.disks.items():
        if there.disks.get(size_bytes, 0) < count:
            others = ", ".join(f"{size:,}" for size in there.disks) or "none"
            differences.append(f"lacks a disk of {size_bytes:,} bytes (has: {others})")
    if differences:
        raise ReplicationError(f"the guest cannot go on in the destination QEMU, which {'; '.join(differences)}",
                               hint=HINT)


def _processors(machine: Machine) -> str:
    models = sorted(set(machine.processors))
    return f"{len(machine.processors)} processors ({', '.join(models)})"
