"""O_DIRECT: alignment, bounce buffers, and the gate that keeps changes of one block apart."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.directio import BOUNCE_BYTES, DirectFile, WriteGate
from tapcore.driver import OpenFlag
from tapcore.errors import ImageError
from tapcore.request import DISCARD, WRITE, ZEROES, Request

SIZE = 4 << 20
PAGE = mmap.PAGESIZE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def file(image: Path) -> Iterator[DirectFile]:
    try:
        file = DirectFile.open(str(image), OpenFlag.NONE)
    except ImageError as error:
        pytest.skip(str(error))
    yield file
    file.close()


@pytest.mark.parametrize("offset, length", [
    (0, SIZE), (1, 1), (511, 2), (4095, 4098), (BOUNCE_BYTES - 1, 2), (100, 2 * BOUNCE_BYTES + 200), (SIZE - 1, 1),
])
def test_any_offset_and_length(file: DirectFile, image: Path, offset: int, length: int) -> None:
    expected = bytearray(image.read_bytes())
    target = bytearray(length)
    assert file.read([memoryview(target)], offset, length) == 0
    assert target == expected[offset : offset + length]
    data = random.Random(2).randbytes(length)
    third = length // 3
    assert file.write([memoryview(data)[:third], memoryview(data)[third:]], offset, length, fua=True) == 0
    expected[offset : offset + length] = data
    assert image.read_bytes() == expected


def test_aligned_memory_goes_straight_to_the_kernel(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = memoryview(mmap.mmap(-1, 8 * PAGE))

    def no_bounce() -> mmap.mmap:
        raise AssertionError("bounced")

    monkeypatch.setattr(file, "_take", no_bounce)
    assert file.write([arena[:PAGE], arena[2 * PAGE : 4 * PAGE]], PAGE, 3 * PAGE) == 0
    assert file.read([arena], 0, 8 * PAGE) == 0
    for views in ([arena[1 : PAGE + 1]], [memoryview(bytes(PAGE))], [arena[:100], arena[100:PAGE]]):
        with pytest.raises(AssertionError, match="bounced"):
            file.write(views, 0, PAGE)


def test_bounce_buffers_are_used_again(file: DirectFile) -> None:
    first = file._take()
    file._bounces.append(first)
    target = bytearray(10)
    assert file.read([memoryview(target)], 5, 10) == 0
    assert file._take() is first


def test_an_error_between_two_windows_ends_the_request(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.pwritev

    def second_fails(fd: int, iov: Sequence[memoryview], offset: int, flags: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, iov, offset, flags)

    monkeypatch.setattr(os, "pwritev", second_fails)
    assert file.write([memoryview(bytes(3 * BOUNCE_BYTES))], 1, 3 * BOUNCE_BYTES) == errno.ENOSPC
    assert calls == [0, BOUNCE_BYTES]
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    assert file.write([memoryview(b"x")], 1, 1) == errno.EIO
    assert file.read([memoryview(bytearray(1))], 1, 1) == errno.EIO


def test_where_the_kernel_does_not_tell_pages_are_safe() -> None:
    with TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "disk.img"
        path.write_bytes(bytes(PAGE + 512))
        with pytest.raises(ImageError) as caught:
            DirectFile.open(str(path), OpenFlag.NONE)
        text = str(caught.value)
        assert "O_DIRECT" in text and "leave out the option direct" in text


# The gate


def change(op: int, offset: int, length: int) -> Request:
    return Request(op, offset, length)


def test_aligned_changes_pass_by_each_other() -> None:
    gate = WriteGate(512)
    assert all(gate.enter(change(WRITE, 512 * i, 512)) for i in range(4))
    assert gate.enter(change(WRITE, 0, 4096)) and gate.enter(change(ZEROES, 0, PAGE))


def test_one_that_is_not_aligned_waits_and_is_waited_for() -> None:
    gate = WriteGate(512)
    aligned, unaligned = change(WRITE, 0, 512), change(WRITE, 100, 10)
    later, elsewhere = change(WRITE, 512, 512), change(WRITE, 2 * PAGE + 1, 10)
    assert gate.enter(aligned)
    assert not gate.enter(unaligned)
    assert not gate.enter(later), "it must not overtake one that waits"
    assert gate.enter(elsewhere)
    assert gate.leave(elsewhere) == []
    assert gate.leave(aligned) == [unaligned]
    assert gate.leave(unaligned) == [later]
    assert gate.leave(later) == []
    assert gate.enter(change(WRITE, 512, 512))


def test_the_gate_looks_only_at_those_that_an_end_concerns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest may have a thousand partial blocks in flight."""
    gate, pairs = WriteGate(512), 300
    running = [change(WRITE, number * PAGE + 1, 10) for number in range(pairs)]
    waiting = [change(WRITE, number * PAGE + 20, 10) for number in range(pairs)]
    assert all(gate.enter(request) for request in running) and not any(gate.enter(request) for request in waiting)
    looks = 0
    original = gate._must_wait

    def counted(request: Request, unaligned: bool, before: deque[Request]) -> bool:
        nonlocal looks
        looks += 1
        return original(request, unaligned, before)

    monkeypatch.setattr(gate, "_must_wait", counted)
    assert [gate.leave(request) for request in running] == [[request] for request in waiting]
    assert looks == pairs


changes = st.builds(change, st.sampled_from((WRITE, DISCARD, ZEROES)), st.integers(0, 40).map(lambda n: n * 256),
                    st.integers(1, 40).map(lambda n: n * 256))


@given(requests=st.lists(changes, max_size=25), data=st.data())
def test_the_gate_against_what_may_never_run_together(requests: list[Request], data: st.DataObject) -> None:
    """Whatever the order of ends: no change shares a block with one that is not aligned, and none is forgotten."""
    gate = WriteGate(512)
    running: list[Request] = []
    ended: list[Request] = []

    def unaligned(request: Request) -> bool:
        unit = 512 if request.op == WRITE else PAGE
        return request.offset % unit != 0 or request.length % unit != 0

    def start(request: Request) -> None:
        for other in running:
            if unaligned(request) or unaligned(other):
                unit = 512 if request.op == other.op == WRITE else PAGE
                blocks = set(range(request.offset // unit, -(-(request.offset + request.length) // unit)))
                assert blocks.isdisjoint(range(other.offset // unit, -(-(other.offset + other.length) // unit)))
        running.append(request)

    def end_one() -> None:
        request = running.pop(data.draw(st.integers(0, len(running) - 1)))
        ended.append(request)
        for ready in gate.leave(request):
            start(ready)

    for request in requests:
        if gate.enter(request):
            start(request)
        if data.draw(st.booleans()) and running:
            end_one()
    while running:
        end_one()
    assert len(ended) == len(requests) and set(ended) == set(requests)
