"""The take / commit / reclaim rule: every interleaving of a small model, and an oracle made of sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from writelog.bitmap import Bitmap, bitmap_bytes
from writelog.dirtymap import CHUNK_BYTES, MAX_LEASE_ID, WINDOW_BLOCKS, DirtyMap, Lease, Wanted

BLOCK = 4096


def bitmaps(size_bytes: int, granularity_bytes: int = BLOCK) -> tuple[Bitmap, Bitmap]:
    length = bitmap_bytes(size_bytes, granularity_bytes)
    return (Bitmap(bytearray(length), size_bytes, granularity_bytes),
            Bitmap(bytearray(length), size_bytes, granularity_bytes))


def make(blocks: int, kind: type[DirtyMap] = DirtyMap) -> DirtyMap:
    return kind(*bitmaps(blocks * BLOCK))


def take_all(dirty_map: DirtyMap, lease: Lease, limit: int = 1000) -> list[int]:
    """The blocks that a TAKE of everything moves."""
    return list(_blocks(dirty_map, lambda start: dirty_map.take(lease, start, dirty_map.blocks, limit)))


def peek_all(dirty_map: DirtyMap, limit: int = 1000) -> list[int]:
    return list(_blocks(dirty_map, lambda start: dirty_map.peek(start, dirty_map.blocks, limit)))


def _blocks(dirty_map: DirtyMap, step) -> Iterator[int]:  # type: ignore[no-untyped-def]
    start = 0
    unit = dirty_map.sectors_per_block
    while start < dirty_map.blocks:
        found, start = step(start)
        for sector, count in zip(found[::2], found[1::2], strict=True):
            yield from range(sector // unit, -(-(sector + count) // unit))


# The model

class World:
    """Two blocks of a disk and their copy at a client. Writer 0 writes both blocks, writer 1 the second one.

    `disk`, `copy` and `got` hold the version of each block: 0, or 1 + the writer whose data it is.
    """

    WRITES = ((0, 2), (1, 1))

    def __init__(self, kind: type[DirtyMap]) -> None:
        self.kind = kind
        self.map = make(2, kind)
        self.disk = [0, 0]
        self.copy = [0, 0]
        self.stage = ["new", "new"]
        self.lease: Lease | None = None
        self.got: dict[int, int | None] = {}
        """The leased blocks, and the version that the client has read of each."""
        self.takes = 3
        self.ends = 2
        """How often the client or the tapdisk may still die."""

    def key(self) -> object:
        return (tuple(self.disk), tuple(self.copy), tuple(self.stage), tuple(sorted(self.got.items())),
                self.lease is None, self.takes, self.ends, self.map.dirty.bits.to01(), self.map.taken.bits.to01())

    def actions(self) -> list[tuple[str, int]]:
        out = []
        for writer, stage in enumerate(self.stage):
            out += {"new": [("submit", writer)], "under way": [("land", writer), ("end", writer)],
                    "landed": [("end", writer)], "ended": []}[stage]
        if self.takes:
            out.append(("take", 0))
        if self.lease is not None:
            out += [("read", block) for block, version in self.got.items() if version is None]
            out += [("commit", block) for block, version in self.got.items() if version is not None]
            out.append(("finish", 0))
            if self.ends:
                out.append(("client dies", 0))
        if self.ends:
            out.append(("tapdisk dies", 0))
        return out

    def act(self, action: tuple[str, int]) -> None:
        what, which = action
        if what == "submit":
            first, count = self.WRITES[which]
            self.map.dirty.mark(first * BLOCK, count * BLOCK)
            self.map.in_flight[which] = (first * BLOCK, count * BLOCK)
            self.stage[which] = "under way"
        elif what == "land":
            first, count = self.WRITES[which]
            self.disk[first : first + count] = [which + 1] * count
            self.stage[which] = "landed"
        elif what == "end":
            del self.map.in_flight[which]
            self.stage[which] = "ended"
        elif what == "take":
            self.takes -= 1
            self.lease = self.lease or self.map.open_lease()
            self.got = dict.fromkeys(take_all(self.map, self.lease)) | self.got
        elif what == "read":
            self.got[which] = self.disk[which]
        elif what == "commit":
            assert self.lease is not None
            version = self.got.pop(which)
            assert version is not None
            self.copy[which] = version
            self.map.commit(self.lease, which, which + 1)
        elif what in ("finish", "client dies"):
            assert self.lease is not None
            self.map.close_lease(self.lease)
            self.lease, self.got = None, {}
            self.ends -= what == "client dies"
        else:
            assert what == "tapdisk dies"
            self.map = self.kind(self.map.dirty, self.map.taken)
            self.stage = ["ended" if stage in ("under way", "landed") else stage for stage in self.stage]
            self.lease, self.got = None, {}
            self.ends -= 1

    def lost(self) -> list[int]:
        """Blocks that the log takes for safe and that are not."""
        out = []
        in_flight = {block for first, count in self.map.in_flight.values()
                     for block in range(first // BLOCK, (first + count) // BLOCK)}
        for block in range(2):
            known = self.map.dirty.bits[block] or self.map.taken.bits[block]
            if not known and (self.copy[block] != self.disk[block] or block in in_flight):
                out.append(block)
        return out


def explore(kind: type[DirtyMap]) -> tuple[int, list[tuple[str, int]] | None]:
    """Every state that any order of actions leads to: how many there are, and a way to a loss."""
    seen: set[object] = set()
    paths: list[list[tuple[str, int]]] = [[]]
    while paths:
        path = paths.pop()
        world = World(kind)
        for action in path:
            world.act(action)
        if world.lost():
            return len(seen), path
        key = world.key()
        if key not in seen:
            seen.add(key)
            paths += [[*path, action] for action in world.actions()]
    return len(seen), None


def test_no_interleaving_loses_a_write() -> None:
    states, loss = explore(DirtyMap)
    assert loss is None
    assert states > 2000


class TakesInFlight(DirtyMap):
    def _blocks_in_flight(self) -> list[tuple[int, int]]:
        return []


class TakesLeased(DirtyMap):
    def take(
        self, lease: Lease, start: int, stop: int, limit: int, wanted: Wanted | None = None
    ) -> tuple[list[int], int]:
        leased = self.taken.bits.copy()
        self.taken.bits.setall(0)
        taken = super().take(lease, start, stop, limit, wanted)
        self.taken.bits |= leased
        return taken


class ForgetsLeases(DirtyMap):
    def close_lease(self, lease: Lease) -> None:
        self.commit(lease, 0, self.blocks)
        super().close_lease(lease)


class ForgetsAtCrash(DirtyMap):
    def __init__(self, dirty: Bitmap, taken: Bitmap) -> None:
        taken.bits.setall(0)
        super().__init__(dirty, taken)


@pytest.mark.parametrize("broken", [TakesInFlight, TakesLeased, ForgetsLeases, ForgetsAtCrash])
def test_the_model_notices_a_broken_rule(broken: type[DirtyMap]) -> None:
    _, loss = explore(broken)
    assert loss is not None


# The oracle

class Oracle(RuleBasedStateMachine):
    """A DirtyMap of 100 blocks and sets of block numbers that should be the same."""

    blocks = st.integers(0, 99)
    counts = st.integers(1, 30)

    def __init__(self) -> None:
        super().__init__()
        self.map = make(100)
        self.dirty: set[int] = set()
        self.in_flight: dict[object, set[int]] = {}
        self.leases: dict[int, set[int]] = {}

    @rule(first=blocks, count=counts, late=st.booleans())
    def write(self, first: int, count: int, late: bool) -> None:
        count = min(count, 100 - first)
        self.map.dirty.mark(first * BLOCK, count * BLOCK)
        self.dirty |= set(range(first, first + count))
        if late:
            key = object()
            self.map.in_flight[key] = (first * BLOCK, count * BLOCK)
            self.in_flight[key] = set(range(first, first + count))

    @precondition(lambda self: self.in_flight)
    @rule()
    def end(self) -> None:
        key = next(iter(self.in_flight))
        del self.in_flight[key]
        del self.map.in_flight[key]

    @precondition(lambda self: len(self.leases) < 3)
    @rule()
    def open(self) -> None:
        self.leases[self.map.open_lease().id] = set()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), first=blocks, count=counts, limit=st.integers(1, 4),
          cuts=st.none() | st.lists(blocks, unique=True, min_size=2))
    def take(self, data: st.DataObject, first: int, count: int, limit: int, cuts: list[int] | None) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        stop = min(first + count, 100)
        ranges = list(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)) if cuts is not None else [(0, 100)]
        wanted = None if cuts is None else Wanted(ranges)
        found, following = self.map.take(self.map.leases[lease], first, stop, limit, wanted)
        leased = set().union(*self.leases.values())
        busy: set[int] = set().union(*self.in_flight.values())
        may = (self.dirty - leased - busy) & set(range(first, following))
        may &= {block for low, high in ranges for block in range(low, high)}
        taken = {block for sector, sectors in zip(found[::2], found[1::2], strict=True)
                 for block in range(sector // 8, (sector + sectors) // 8)}
        assert taken == may
        assert following == stop or len(found) == 2 * limit
        self.dirty -= taken
        self.leases[lease] |= taken

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), first=blocks, count=counts, commit=st.booleans())
    def settle(self, data: st.DataObject, first: int, count: int, commit: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        part = self.leases[lease] & set(range(first, first + count))
        (self.map.commit if commit else self.map.reclaim)(self.map.leases[lease], first, min(first + count, 100))
        self.leases[lease] -= part
        if not commit:
            self.dirty |= part

    @precondition(lambda self: self.leases)
    @rule()
    def close(self) -> None:
        lease, held = self.leases.popitem()
        self.map.close_lease(self.map.leases[lease])
        self.dirty |= held

    @rule()
    def clear(self) -> None:
        self.map.clear()
        self.dirty &= set().union(*self.in_flight.values())

    @rule()
    def crash(self) -> None:
        self.map = DirtyMap(self.map.dirty, self.map.taken)
        self.dirty |= set().union(*self.leases.values())
        self.leases, self.in_flight = {}, {}

    @invariant()
    def agrees(self) -> None:
        leased = set().union(*self.leases.values())
        assert set(self.map.dirty.bits.search(1)) == self.dirty
        assert set(self.map.taken.bits.search(1)) == leased
        assert peek_all(self.map, 3) == sorted(self.dirty | leased)
        bits = bytearray(13)
        self.map.copy_bits(0, 100, memoryview(bits))
        assert set(bitarray(bytes(bits), endian="little").search(1)) == self.dirty | leased


TestOracle = Oracle.TestCase
TestOracle.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Single rules

def test_watched_writes_touch_their_chunks() -> None:
    dirty_map = make(100)
    dirty_map.mark(0, BLOCK)
    touched = dirty_map.watch()
    assert not touched.bits.any()
    dirty_map.mark(3 * CHUNK_BYTES - 1, 2)
    assert list(touched.bits.search(1)) == [2, 3]
    assert list(dirty_map.dirty.bits.search(1)) == [0, 47, 48]
    dirty_map.unwatch()
    dirty_map.mark(0, BLOCK)
    assert list(touched.bits.search(1)) == [2, 3]


def test_fault_3_a_write_in_flight_stays_in_the_log() -> None:
    dirty_map = make(4)
    dirty_map.dirty.mark(0, 4 * BLOCK)
    dirty_map.in_flight["write"] = (BLOCK, 2 * BLOCK)
    lease = dirty_map.open_lease()
    assert take_all(dirty_map, lease) == [0, 3]
    dirty_map.commit(lease, 0, 4)
    del dirty_map.in_flight["write"]
    assert peek_all(dirty_map) == [1, 2]


def test_fault_4_clear_stops_at_the_disks_end_and_at_writes_in_flight() -> None:
    dirty_map = make(70)
    dirty_map.dirty.fill()
    dirty_map.in_flight["a"] = (68 * BLOCK, 2 * BLOCK)
    dirty_map.in_flight["b"] = (10 * BLOCK, 1)
    dirty_map.in_flight["c"] = (10 * BLOCK + 5, BLOCK)
    dirty_map.clear()
    assert list(dirty_map.dirty.bits.search(1)) == [10, 11, 68, 69]


def test_a_leased_block_is_not_taken_twice() -> None:
    dirty_map = make(2)
    dirty_map.dirty.mark(0, BLOCK)
    first = dirty_map.open_lease()
    assert take_all(dirty_map, first) == [0]
    dirty_map.dirty.mark(0, BLOCK)
    assert take_all(dirty_map, dirty_map.open_lease()) == []
    assert take_all(dirty_map, first) == []
    dirty_map.commit(first, 0, 2)
    assert take_all(dirty_map, first) == [0]


def test_windows_and_the_disks_end() -> None:
    granularity_bytes = 512
    blocks = 2 * WINDOW_BLOCKS + 3
    dirty_map = DirtyMap(*bitmaps(blocks * granularity_bytes, granularity_bytes))
    expected = [0, WINDOW_BLOCKS - 1, WINDOW_BLOCKS, 2 * WINDOW_BLOCKS - 1, 2 * WINDOW_BLOCKS + 2]
    for block in expected:
        dirty_map.dirty.mark(block * granularity_bytes, 1)
    assert peek_all(dirty_map) == expected
    lease = dirty_map.open_lease()
    assert take_all(dirty_map, lease) == expected
    assert peek_all(dirty_map) == expected
    dirty_map.commit(lease, WINDOW_BLOCKS, 2 * WINDOW_BLOCKS)
    dirty_map.close_lease(lease)
    assert list(dirty_map.dirty.bits.search(1)) == [0, WINDOW_BLOCKS - 1, 2 * WINDOW_BLOCKS + 2]
    assert not dirty_map.taken.bits.any()


def test_the_last_range_is_clipped_to_a_short_block() -> None:
    dirty_map = DirtyMap(*bitmaps(BLOCK + 1024))
    dirty_map.dirty.fill()
    assert dirty_map.peek(0, 2, 10) == ([0, 10], 2)


def test_blocks_inside_and_touched() -> None:
    dirty_map = DirtyMap(*bitmaps(2 * BLOCK + 512))
    assert dirty_map.inner_blocks(1, 15) == (1, 2)
    assert dirty_map.inner_blocks(0, 17) == (0, 3)
    assert dirty_map.inner_blocks(16, 1 << 31) == (2, 3)
    assert dirty_map.inner_blocks(1, 3) == (1, 0)
    assert dirty_map.outer_blocks(7, 2) == (0, 2)
    assert dirty_map.outer_blocks(16, 1 << 31) == (2, 3)


def test_lease_ids_come_round_past_those_in_use() -> None:
    dirty_map = make(1)
    kept = dirty_map.open_lease()
    for _ in range(MAX_LEASE_ID + 5):
        lease = dirty_map.open_lease()
        assert 0 < lease.id <= MAX_LEASE_ID
        assert lease.id != kept.id
        dirty_map.close_lease(lease)


@given(st.sets(st.integers(0, 99)), st.integers(0, 99 * BLOCK), st.integers(1, 100 * BLOCK))
def test_extents_are_those_of_a_scan(blocks: set[int], offset: int, length: int) -> None:
    length = min(length, 100 * BLOCK - offset)
    dirty_map = make(100)
    for block in blocks:
        dirty_map.dirty.mark(block * BLOCK, 1)
    expected: list[tuple[int, bool]] = []
    at = offset
    while at < offset + length:
        step = min((at // BLOCK + 1) * BLOCK, offset + length) - at
        is_dirty = at // BLOCK in blocks
        if expected and expected[-1][1] == is_dirty:
            expected[-1] = (expected[-1][0] + step, is_dirty)
        else:
            expected.append((step, is_dirty))
        at += step
    assert dirty_map.extents(offset, length, 1000) == expected
    cut = dirty_map.extents(offset, length, 3)
    assert len(cut) >= min(3, len(expected))
    assert cut[:-1] == expected[: len(cut) - 1]


# What a flush has not covered


def test_what_became_clean_is_kept_until_a_flush_that_began_later_has_ended() -> None:
    length = bitmap_bytes(16 * BLOCK, BLOCK)
    dirty, taken, released = (Bitmap(bytearray(length), 16 * BLOCK, BLOCK) for _ in range(3))
    dirty_map = DirtyMap(dirty, taken, released)
    dirty_map.forgets_unflushed = True

    def release(block: int) -> None:
        dirty_map.mark(block * BLOCK, BLOCK)
        lease = dirty_map.open_lease()
        dirty_map.take(lease, 0, 16, 100)
        dirty_map.commit(lease, 0, 16)
        dirty_map.close_lease(lease)

    def kept() -> list[int]:
        return list(released.bits.search(1))

    assert dirty_map.flush_begins() is None
    release(1)
    release(2)
    failing = dirty_map.flush_begins()
    assert failing is not None
    dirty_map.flush_ended(failing, 5)
    assert kept() == [1, 2]
    flush = dirty_map.flush_begins()
    assert flush is not None
    release(2)
    release(3)
    dirty_map.flush_ended(flush, 0)
    assert kept() == [2, 3]
    first = dirty_map.flush_begins()
    release(2)
    second = dirty_map.flush_begins()
    assert first is not None and second is not None
    dirty_map.flush_ended(first, 0)
    assert kept() == [2], "the second flush is for the write after the first one began"
    dirty_map.flush_ended(second, 0)
    assert kept() == []
    release(2)
    release(3)
    dirty_map.mark(7 * BLOCK, BLOCK)
    dirty_map.clear()
    assert kept() == [2, 3, 7] and not dirty.bits.any()
    assert list(DirtyMap(dirty, taken, released).dirty.bits.search(1)) == [2, 3, 7] and kept() == []
