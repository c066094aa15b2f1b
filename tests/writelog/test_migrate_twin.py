"""Which machines a guest can go on in."""

from __future__ import annotations

from typing import Any

import pytest

from tapcore.errors import ReplicationError
from writelog.migrate_twin import Machine, check_twin, machine_of

DISK = {"slot": 2, "function": 0, "class_info": {"class": 256, "desc": "SCSI controller"},
        "id": {"vendor": 0x1AF4, "device": 0x1001}}
NAMELESS = {"slot": 3, "function": 1, "class_info": {"class": 0}, "id": {}}


def answers(command: str, **arguments: Any) -> Any:
    return {
        "qom-get": {"/machine": "pc-q35-7.2-machine", "/cpu": "qemu64-x86_64-cpu"}.get(arguments.get("path", "")),
        "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 1 << 20},
        "query-cpus-fast": [{"qom-path": "/cpu"}, {"qom-path": "/cpu"}],
        "query-pci": [{"bus": 0, "devices": [DISK, NAMELESS]}, {"bus": 1, "devices": [{"slot": 9}]}],
        "query-block": [{"inserted": {"ro": False, "image": {"virtual-size": 512}}}, {"device": "floppy"},
                        {"inserted": {"ro": True, "image": {"virtual-size": 7}}}],
    }[command]


HERE = Machine("pc-q35-7.2", (1 << 30) + (1 << 20), ("qemu64-x86_64-cpu",) * 2,
               {"2.0": "SCSI controller 1af4:1001", "3.1": "device 0000:0000"}, {512: 1})


def test_what_a_monitor_tells() -> None:
    assert machine_of(answers) == HERE
    assert machine_of(lambda command, **arguments: None) == Machine("", 0, (), {}, {})


def test_more_does_no_harm() -> None:
    check_twin(HERE, HERE)
    check_twin(HERE, Machine(HERE.kind, HERE.memory_bytes, HERE.processors, {**HERE.devices, "4.0": "x"},
                             {512: 2, 1024: 1}))


@pytest.mark.parametrize(("changed", "error"), [
    ({"kind": "pc-i440fx-7.2"}, "is a pc-i440fx-7.2, the guest's own a pc-q35-7.2"),
    ({"memory_bytes": 1 << 30}, "has 1 GiB of memory instead of 1.001 GiB"),
    ({"processors": ("max-x86_64-cpu",)}, r"has 1 processors \(max-x86_64-cpu\) instead of 2 .*\(qemu64"),
    ({"devices": {"3.1": "device 0000:0000"}}, "has nothing in PCI slot 2.0 instead of SCSI controller 1af4:1001"),
    ({"disks": {1024: 2}}, r"lacks a disk of 512 bytes \(has: 1,024\)"),
    ({"disks": {}}, r"lacks a disk of 512 bytes \(has: none\)"),
])
def test_other_machines(changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ReplicationError, match=error + ".*start it with the options of the guest's own QEMU"):
        check_twin(HERE, Machine(**{**HERE.__dict__, **changed}))
