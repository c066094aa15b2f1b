"""The order of what is left to send; and that it forgets nothing, whatever the log and the replica do."""

from __future__ import annotations

from bitarray.util import zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from writelog.backlog import Backlog, Runs, chunk_runs
from writelog.bitmap import Bitmap, bitmap_bytes
from writelog.dirtymap import CHUNK_BYTES, DirtyMap, Lease, Wanted

BLOCK = 4096
SAMPLE_S = 0.5
CHUNKS = 24
SIZE = CHUNKS * CHUNK_BYTES - 512


def heated(touches: dict[int, int]) -> Backlog:
    """All pending, the chunks touched in so many samples."""
    backlog = Backlog(SIZE)
    backlog.add_all()
    for number in range(max(touches.values(), default=0) + 1):
        bits = zeros(CHUNKS, "little")
        for chunk, times in touches.items():
            bits[chunk] = number < times
        backlog.touch(number * SAMPLE_S, bits)
    return backlog


def test_coldest_first_by_address_and_in_one_piece() -> None:
    backlog = heated({2: 1, 3: 1, 10: 6, 23: 3})
    assert backlog.next(10 * CHUNK_BYTES) == [
        (8 * CHUNK_BYTES, 2 * CHUNK_BYTES), (11 * CHUNK_BYTES, 8 * CHUNK_BYTES)]
    # Where two of eight are warm, the others come later.
    assert backlog.next(10 * CHUNK_BYTES) == [
        (0, 2 * CHUNK_BYTES), (4 * CHUNK_BYTES, 4 * CHUNK_BYTES), (19 * CHUNK_BYTES, 4 * CHUNK_BYTES)]
    assert backlog.next(2 * CHUNK_BYTES) == [(2 * CHUNK_BYTES, 2 * CHUNK_BYTES)]
    assert backlog.next(CHUNK_BYTES) == [(23 * CHUNK_BYTES, CHUNK_BYTES - 512)]
    assert backlog.next(CHUNK_BYTES) == [(10 * CHUNK_BYTES, CHUNK_BYTES)]
    assert backlog.next(CHUNK_BYTES) == []


def test_a_chunk_that_is_out_waits_for_its_confirmation() -> None:
    backlog = heated({})
    backlog.next(SIZE)
    backlog.took([(0, CHUNKS)])
    bits = zeros(CHUNKS, "little")
    bits[5] = 1
    backlog.touch(10, bits)
    assert backlog.next(SIZE) == []
    backlog.confirmed([(0, CHUNKS)])
    backlog.sort()
    assert backlog.next(SIZE) == [(5 * CHUNK_BYTES, CHUNK_BYTES)]


def test_what_a_stream_wrote_last_is_sent_first_and_what_it_will_write_next_last() -> None:
    chunks = 200
    backlog = Backlog(chunks * CHUNK_BYTES)
    backlog.add_all()
    for number in range(3):
        bits = zeros(chunks, "little")
        bits[48 + 24 * number : 72 + 24 * number] = 1
        backlog.touch(number * SAMPLE_S, bits, send_rate=chunks * CHUNK_BYTES / (2 * SAMPLE_S))

    def following(count: int) -> tuple[int, int]:
        return chunk_runs(backlog.next(count * CHUNK_BYTES))[0]

    assert following(48) == (0, 48)
    assert following(32) == (168, 200)
    assert [following(24) for _ in range(3)] == [(96, 120), (72, 96), (48, 72)]
    assert [following(12) for _ in range(4)] == [(156, 168), (144, 156), (132, 144), (120, 132)]
    assert not backlog.is_lined_up


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 60), st.sampled_from([0.5, 3.0])), max_size=20),
       st.integers(1, 50))
