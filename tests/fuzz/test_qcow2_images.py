"""qcow2 images in which anything may be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from formats_fuzz import Change, Template, bounded_memory, changes, damaged, refuses_or_works, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_templates import HEADER, KINDS, SIZE, template, u64

from tapcore.driver import Env
from tapcore.formats.qcow2.layout import HEADER_V2, OFFSET_MASK
from tapcore.formats.qcow2.snapshots import (
    apply_snapshot,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
)
from tapcore.formats.tools import Backing, find_tools

TOOLS = find_tools("qcow2")
DISK_SIZE_AT = slice(24, 32)
"""Kept if a disk cannot be made larger after all, though its L1 table may be longer by then."""

ACTIONS: dict[str, Callable[[str], object]] = {
    "repair": lambda path: TOOLS.check(path, repair=True),
    "create": lambda path: create_snapshot(path, "new"),
    "apply": lambda path: apply_snapshot(path, "one"),
    "delete": lambda path: delete_snapshot(path, "1"),
    "grow": lambda path: TOOLS.resize(path, 3 * SIZE),
    "shrink": lambda path: TOOLS.resize(path, SIZE // 4096 * 1024, shrink=True),
    "backing": lambda path: TOOLS.set_backing(path, Backing("base.raw", "aio")),
    "no backing": lambda path: TOOLS.set_backing(path, None),
}


def endure(env: Env, template: Template, wrong: list[Change], action: str) -> None:
    """Use the image by all that reads it, by the driver, and before that by one of the tools."""
    with TemporaryDirectory(dir="/dev/shm") as name, bounded_memory():
        path = Path(name) / "a.qcow2"
        damaged(template, wrong, path)
        for look in (TOOLS.check, TOOLS.describe, list_snapshots):
            refuses_or_works(path, lambda look=look: look(str(path)), reads_only=True)  # type: ignore[misc]
        kept = DISK_SIZE_AT if action in ("grow", "shrink") else slice(0, 512)
        refuses_or_works(path, lambda: ACTIONS[action](str(path)), kept=kept)
        use(env, "qcow2", path)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), action=st.sampled_from(sorted(ACTIONS)))
def test_nothing_in_an_image_does_worse_than_an_error(
    env: Env, data: st.DataObject, kind: str, action: str
) -> None:
    endure(env, template(kind), data.draw(changes(template(kind))), action)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_flips_of_every_byte_of_a_header_and_of_its_tables(env: Env, kind: str) -> None:
    actions = sorted(ACTIONS)
    image = template(kind)
    tables = [start + at for start in dict.fromkeys(image.offsets) for at in range(8)]
    for number, at in enumerate(at for at in (*range(112), *tables) if at < len(image.data)):
        flip = (0xFF, 0x80, 1)[number % 3]
        endure(env, image, [("byte", at, image.data[at] ^ flip)], actions[number % len(actions)])


def pointing(kind: str, entry: str, target: str) -> list[Change]:
    """An entry of one table leads to another, or to itself."""
    data = template(kind).data
    header = HEADER_V2.unpack(data)
    places = {"header": 0, "L1": header["l1_table_offset"], "refcounts": header["refcount_table_offset"]}
    places["L2"] = u64(data, places["L1"]) & OFFSET_MASK
    places["block"] = u64(data, places["refcounts"])
    places["snapshot's L1"] = header["snapshots_offset"]
    return [("set", places[entry], places[target] | (1 << 63 if entry in ("L1", "L2") else 0))]


@pytest.mark.parametrize("target", ["header", "L1", "L2", "refcounts", "block"])
@pytest.mark.parametrize("entry", ["L1", "L2", "refcounts", "snapshot's L1"])
def test_tables_that_lead_to_themselves_and_each_other(env: Env, entry: str, target: str) -> None:
    for action in sorted(ACTIONS):
        endure(env, template("with_snapshots"), pointing("with_snapshots", entry, target), action)


def test_backing_names_without_end_and_in_circles(env: Env) -> None:
    """A name that fills the cluster, one longer than it may be, and the image's own."""
    for length in (400, 1023, 1024, (1 << 32) - 1):
        start = HEADER.size + 64
        wrong: list[Change] = [("set", 8, start), *[("byte", 16 + at, byte) for at, byte in
                                                    enumerate(length.to_bytes(4, "big"))]]
        wrong += [("byte", start + at, ord("n")) for at in range(400)]
        endure(env, template("compressed"), wrong, "no backing")
    own_name = ("set", 496, int.from_bytes(b"a.qcow2\0", "big"))
    endure(env, template("compressed"), [("set", 8, 496), ("byte", 19, 7), own_name], "grow")


FINDS: list[tuple[str, str, list[Change]]] = [
    ("plain", "grow", [("length", 0, 14080), ("set", 40, 1536), ("set", 48, 2048)]),
    ("compressed", "shrink", [("set", 88, 1), ("set", 8, 0), ("set", 16384, 2), ("set", 24, 0)]),
    ("with_bitmaps", "backing", [("set", 12288, 0), ("set", 8, 600)]),
]
"""What was wrong once: (kind, action, changes)."""


@pytest.mark.parametrize(("kind", "action", "wrong"), FINDS)
def test_what_was_found(env: Env, kind: str, action: str, wrong: list[Change]) -> None:
    endure(env, template(kind), wrong, action)


def test_a_snapshot_whose_table_is_where_no_file_reaches(env: Env) -> None:
    (_, at, _), = pointing("with_snapshots", "snapshot's L1", "header")
    endure(env, template("with_snapshots"), [("set", at, 1 << 63)], "apply")
