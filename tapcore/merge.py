"""Neighbouring requests of a batch as one: fewer, longer requests for the chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tapcore.request import Request

MERGE_MAX_BYTES: Final = 1 << 20
MERGE_MAX_PIECES: Final = 256


def merge(batch: Sequence[Request], first: int, done: Callable[[Request], None]) -> tuple[Request, int]:
    """The neighbours that begin at index `first` as one request (itself, if it stays alone) with `done`, and the
    index of the request after them."""
    lead = batch[first]
    end = lead.offset
    length_bytes = pieces = 0
    index = first
    while index < len(batch):
        part = batch[index]
        length_bytes += part.length
        pieces += len(part.iov)
        if (part.offset != end or part.op != lead.op or part.flags != lead.flags
                or length_bytes > MERGE_MAX_BYTES or pieces > MERGE_MAX_PIECES):
            break
        end += part.length
        index += 1
    if index <= first + 1:
        return lead, first + 1
    parts = list(batch[first:index])
    merged = Request(lead.op, lead.offset, end - lead.offset, [view for part in parts for view in part.iov],
                     lead.flags, done)
    merged.parts = parts
    return merged, index
