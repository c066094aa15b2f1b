"""The dirty map: what changed, what a client has in hand, and what neither may forget.

A block is clean, dirty, leased, or leased and dirty again:

    write submitted ──▶ dirty ──TAKE──▶ leased ──COMMIT──▶ clean
                          ▲                └────RECLAIM──▶ dirty

- A write marks its blocks when it is submitted and stays known as *in flight* until it ends.
- TAKE moves dirty blocks to a lease, but none with a write in flight: the client would read the old data, commit
  it, and the write would be forgotten. Such a block stays in the log and comes with a later TAKE. This holds for
  every way of taking, the original `getw` included: a block that is left in the log is dirty when its write ends,
  and there is no moment at which a crash could lose it, as there is if the bit is cleared and set again.
- TAKE leaves out blocks that are leased already, for the same reason: the COMMIT of the older reading would forget
  the newer one. So the leases are disjoint, and a block has one version under way at a time.
- CLEAR, which empties the log unseen, also leaves in-flight and leased blocks alone.
- `peek` shows dirty and leased blocks: what is leased is not confirmed anywhere yet.
- While somebody `watch`es, each write also sets the bits of the chunks it touches in a third bitmap. It says what
  is written *again*, which a dirty bit cannot.

The bits of leased blocks are in a second bitmap beside the dirty one, in the same memory that outlives the
process: whoever attaches after a crash takes them for dirty. Each change sets the bit that keeps a block before it
clears the other one.

Where an image's tables are in the process's memory until a flush, its death takes back what was written since,
also what a client has read and committed. So there the blocks that became clean are kept in another bitmap,
`released`, until a flush that began later has ended; they are taken for dirty after a crash, too.

All of it belongs to the loop's thread. Work on a big disk is done a *window* of blocks at a time: the views are
byte-aligned (see `writelog.bitmap`), and a `peek` or `take` costs the loop a fraction of a millisecond.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

from bitarray import bitarray
from bitarray.util import any_and, zeros

from tapcore.errors import LogError
from writelog.bitmap import SECTOR_BYTES, Bitmap, bitmap_bytes, runs

WINDOW_BLOCKS = 1 << 20
"""Blocks looked at in one go: 128 KiB of each bitmap. A multiple of 8; one window is below 2^32 sectors."""

CHUNK_BYTES = 64 << 10
"""What one bit of the watched writes stands for."""

MAX_LEASE_ID = 0xFFFF
"""An id has 16 bits on the wire; 0 means none."""


class Lease:
    """Blocks that one client holds: a private bitmap for each window that has any."""

    __slots__ = ("id", "windows")

    def __init__(self, lease_id: int) -> None:
        self.id = lease_id
        self.windows: dict[int, bitarray] = {}

    def add(self, first: int, mask: bitarray) -> None:
        """The blocks set in `mask`, whose bit 0 is block `first`; all in one window."""
        number, start = divmod(first, WINDOW_BLOCKS)
        held = self.windows.get(number)
        if held is None:
            held = self.windows[number] = zeros(WINDOW_BLOCKS, "little")
        held[start : start + len(mask)] |= mask

    def remove(self, first: int, stop: int) -> Iterator[tuple[int, bitarray]]:
        """Give up the blocks [first, stop): (first block, mask) a window, whose both ends are multiples of 8."""
        for number in sorted(self.windows):
            base = number * WINDOW_BLOCKS
            start, end = max(first - base, 0), min(stop - base, WINDOW_BLOCKS)
            if start >= end:
                continue
            held = self.windows[number]
            low, high = start & ~7, (end + 7) & ~7
            mask = held[low:high]
            mask[: start - low] = 0
            mask[end - low :] = 0
            if not mask.any():
                continue
            yield base + low, mask
            held[start:end] = 0
            if not held.any():
                del self.windows[number]


class Wanted:
    """Runs of blocks [first, stop), ascending and apart, to which a `take` is to be confined."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._firsts = [first for first, _ in ranges]
        self._stops = [stop for _, stop in ranges]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """From the first wanted block to the last, of the blocks [start, stop); empty if there is none."""
        low, high = bisect_right(self._stops, start), bisect_left(self._firsts, stop)
        if low >= high:
            return stop, stop
        return max(start, self._firsts[low]), min(stop, self._stops[high - 1])

    def mask(self, start: int, stop: int) -> bitarray:
        """A bit for each of the blocks [start, stop)."""
        bits = zeros(stop - start, "little")
        for index in range(bisect_right(self._stops, start), bisect_left(self._firsts, stop)):
            bits[max(self._firsts[index] - start, 0) : self._stops[index] - start] = 1
        return bits


