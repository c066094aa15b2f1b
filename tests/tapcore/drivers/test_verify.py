"""verify: wrong data is found, right data never blamed."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Manual

from tapcore.driver import Env
from tapcore.drivers.verify import Verify
from tapcore.errors import ChainError
from tapcore.request import DISCARD, READ, WRITE, ZEROES, Request

SIZE = 16384


class Rig(Runner):
    """`verify` over a disk whose requests end when the test says so."""

    def __init__(self, env: Env) -> None:
        super().__init__(env, f"verify:|manual:{SIZE}")
        self.leaf = Manual.opened.pop()
        self.leaf.early = True
        head = self.head
        assert isinstance(head, Verify)
        self.verify = head

    def begin(self, op: int, offset: int, data: bytes | int) -> Request:
        """A request that stays in flight."""
        self.leaf.early = False
        length = data if isinstance(data, int) else len(data)
        iov = [] if op in (ZEROES, DISCARD) else [memoryview(bytearray(data))]
        request = Request(op, offset, length, iov)
        self.start(request)
        self.leaf.early = True
        return request

    def check(self, offset: int = 0, length: int = 512) -> int:
        """What a read there says."""
        return self.run(Request(READ, offset, length, [memoryview(bytearray(length))]))[0]

    def corrupt(self, offset: int, data: bytes) -> None:
        self.leaf.data[offset : offset + len(data)] = data


@pytest.fixture
def rig(env: Env, caplog: pytest.LogCaptureFixture) -> Iterator[Rig]:
    with caplog.at_level(logging.ERROR):
        rig = Rig(env)
        yield rig
        rig.close()


A, B, C = b"a" * 512, b"b" * 512, b"c" * 512
BAD = errno.EILSEQ


def test_what_was_written_must_be_read(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.write(1024, A + B)
    assert rig.check(1024, 1024) == 0 and rig.read(1000, 2000)[24:1048] == A + B
    rig.corrupt(1536 + 17, b"!")
    assert rig.check(1024) == 0 and rig.check(1024, 1024) == BAD and rig.check(1536) == BAD
    assert rig.verify.mismatches == [1536, 1536]
    assert "512 bytes at offset 1536 are not what was written there" in caplog.text
    rig.write(1536, C)
    assert rig.check(1536) == 0


def test_a_lost_write_is_found(rig: Rig) -> None:
    rig.write(0, A)
    rig.write(0, B)
    rig.corrupt(0, A)
    assert rig.check() == BAD


def test_what_was_never_wholly_written_is_not_checked(rig: Rig) -> None:
    rig.write(10, b"x" * 600)
    rig.corrupt(0, C + C)
    assert rig.check(0, 1024) == 0
    rig.write(0, A)
    rig.write(100, b"y")
    rig.corrupt(0, C)
    assert rig.check() == 0, "a part of the block was changed: unknown again"
    rig.write(0, A)
    rig.corrupt(0, C)
    assert rig.check(1, 511) == 0, "a part of the block was read"
    assert rig.check() == BAD


def test_zeroes_and_discard(rig: Rig) -> None:
    rig.write(0, A + A)
    rig.zeroes(0, 512)
    assert rig.check() == 0
    rig.corrupt(0, A)
    assert rig.check() == BAD
    rig.discard(512, 512)
    for content, code in ((A, 0), (A, 0), (bytes(512), BAD)):
        rig.corrupt(512, content)
        assert rig.check(512) == code, "the former data, or zeroes, but not one after the other"
    rig.discard(1024, 512)
    rig.corrupt(1024, C)
    assert rig.check(1024) == 0, "nobody knew what was there"


def test_a_failed_write_leaves_anything_until_the_next(rig: Rig) -> None:
    rig.write(0, A)
    rig.leaf.errors.append(errno.EIO)
    assert rig.write(0, B) == errno.EIO
    rig.corrupt(0, C)
    assert rig.check() == 0
    rig.write(0, A)
    rig.corrupt(0, C)
    assert rig.check() == BAD


def test_of_writes_in_flight_together_any_may_win_but_only_one(rig: Rig) -> None:
    rig.write(0, C)
    for winner in (A, B):
        rig.begin(WRITE, 0, A)
        rig.begin(WRITE, 0, B)
        rig.leaf.finish()
        rig.corrupt(0, winner)
        assert rig.check() == 0
        rig.corrupt(0, B if winner == A else A)
        assert rig.check() == BAD
    rig.begin(WRITE, 0, A)
    rig.begin(WRITE, 0, B)
    rig.leaf.finish()
    rig.corrupt(0, C)
    assert rig.check() == BAD, "what was there before has lost"


def test_while_a_block_changes_reads_of_it_are_not_checked(rig: Rig) -> None:
    rig.write(0, A)
    rig.begin(WRITE, 0, B)
    rig.corrupt(0, C)
    assert rig.check() == 0
    rig.leaf.finish()
    assert rig.check() == 0
    late_read = rig.begin(READ, 0, 512)
    rig.write(0, A)
    rig.corrupt(0, C)
    rig.leaf.finish()
    rig.wait()
    assert late_read.error == 0, "it overlapped a write that began and ended meanwhile"
    rig.write(0, A)
    late_read = rig.begin(READ, 0, 512)
    rig.corrupt(0, C)
    rig.leaf.finish()
    rig.wait()
    assert late_read.error == BAD


def test_a_failed_read_keeps_its_error(rig: Rig) -> None:
    rig.write(0, A)
    rig.leaf.errors.append(errno.EIO)
    assert rig.check() == errno.EIO and rig.verify.mismatches == []


steps = st.tuples(st.sampled_from((READ, WRITE, WRITE, ZEROES, DISCARD)), st.integers(0, 12), st.integers(1, 6),
                  st.sampled_from((256, 512)), st.none() | st.integers(0, 20))
"""op, first and number of units, their size in bytes, and which request ends then, if one does."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(steps, max_size=30))
def test_a_good_disk_is_never_blamed(env: Env, steps: list[tuple[int, int, int, int, int | None]]) -> None:
    """Any overlap, any order of ends: requests are done whole, when they end."""
    rig = Rig(env)
    for number, (op, start, count, unit, ends) in enumerate(steps):
        content = bytes([number + 1]) * (count * unit)
        rig.begin(op, start * unit, content if op == WRITE else count * unit)
        if ends is not None and rig.leaf.pending:
            pending = rig.leaf.pending
            pending.insert(0, pending.pop(ends % len(pending)))
            rig.leaf.finish(1)
    rig.leaf.finish()
    rig.wait()
    assert rig.check(0, SIZE) == 0 and rig.verify.mismatches == []
    rig.close()


def test_larger_blocks(env: Env) -> None:
    disk = Runner(env, "verify:block=4K|ram:1M")
    disk.write(0, b"x" * 4096)
    disk.write(4096, b"y" * 2048)
    memory = disk.chain.drivers[1]._memory  # type: ignore[attr-defined]
    memory[5000] = memory[100] = 1
    assert disk.run(Request(READ, 4096, 4096, [memoryview(bytearray(4096))])) == [0]
    assert disk.run(Request(READ, 0, 4096, [memoryview(bytearray(4096))])) == [BAD]
    disk.close()


@pytest.mark.parametrize("params, message", [
    ("block=100", "block '100' is not a power of two from 512 bytes"),
    ("block=1000", "block '1000' is not a power of two"),
    ("block=x", "block 'x' is not a size"),
    ("strict", "unknown option 'strict'; options of verify: block"),
])
def test_bad_options(env: Env, params: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        Runner(env, f"verify:{params}|ram:1M")
    assert f"verify: {message}" in str(caught.value)
