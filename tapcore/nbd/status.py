"""Replies to NBD_CMD_BLOCK_STATUS: extents made fit for the wire, and their chunk.

An extent is (length in bytes, state bits). In base:allocation the bits are STATUS_HOLE and STATUS_ZERO of
`tapcore.request`, which equal NBD_STATE_HOLE and NBD_STATE_ZERO; in qemu:dirty-bitmap:NAME 1 is dirty, 0 clean.

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, NBD_REPLY_TYPE_BLOCK_STATUS
and https://www.qemu.org/docs/master/interop/nbd.html
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tapcore.nbd import wire
from tapcore.request import Extent

MAX_EXTENTS: Final = 4096
"""Extents of one context in one reply, 32 KiB of them; a client asks again for what is left."""


def tidy_extents(extents: Iterable[Extent], length: int, max_extents: int = MAX_EXTENTS) -> list[Extent]:
    """`extents` with equal neighbours merged and empty ones dropped, cut to `length` bytes in all and to
    `max_extents`. Reads no further than it must. An answer needs an extent: without any, all of `length` is
    said to be of state 0, which is always true enough."""
    out: list[Extent] = []
    last_length, last_state = 0, 0
    left = length
    for extent_length, state in extents:
        taken = min(extent_length, left)
        if taken == 0:
            if left == 0:
                break
            continue
        left -= taken
        if last_length and state == last_state:
            last_length += taken
            continue
        if last_length:
            out.append((last_length, last_state))
            if len(out) == max_extents:
                return out
        last_length, last_state = taken, state
    out.append((last_length, last_state) if last_length else (length, 0))
    return out


def dirty_extents(dirty: Iterable[tuple[int, int]], offset: int, length: int) -> list[Extent]:
    """The extents of qemu:dirty-bitmap for [offset, offset + length) bytes. `dirty` are the dirty ranges as
    (offset, length) bytes, ascending, not overlapping; they may reach beyond both ends."""
    out: list[Extent] = []
    position, end = offset, offset + length
    for range_offset, range_length in dirty:
        start, stop = max(range_offset, position), min(range_offset + range_length, end)
        if start >= end:
            break
        if stop <= start:
            continue
        if start > position:
            out.append((start - position, 0))
        out.append((stop - start, wire.QEMU_STATE_DIRTY))
        position = stop
    if position < end:
        out.append((end - position, 0))
    return out


def status_chunk(
    cookie: int,
    context_id: int,
    extents: Iterable[Extent],
    length: int,
    *,
    one: bool,
    done: bool,
    max_extents: int = MAX_EXTENTS,
) -> bytes:
    """The chunk that answers a block status of `length` bytes for one context, with a single extent if the
    request had NBD_CMD_FLAG_REQ_ONE (`one`). `done` marks the reply's last chunk."""
    pack = wire.STATUS_EXTENT.struct.pack
    payload = b"".join([pack(*extent) for extent in tidy_extents(extents, length, 1 if one else max_extents)])
    return (
        wire.CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=wire.NBD_REPLY_FLAG_DONE if done else 0,
                        type=wire.NBD_REPLY_TYPE_BLOCK_STATUS, cookie=cookie,
                        length=wire.STATUS_CONTEXT.size + len(payload))
        + wire.STATUS_CONTEXT.pack(context_id=context_id)
        + payload
    )
