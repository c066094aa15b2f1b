"""Which pieces of a range are equal at two places, told by hashes: they are all that goes over the link.

    a range   512 KiB   one digest, or one for each 64 KiB      equal: done
    leaves    4 KiB     a digest each                           those that differ are named, or sent

The hash is SHA-256 (https://csrc.nist.gov/pubs/fips/180-4/upd1/final). What it says is equal is not sent, so
whoever writes to a disk must not be able to make two contents of one hash. A processor with instructions for it
does 1.8 GB/s, twice what it does of BLAKE2b.
"""

from __future__ import annotations

import hashlib
from typing import Final

from bitarray import bitarray

from tapcore.layout import Buffer

DIGEST_BYTES: Final = 32
LEAF_BYTES: Final = 4096
GRAIN_BYTES: Final = 64 << 10
"""Of a first look at what is probably different somewhere."""
MAX_PIECES: Final = 128
"""Of one range."""
MAX_MASK_BYTES: Final = MAX_PIECES // 8

Extents = list[tuple[int, int]]
"""(offset, length), ascending and apart."""


def pieces_of(length: int, grain: int) -> int:
    """How many pieces of `grain` bytes there are in `length`; the last one may be shorter."""
    return -(-length // grain)


def piece_digests(data: Buffer, grain: int) -> bytes:
    """The digests of the pieces of `data`, one after the other."""
    view = memoryview(data)
    return b"".join(hashlib.sha256(view[start : start + grain]).digest() for start in range(0, len(view), grain))


def differing(data: Buffer, grain: int, digests: bytes) -> bytes:
    """A bit for each piece of `data`, lowest first: whether its digest is another one than that in `digests`."""
    own = piece_digests(data, grain)
    bits = bitarray((own[at : at + DIGEST_BYTES] != digests[at : at + DIGEST_BYTES]
                     for at in range(0, len(own), DIGEST_BYTES)), endian="little")
    return bits.tobytes()


def is_mask(mask: bytes, length: int, grain: int) -> bool:
    """Whether `mask` has bits for the pieces of such a range, and no others."""
    pieces = pieces_of(length, grain)
    return len(mask) == -(-pieces // 8) and int.from_bytes(mask, "little") >> pieces == 0


def extents_of(mask: bytes, offset: int, length: int, grain: int) -> tuple[Extents, Extents]:
    """Of the range at `offset`, by the `mask` of its pieces: (what differs, what is equal)."""
    bits = bitarray(endian="little")
    bits.frombytes(mask)
    del bits[pieces_of(length, grain) :]
    found: tuple[Extents, Extents] = [], []
    first = 0
    while first < len(bits):
        stop = bits.find(not bits[first], first)
        if stop < 0:
            stop = len(bits)
        end = min(stop * grain, length)
        found[0 if bits[first] else 1].append((offset + first * grain, end - first * grain))
        first = stop
    return found