class DirtyMap:
    """The state above over bitmaps of the same disk. What `taken` and `released` hold at first is dirty."""

    def __init__(self, dirty: Bitmap, taken: Bitmap, released: Bitmap | None = None) -> None:
        self.dirty = dirty
        self.taken = taken
        self.released = released
        self.forgets_unflushed = False
        """The death of this process takes back what was written since the last flush."""
        self._unflushed = Lease(0)
        self._flushing: list[Lease] = []
        """What flushes that are under way are to make durable."""
        """Released since the last flush began."""
        self.blocks = dirty.blocks
        self.sectors_per_block = dirty.granularity_bytes // SECTOR_BYTES
        self.sectors = dirty.size_bytes // SECTOR_BYTES
        self.in_flight: dict[object, tuple[int, int]] = {}
        """(offset, length) in bytes of every write that has not ended, by whatever names it. Who submits a write
        marks `dirty` first, then enters it here if it is under way, and removes it when it has ended, well or not.
        """
        self.mark = dirty.mark
        """What a write calls with its offset and length when it is submitted."""
        self.cleared: Callable[[int, int], None] = lambda first, stop: None
        """Called with the blocks [first, stop) after bits of theirs were cleared in both bitmaps."""
        self.leases: dict[int, Lease] = {}
        self._touched: Bitmap | None = None
        self._last_lease_id = 0
        for kept in (taken, released):
            if kept is not None and kept.bits.any():
                dirty.bits |= kept.bits
                kept.bits.setall(0)

    def watch(self) -> Bitmap:
        """The chunks that are written to, from the first call on; the caller clears what it has seen."""
        if self._touched is None:
            size_bytes = self.dirty.size_bytes
            self._touched = Bitmap(bytearray(bitmap_bytes(size_bytes, CHUNK_BYTES)), size_bytes, CHUNK_BYTES)
            self.mark = self._mark_watched
        return self._touched

    def unwatch(self) -> None:
        self._touched = None
        self.mark = self.dirty.mark

    def _mark_watched(self, offset: int, length: int) -> None:
        assert self._touched is not None
        self.dirty.mark(offset, length)
        self._touched.mark(offset, length)

    def peek(self, start: int, stop: int, limit: int) -> tuple[list[int], int]:
        """Runs of dirty or leased blocks from block `start` on, at most `limit`, not past `stop` or one window.

        They are pairs of sector and count in one flat list, clipped to the disk's end; returned with it is the
        block to go on from.
        """
        end = min(stop, (start // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS)
        if self.dirty.bits.find(1, start, end) < 0 and self.taken.bits.find(1, start, end) < 0:
            return [], end
        low, high = start & ~7, (end + 7) & ~7
        seen = self.dirty.view(low, high) | self.taken.view(low, high)
        return self._runs(seen, low, start, end, limit)

    def take(
        self, lease: Lease, start: int, stop: int, limit: int, wanted: Wanted | None = None
    ) -> tuple[list[int], int]:
        """Move what may be taken from block `start` on to `lease`, within the bounds of `peek`, and of `wanted`;
        returns what it moved as `peek` does."""
        window_end = end = min(stop, (start // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS)
        if wanted is not None:
            start, end = wanted.span(start, end)
        if self.dirty.bits.find(1, start, end) < 0:
            return [], window_end
        low, high = start & ~7, (end + 7) & ~7
        dirty, taken = self.dirty.view(low, high), self.taken.view(low, high)
        mask = bitarray(dirty)
        if any_and(mask, taken):
            mask &= ~taken
        for first, after in self._blocks_in_flight():
            mask[max(first - low, 0) : max(after - low, 0)] = 0
            if self._touched is not None and first < high and after > low:
                # It stays in the log, which the taker is to hear of.
                offset = first << self.dirty.shift
                self._touched.mark(offset, min(after << self.dirty.shift, self.dirty.size_bytes) - offset)
        if wanted is not None:
            mask &= wanted.mask(low, high)
        found, following = self._runs(mask, low, start, end, limit)
        if found:
            mask[: start - low] = 0
            mask[following - low :] = 0
            taken |= mask
            lease.add(low, mask)
            dirty &= ~mask
        return found, window_end if following == end else following

    def open_lease(self) -> Lease:
        """A new lease that holds nothing; LogError when every id is in use."""
        for _ in range(MAX_LEASE_ID):
            self._last_lease_id = self._last_lease_id % MAX_LEASE_ID + 1
            if self._last_lease_id not in self.leases:
                lease = self.leases[self._last_lease_id] = Lease(self._last_lease_id)
                return lease
        raise LogError(f"{len(self.leases)} leases are open", hint="commit or reclaim some of them")

    def commit(self, lease: Lease, first: int, stop: int) -> None:
        """Forget what `lease` holds of the blocks [first, stop): their data is safe with the client."""
        for base, mask in lease.remove(first, stop):
            self._release(base, mask)
            taken = self.taken.view(base, base + len(mask))
            taken &= ~mask
            self.cleared(base, min(base + len(mask), self.blocks))

    def _release(self, base: int, mask: bitarray) -> None:
        if self.forgets_unflushed and self.released is not None and mask.any():
            released = self.released.view(base, base + len(mask))
            released |= mask
            self._unflushed.add(base, mask)

    def flush_begins(self) -> Lease | None:
        """A flush is about to be queued: what it is to be given to `flush_ended`, or None."""
        if not self._unflushed.windows:
            return None
        batch, self._unflushed = self._unflushed, Lease(0)
        self._flushing.append(batch)
        return batch

    def flush_ended(self, batch: Lease, code: int) -> None:
        """It has ended, with an errno or 0."""
        assert self.released is not None
        self._flushing = [other for other in self._flushing if other is not batch]
        for base, mask in batch.remove(0, self.blocks):
            if code:
                self._unflushed.add(base, mask)
                continue
            number, start = divmod(base, WINDOW_BLOCKS)
            for other in (self._unflushed, *self._flushing):
                later = other.windows.get(number)  # became clean again since: the next flush is for that
                if later is not None:
                    mask &= ~later[start : start + len(mask)]
            released = self.released.view(base, base + len(mask))
            released &= ~mask

    def reclaim(self, lease: Lease, first: int, stop: int) -> None:
        """What `lease` holds of the blocks [first, stop) is dirty again."""
        for base, mask in lease.remove(first, stop):
            dirty = self.dirty.view(base, base + len(mask))
            dirty |= mask
            taken = self.taken.view(base, base + len(mask))
            taken &= ~mask

    def close_lease(self, lease: Lease) -> None:
        """Reclaim what is left of `lease` and forget its id."""
        self.reclaim(lease, 0, self.blocks)
        del self.leases[lease.id]

    def clear(self) -> None:
        """Forget every dirty block that has no write in flight."""
        bits = self.dirty.bits
        for low in range(0, self.blocks, WINDOW_BLOCKS) if self.forgets_unflushed else ():
            self._release(low, bitarray(self.dirty.view(low, (min(low + WINDOW_BLOCKS, self.blocks) + 7) & ~7)))
        start = 0
        for first, after in sorted(self._blocks_in_flight()):
            if first > start:
                bits[start:first] = 0
            start = max(start, after)
        bits[start:] = 0
        self.cleared(0, self.blocks)

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """(length in bytes, dirty or leased?) of the extents from byte `offset` on, consecutive and alternating.
        They cover [offset, offset + length); once there are `limit` they may end earlier."""
        shift, stop = self.dirty.shift, offset + length
        block, last_block = offset >> shift, ((stop - 1) >> shift) + 1
        out: list[tuple[int, bool]] = []
        at = offset
        while block < last_block and len(out) < limit:
            found, block = self.peek(block, last_block, limit)
            for sector, count in zip(found[::2], found[1::2], strict=True):
                first = max(sector * SECTOR_BYTES, offset)
                after = min((sector + count) * SECTOR_BYTES, stop)
                if first > at:
                    out.append((first - at, False))
                    out.append((after - first, True))
                elif out:
                    out[-1] = (out[-1][0] + after - at, True)
                else:
                    out.append((after - at, True))
                at = after
        seen_up_to = min(stop, block << shift)
        if seen_up_to > at:
            out.append((seen_up_to - at, False))
        return out

    def copy_bits(self, start: int, stop: int, out: memoryview) -> None:
        """The dirty or leased blocks [start, stop) as bits, from bit 0 of `out` on, and zeroes up to the next
        multiple of 8. `start` is a multiple of 8."""
        high = (stop + 7) & ~7
        seen = bitarray(buffer=out[: (high - start) >> 3], endian="little")
        seen.setall(0)
        seen |= self.dirty.view(start, high)
        seen |= self.taken.view(start, high)
        seen[stop - start :] = 0

    def inner_blocks(self, sector: int, count: int) -> tuple[int, int]:
        """The blocks [first, stop) that lie in the given sectors entirely; a short last block counts as whole."""
        stop_sector = min(sector + count, self.sectors)
        stop = self.blocks if stop_sector == self.sectors else stop_sector // self.sectors_per_block
        return -(-sector // self.sectors_per_block), stop

    def outer_blocks(self, sector: int, count: int) -> tuple[int, int]:
        """The blocks [first, stop) that the given sectors touch."""
        stop_sector = min(sector + count, self.sectors)
        return sector // self.sectors_per_block, -(-stop_sector // self.sectors_per_block)

    def _blocks_in_flight(self) -> list[tuple[int, int]]:
        shift = self.dirty.shift
        return [(offset >> shift, ((offset + length - 1) >> shift) + 1)
                for offset, length in self.in_flight.values()]

    def _runs(self, bits: bitarray, low: int, start: int, end: int, limit: int) -> tuple[list[int], int]:
        unit = self.sectors_per_block
        found, following = runs(bits, start - low, end - low, limit, low, unit)
        if found and found[-2] + found[-1] > self.sectors:
            found[-1] = self.sectors - found[-2]
        return found, following + low
