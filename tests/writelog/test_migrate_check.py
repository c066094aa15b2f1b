"""What is found out before a migration begins: options, QEMU's abilities, the guest's disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tapcore.errors import ReplicationError, UsageError
from tapcore.nbd.address import NbdAddress
from writelog.migrate_check import (
    CAPABILITIES,
    address_of,
    capabilities_to_set,
    check_disks,
    check_memory_uri,
)
from writelog.migrate_qmp import parse_monitor
from writelog.sync_disks import parse_disks
from writelog.sync_group_report import downtime_parts
from writelog.sync_report import Report

HERE = NbdAddress("vm1", path="/run/vm1.nbd")


@pytest.mark.parametrize(("text", "place"), [
    ("unix:/run/vm.qmp", "/run/vm.qmp"), ("tcp:127.0.0.1:4444", ("127.0.0.1", 4444)), ("tcp:[::1]:1", ("::1", 1)),
])
def test_monitors(text: str, place: object) -> None:
    assert parse_monitor(text) == place


@pytest.mark.parametrize("text", ["", "unix:", "/run/vm.qmp", "tcp:4444", "tcp:h:", "tcp:h:70000", "tcp:h:x"])
def test_no_monitors(text: str) -> None:
    with pytest.raises(UsageError, match="write it like unix:/run"):
        parse_monitor(text)


@pytest.mark.parametrize(("texts", "error"), [
    (["vm1"], "names no disk and its replica"), (["=tcp://a:1"], "names no disk"), (["vm1="], "names no disk"),
    (["vm1=tcp://a:1", "vm1=tcp://a:2"], "'vm1' is named twice"),
    (["vm1=tcp://a:1", "vm2=tcp://a:1"], "tcp://a:1 is named twice"),
])
def test_disks_that_make_no_sense(texts: list[str], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        parse_disks(texts)


def test_disks() -> None:
    assert parse_disks(["a=tcp://h:1", "b=tcp://h:2"]) == {"a": "tcp://h:1", "b": "tcp://h:2"}


@pytest.mark.parametrize(("filename", "address"), [
    ("nbd+unix:///vm1?socket=/run/vm1.nbd", HERE),
    ("nbd://127.0.0.1:10810/vm1", NbdAddress("vm1", host="127.0.0.1", port=10810)),
    ('json:{"driver": "raw", "file": {"driver": "nbd", "export": "vm1", "server": {"path": "/run/vm1.nbd"}}}',
     HERE),
    ('json:{"driver": "nbd", "server.path": "/run/vm1.nbd", "server.type": "unix", "export": "vm1"}', HERE),
    ('json:{"driver": "nbd", "export": "x", "server": {"type": "inet", "host": "h", "port": "1"}}',
     NbdAddress("x", host="h", port=1)),
    ("/vm/disk.img", None), ("json:{", None), ("json:[]", None), ('json:{"driver": "file"}', None),
    ("nbd+unix:///vm1", None), ("nbd+ssh://h/x", None), ('json:{"driver": "nbd", "server": 3}', None),
])
def test_what_qemu_calls_its_images(filename: str, address: NbdAddress | None) -> None:
    assert address_of(filename) == address


def block(filename: str, **figures: Any) -> dict[str, Any]:
    return {"device": "disk0", "inserted": {"file": filename, "ro": False} | figures}


def test_the_guests_disks_are_those(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "socket")
    exports = {"vm1": [f"nbd+unix:///vm1?socket={tmp_path}/socket"], "vm2": ["nbd://localhost:10809/vm2"]}
    check_disks([block(f"nbd+unix:///vm1?socket={tmp_path}/link"), block("nbd://127.0.0.1:10809/vm2"),
                 block("/cd.iso", ro=True), {"device": "floppy"}], exports)


@pytest.mark.parametrize(("blocks", "error"), [
    ([], "no disk on the export of 'vm1'"),
    ([block("nbd+unix:///vm2?socket=/run/vm1.nbd")], "no disk on the export of 'vm1'"),
    ([block("nbd+unix:///vm1?socket=/run/other")], "no disk on the export of 'vm1'"),
    ([block(HERE.uri), block("/vm/other.img")], r"also writes to disk0 \(/vm/other.img\).*--no-disk-check"),
])
def test_the_guests_disks_are_others(blocks: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(ReplicationError) as raised:
        check_disks(blocks, {"vm1": [HERE.uri]})
    assert raised.match(error)


def test_capabilities() -> None:
    off = [{"capability": name, "state": False} for name in (*CAPABILITIES, "auto-converge", "xbzrle")]
    assert capabilities_to_set(off, False) == dict.fromkeys(CAPABILITIES, True)
    assert capabilities_to_set(off, True) == dict.fromkeys((*CAPABILITIES, "auto-converge"), True)
    on = [{"capability": name, "state": True} for name in CAPABILITIES]
    assert capabilities_to_set(on, False) == {}
    with pytest.raises(ReplicationError, match=r"lacks pause-before-switchover.*QEMU 4\.0"):
        capabilities_to_set([item for item in off if item["capability"] != "pause-before-switchover"], True)


@pytest.mark.parametrize("uri", ["unix:/run/x", "tcp:127.0.0.1:4444", "tcp:[::1]:4444", "tcp:localhost:1"])
def test_memory_may_stay_on_this_machine(uri: str) -> None:
    check_memory_uri(uri, False)


@pytest.mark.parametrize("uri", ["tcp:192.0.2.7:4444", "tcp:other:4444"])
def test_memory_leaves_this_machine_with_tls_or_by_force(uri: str) -> None:
    check_memory_uri(uri, True)
    with pytest.raises(UsageError, match="tls-creds"):
        check_memory_uri(uri, False)


@pytest.mark.parametrize("uri", ["", "tcp:4444", "unix:", "exec:nc", "tcp:h:p", "192.0.2.7:4444"])
def test_no_place_for_memory(uri: str) -> None:
    with pytest.raises(UsageError, match="no place to migrate to"):
        check_memory_uri(uri, True)


def test_the_downtime_is_the_sum_of_its_parts() -> None:
    slow = Report("a", "", 0, pause_parts_s={"quiesce": 0.5, "send": 0.25, "flush": 1.0, "hand over": 9.0})
    quick = Report("b", "", 0, pause_parts_s={"quiesce": 0.5})
    marks = {"begin": 1.0, "stop": 2.0, "last round": 4.0, "hand over": 5.0, "promote": 5.5, "move": 6.0}
    parts = downtime_parts(marks, [quick, slow])
    assert parts == {"stop": 1.0, "wake": 0.25, "quiesce": 0.5, "send": 0.25, "flush": 1.0, "hand over": 1.0,
                     "promote": 0.5, "move": 0.5}
    assert sum(parts.values()) == marks["move"] - marks["begin"]
