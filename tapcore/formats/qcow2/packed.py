"""qcow2: compressed clusters. Specification: https://www.qemu.org/docs/master/interop/qcow2.html

    L2 entry: 0 1 | additional 512-byte sectors | offset in the file, to the byte
"""

from __future__ import annotations

import zlib
from typing import Final

import zstandard

from tapcore.errors import ImageError

MAX_ZSTD_WINDOW_BYTES: Final = 8 << 20


def packed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(offset in the file, length) in bytes of what a compressed cluster's L2 entry points at; the length is
    rounded up to whole sectors of the file."""
    split = 62 - (cluster_bits - 8)
    offset = entry & ((1 << split) - 1)
    sectors = (entry >> split & ((1 << cluster_bits - 8) - 1)) + 1
    return offset, sectors * 512 - offset % 512


def unpack(data: bytes, compression: str, cluster_bytes: int) -> bytes:
    """One cluster; what follows its compressed bytes in `data` is ignored. ImageError if it is damaged."""
    try:
        if compression == "zlib":
            out = zlib.decompressobj(-15).decompress(data, cluster_bytes)
        else:
            reader = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES).stream_reader(data)
            out = reader.read(cluster_bytes)
    except (zlib.error, zstandard.ZstdError) as error:
        raise ImageError(f"a compressed cluster is damaged: {error}") from None
    if len(out) != cluster_bytes:
        raise ImageError(f"a compressed cluster is damaged: it holds {len(out)} bytes instead of {cluster_bytes}")
    return out
