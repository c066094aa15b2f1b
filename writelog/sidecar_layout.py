"""The side-car of a log as bytes: what of it survives the host, and how it is read back after any crash.

    0        record slot 0 ┐ written in turn; the valid one with the higher sequence counts
    32768    record slot 1 ┘
    65536    sectors of 512 bytes, 3,968 bits each: one bit for each block of the disk, dirty or leased

A record holds everything but the bits: ids, and the *hot extents*, the stretches of 4 MiB that may be written to.
It is replaced as a whole. A sector is written in place; one that is torn by a crash is damaged, and so all dirty.

What is dirty after a crash:

    a block of a hot extent            yes
    a sector of the record's epoch     as its bits say
    a sector that was never written    no if the record says that the log began empty, else yes
    any other sector                   yes: it is of a former epoch, or damaged

So one record with a new epoch, a random number, makes the whole disk dirty at once.

Limits: 64 KiB, and 512 bytes for 3,968 blocks: 33 MiB for a disk of 1 TiB with blocks of 4 KiB.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import xxhash

from tapcore.layout import Buffer, Layout
from writelog.bitmap import block_count
from writelog.generations import Generations, decode_names, encode_names

MAGIC: Final = b"wrlgsdcr"
VERSION: Final = 1
SLOT_BYTES: Final = 32768
SLOTS: Final = 2
SECTORS_OFFSET: Final = SLOT_BYTES * SLOTS
EXTENT_BYTES: Final = 4 << 20
EXTENT_SHIFT: Final = EXTENT_BYTES.bit_length() - 1

RECORD = Layout(
    "side-car record", "<",
    "checksum:Q magic:8s version:I granularity_bytes:I size_bytes:Q sequence:Q epoch:Q flags:I hot:I "
    "pairing:Q log_generation:Q current:Q base:Q history:64s former:Q :96x", size=256)
"""`checksum` covers all that follows it, hot extents included: u32 numbers, `hot` of them."""
MAX_HOT: Final = (SLOT_BYTES - RECORD.size) // 4

SECTOR = Layout("side-car sector", "<", "checksum:Q epoch:Q bits:496s", size=512)
SECTOR_BITS: Final = 3968
"""Blocks of one sector; a multiple of 8."""
_CHECKSUM_BYTES: Final = 8


class Flag(IntFlag):
    OPEN = 1
    """Opened for writing, and not closed."""
    EMPTY = 2
    """A sector that was never written has no dirty block."""


@dataclass(frozen=True)
class Record:
    """All but the bits; `hot` are numbers of extents."""

    granularity_bytes: int
    size_bytes: int
    sequence: int
    epoch: int
    flags: Flag
    pairing: int
    """What the bitmap in shared memory has to name to be the one that belongs to this: 0 for none."""
    log_generation: int
    generations: Generations
    hot: tuple[int, ...]

    @property
    def slot(self) -> int:
        """The byte where it is to be written."""
        return self.sequence % SLOTS * SLOT_BYTES

    @property
    def file_bytes(self) -> int:
        """How long the side-car of such a disk is."""
        return SECTORS_OFFSET + sector_count(block_count(self.size_bytes, self.granularity_bytes)) * SECTOR.size

    def encode(self) -> bytes:
        """Whole sectors."""
        assert len(self.hot) <= MAX_HOT
        hot = _swapped(array("I", self.hot)).tobytes()
        history = encode_names(self.generations.history)
        rest = RECORD.pack(
            checksum=0, magic=MAGIC, version=VERSION, granularity_bytes=self.granularity_bytes,
            size_bytes=self.size_bytes, sequence=self.sequence, epoch=self.epoch, flags=self.flags,
            pairing=self.pairing, log_generation=self.log_generation, current=self.generations.current,
            base=self.generations.base, former=self.generations.former, history=history,
            hot=len(self.hot))[_CHECKSUM_BYTES:] + hot
        data = xxhash.xxh3_64_intdigest(rest).to_bytes(_CHECKSUM_BYTES, "little") + rest
        return data.ljust(-(-len(data) // SECTOR.size) * SECTOR.size, b"\0")

    @classmethod
    def decode(cls, slot: bytes) -> Record | None:
        """The record in a slot; None if there is none, or it is not whole."""
        fields = RECORD.unpack(slot)
        end = RECORD.size + 4 * fields["hot"]
        if fields["magic"] != MAGIC or fields["version"] != VERSION or fields["hot"] > MAX_HOT:
            return None
        if xxhash.xxh3_64_intdigest(slot[_CHECKSUM_BYTES:end]) != fields["checksum"]:
            return None
        return cls(
            fields["granularity_bytes"], fields["size_bytes"], fields["sequence"], fields["epoch"],
            Flag(fields["flags"]), fields["pairing"], fields["log_generation"],
            Generations(fields["current"], fields["base"], decode_names(fields["history"]), fields["former"]),
            tuple(_swapped(array("I", slot[RECORD.size : end]))))


def newest(slots: Sequence[bytes]) -> Record | None:
    """The record that counts."""
    records = [record for slot in slots if (record := Record.decode(slot)) is not None]
    return max(records, key=lambda record: record.sequence, default=None)


def is_of_another_kind(slots: Sequence[bytes]) -> bool:
    """Whether these are the beginning of a file that is no side-car, or one of a later version."""
    heads = [RECORD.unpack(slot) for slot in slots]
    return any(slot.strip(b"\0") for slot in slots) and not any(
        head["magic"] == MAGIC and head["version"] == VERSION for head in heads)


def sector_count(blocks: int) -> int:
    return -(-blocks // SECTOR_BITS)


def encode_sector(number: int, epoch: int, bits: bytes) -> bytes:
    """`bits` are at most 496 bytes; what is missing is zero."""
    rest = SECTOR.struct.pack(0, epoch, bits)[_CHECKSUM_BYTES:]
    return xxhash.xxh3_64_intdigest(rest, number).to_bytes(_CHECKSUM_BYTES, "little") + rest


def decode_sector(number: int, data: bytes, record: Record) -> bytes | None:
    """The 496 bytes of bits of a sector; None if all its blocks count as dirty."""
    checksum, epoch, bits = SECTOR.struct.unpack(data)
    if epoch == record.epoch and checksum == xxhash.xxh3_64_intdigest(data[_CHECKSUM_BYTES:], number):
        return bytes(bits)
    if record.flags & Flag.EMPTY and not any(data):
        return bytes(SECTOR_BITS // 8)
    return None


def blocks_of_extent(extent: int, record: Record) -> tuple[int, int]:
    """The blocks [first, stop) of an extent; stop may lie behind the disk's end."""
    blocks = EXTENT_BYTES // record.granularity_bytes
    return extent * blocks, (extent + 1) * blocks


def _swapped(words: array[int]) -> array[int]:
    if sys.byteorder == "big":
        words.byteswap()
    return words


def slots_of(data: Buffer) -> list[bytes]:
    """The two slots at the start of a file, padded if it is shorter."""
    head = bytes(data[:SECTORS_OFFSET]).ljust(SECTORS_OFFSET, b"\0")
    return [head[:SLOT_BYTES], head[SLOT_BYTES:]]
