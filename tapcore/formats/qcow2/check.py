"""qcow2: is every cluster's refcount the number of references to it? And put right what can be without loss.

    errors in tables    reported; with one of them nothing is repaired: what it led to would be free, and where it
                        leads to may come true when the file grows
    refcounts, COPIED   made anew from the references, and switched to by one write of the header (rewrite.py)
    corrupt, dirty      cleared once nothing is wrong

Specification: https://www.qemu.org/docs/master/interop/qcow2.html
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from pathlib import Path

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import beside
from tapcore.formats.qcow2.counts import CHUNK, CHUNK_BITS, COUNT, MARKED, UNMARKED
from tapcore.formats.qcow2.layout import CORRUPT, DIRTY, FEATURES, INCOMPATIBLE_AT, Header
from tapcore.formats.qcow2.load import DATA_FILE, load_header
from tapcore.formats.qcow2.refcounts import RefcountBlock
from tapcore.formats.qcow2.rewrite import Rewrite
from tapcore.formats.qcow2.walk import Walk
from tapcore.formats.tools import Report


def check(path: str, *, repair: bool = False) -> Report:
    """What is wrong with the image at `path`. Without `repair` nothing is changed; with it, what can be put right
    without loss is. ImageError if the image cannot be opened, or its tables cannot be followed, at all."""
    file = ImageFile.open(path, OpenFlag.NONE if repair else OpenFlag.RDONLY)
    try:
        walk = Walk(file, load_header(file))
        walk.run()
        has_bad_entries = walk.report.errors > 0
        found = _compare(walk)
        unclosed = walk.header.incompatible_features & (DIRTY | CORRUPT)
        if not repair or has_bad_entries or not (found.errors or found.leaks or unclosed):
            return found
        wrong = found.errors + found.leaks
        try:
            _repair(walk, found)
        except ImageError as error:
            if error.errno != errno.EOVERFLOW:
                raise
            found.messages.insert(0, f"not repaired: {error.message}")
            return found
        walk = Walk(file, load_header(file))
        walk.run()
        left = _compare(walk)
        left.repaired = max(0, wrong - left.errors - left.leaks)
        left.messages = left.messages if left.errors or left.leaks else found.messages
        return left
    finally:
        file.close()


def _repair(walk: Walk, found: Report) -> None:
    file, bits = walk.file, walk.header.incompatible_features & ~(DIRTY | CORRUPT)
    if not found.errors and not found.leaks:
        file.store(INCOMPATIBLE_AT, FEATURES.pack(bits=bits), "the header")
        file.sync_or_raise()
        return
    walk.count_tables(-1)
    rewrite = Rewrite(walk)
    rewrite.fields["incompatible_features"] = bits
    rewrite.run()


def _stored(walk: Walk) -> Iterator[tuple[int, list[int]]]:
    """(first cluster, refcounts) of the parts of the file for which any are stored. Blocks that cannot be where
    the table says, or come again, are left out."""
    header = walk.header
    part = min(CHUNK, header.refcount_block_entries)
    seen: set[int] = set()
    for index, entry in enumerate(walk.refcount_table()):
        if (not entry or entry % header.cluster_bytes or entry >> header.cluster_bits >= walk.clusters
                or entry in seen or walk.is_hole(entry, header.cluster_bytes)):
            continue
        seen.add(entry)
        data = walk.file.load(entry, header.cluster_bytes, "a refcount block")
        block = RefcountBlock(data, header.refcount_order)
        for at in range(0, len(block), part):
            refcounts = block.part(at, part)
            if any(refcounts):
                yield index * len(block) + at, refcounts


def _compare(walk: Walk) -> Report:
    """Hold the refcounts of the image against what was counted, and the COPIED flags against both."""
    report, data_file = walk.report, walk.header.data_file
    if data_file is not None and not Path(beside(walk.file.path, data_file, DATA_FILE)).exists():
        report.add(f"the external data file {data_file!r} does not exist")
    walk.count_tables(1)
    entries = [entry for entry in walk.refcount_table() if entry]
    if len(set(entries)) != len(entries):
        report.add("the refcount table has two entries for one refcount block")
    for number, snapshot in enumerate(walk.snapshots):
        if not snapshot.is_complete(walk.header):
            report.add(f"snapshot {number}: extra_data_size {len(snapshot.extra)} is less than version 3 wants")
    nothing = array("Q", bytes(8 * CHUNK))
    part = min(CHUNK, walk.header.refcount_block_entries)
    seen: set[int] = set()
    for first, refcounts in _stored(walk):
        seen.add(first)
        counted = walk.counts.chunks.get(first >> CHUNK_BITS, nothing)
        _compare_part(walk, first, refcounts, counted[first % CHUNK : first % CHUNK + part])
    for number, chunk in sorted(walk.counts.chunks.items()):
        for at in range(0, CHUNK, part):
            if (number << CHUNK_BITS) + at not in seen:
                _compare_part(walk, (number << CHUNK_BITS) + at, [0] * part, chunk[at : at + part])
    return report


def _compare_part(walk: Walk, first: int, stored: list[int], counted: array[int]) -> None:
    for at, (have, value) in enumerate(zip(stored, counted, strict=True)):
        want = value & COUNT
        if have != want and (have < want or first + at < walk.clusters):
            walk.report.add(f"cluster {first + at}: refcount {have}, referred to {want} times", leak=have > want)
        if value & (UNMARKED if have == 1 else MARKED):
            walk.report.add(f"cluster {first + at}: COPIED is {'not set' if have == 1 else 'set'} where it is "
                            f"referred to, but the refcount is {have}")


def rebuild_refcounts(file: ImageFile, header: Header) -> None:
    """Make new refcounts and COPIED flags for an image that was not closed, and clear its dirty bit with the same
    write. ImageError if its tables have errors; then nothing was changed."""
    walk = Walk(file, header)
    walk.run()
    if walk.report.errors:
        raise ImageError("was not closed, and its tables have errors: " + walk.report.messages[0], path=file.path,
                         hint="repair it with td-img check --repair, or open it read-only")
    walk.count_tables(0)
    rewrite = Rewrite(walk)
    rewrite.fields["incompatible_features"] = header.incompatible_features & ~DIRTY
    rewrite.run()
