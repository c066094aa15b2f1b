"""qcow2: what opening an image reads: header, refcount table."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from tapcore.errors import ImageError
from tapcore.formats.extents import from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import beside, leads_inside
from tapcore.formats.qcow2.layout import SNAPSHOT, Header, parse_header
from tapcore.formats.qcow2.refcounts import Refcounts

DATA_FILE: Final = "external data file"
HEADER_READ_BYTES: Final = 2 << 20
"""As much as the largest cluster has."""


def load_header(file: ImageFile) -> Header:
    """ImageError if there is no valid one, or the image needs what is not supported."""
    data = file.load(0, min(HEADER_READ_BYTES, file.size_bytes), "the header")
    return parse_header(file.path, data, file.size_bytes)


def data_path(path: str, name: str) -> str:
    """Where the external data file `name` of the image at `path` is. ImageError if that is outside the image's
    folder: an image from elsewhere must not make others read or write what it likes."""
    place = beside(path, name, DATA_FILE)
    if not leads_inside(Path(place), Path(path).parent):
        raise ImageError(f"its {DATA_FILE} {name!r} is outside the image's folder", errno=errno.EPERM, path=path,
                         hint=f"if that is as it should be, open it as qcow2:data_file={place},{path}")
    return place


def load_refcounts(file: ImageFile, header: Header) -> Refcounts:
    """ImageError for a refcount table that cannot be right."""
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    table = from_big_endian("Q", file.load(header.refcount_table_offset, table_bytes, "the refcount table"))
    blocks = [entry for entry in table if entry]
    if len(set(blocks)) != len(blocks):
        raise ImageError("the refcount table has two entries for one refcount block", path=file.path,
                         offset=header.refcount_table_offset, hint="repair it with td-img check --repair")
    refcounts = Refcounts(header, table, file.size_bytes, _reserved(header))
    if file.is_device:
        refcounts.fresh_from = 1 << 56
    refcounts.protect(blocks)
    return refcounts


def _reserved(header: Header) -> list[tuple[int, int]]:
    """Clusters of the header and of the tables that it points at."""
    found = []
    for offset, length in ((0, 1), (header.l1_table_offset, 8 * header.l1_size),
                           (header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits),
                           (header.snapshots_offset, header.nb_snapshots * SNAPSHOT.size)):
        if length:
            first = offset >> header.cluster_bits
            found.append((first, first + -(-length >> header.cluster_bits)))
    return found