def test_all_that_is_pending_is_given_out_once(writes: list[tuple[int, int, float]], portion: int) -> None:
    chunks = 200
    backlog = Backlog(chunks * CHUNK_BYTES)
    backlog.add_all()
    backlog.sort()
    now_s = 0.0
    for first, count, pause_s in writes:
        bits = zeros(chunks, "little")
        bits[first : first + count] = 1
        backlog.touch(now_s, bits, 1e6)
        now_s += pause_s
    given_out: list[int] = []
    while ranges := backlog.next(portion * CHUNK_BYTES):
        assert sum(length for _, length in ranges) <= portion * CHUNK_BYTES
        given_out += [chunk for first, stop in chunk_runs(ranges) for chunk in range(first, stop)]
    assert sorted(given_out) == list(range(chunks))
    assert backlog.pending_bytes == 0


def test_chunks_of_extents() -> None:
    assert chunk_runs([(0, 1), (BLOCK, BLOCK), (CHUNK_BYTES - 1, 2), (5 * CHUNK_BYTES, CHUNK_BYTES)]) == [
        (0, 2), (5, 6)]


class World(RuleBasedStateMachine):
    """A DirtyMap and a Backlog, with writes, takings, confirmations and lost connections in any order. Invariant:
    every dirty block is in a chunk that the backlog knows of, or will hear of with the log's next news."""

    def __init__(self) -> None:
        super().__init__()
        length = bitmap_bytes(SIZE, BLOCK)
        self.map = DirtyMap(Bitmap(bytearray(length), SIZE, BLOCK), Bitmap(bytearray(length), SIZE, BLOCK))
        self.news = self.map.watch()
        self.backlog = Backlog(SIZE)
        self.portions: list[tuple[Lease, Runs]] = []
        self.now_s = 0.0

    @rule(block=st.integers(0, SIZE // BLOCK), count=st.integers(1, 40), late=st.booleans())
    def write(self, block: int, count: int, late: bool) -> None:
        offset = block * BLOCK
        length = min(count * BLOCK, SIZE - offset)
        self.map.mark(offset, length)
        if late:
            self.map.in_flight[object()] = (offset, length)

    @precondition(lambda self: self.map.in_flight)
    @rule()
    def end(self) -> None:
        del self.map.in_flight[next(iter(self.map.in_flight))]

    @rule(pause_s=st.sampled_from([0.05, 0.5, 9.0]))
    def hear(self, pause_s: float) -> None:
        self.now_s += pause_s
        self.backlog.touch(self.now_s, self.news.bits[:CHUNKS])
        self.news.bits.setall(0)

    @rule(limit=st.integers(1, CHUNKS), is_listed=st.booleans())
    def take(self, limit: int, is_listed: bool) -> None:
        """As a sync does; not listed: as in a pause."""
        wanted = None
        if is_listed:
            ranges = self.backlog.next(limit * CHUNK_BYTES)
            wanted = Wanted([(offset // BLOCK, -(-(offset + length) // BLOCK)) for offset, length in ranges])
        lease = self.map.open_lease()
        found, following = self.map.take(lease, 0, self.map.blocks, 10_000, wanted)
        assert following == self.map.blocks
        runs = chunk_runs((sector * 512, count * 512)
                          for sector, count in zip(found[::2], found[1::2], strict=True))
        self.backlog.took(runs)
        self.portions.append((lease, runs))

    @precondition(lambda self: self.portions)
    @rule()
    def confirm(self) -> None:
        lease, runs = self.portions.pop(0)
        self.map.commit(lease, 0, self.map.blocks)
        self.map.close_lease(lease)
        self.backlog.confirmed(runs)

    @rule()
    def lose(self) -> None:
        for lease, _ in self.portions:
            self.map.close_lease(lease)
        self.portions.clear()
        self.backlog.give_back()

    @invariant()
    def knows_all(self) -> None:
        known = self.backlog._pending | self.news.bits[:CHUNKS]
        for block in self.map.dirty.bits.search(1):
            assert known[block * BLOCK // CHUNK_BYTES], f"block {block} would be forgotten until the pause"


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
