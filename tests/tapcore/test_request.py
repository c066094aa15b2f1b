"""Requests and the slicing of their buffers."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.request import FLUSH, WRITE, Request, fail, slice_iov


def test_a_new_request_has_not_failed() -> None:
    request = Request(WRITE, 512, 4, [memoryview(b"abcd")])
    assert request.error == 0 and request.extents == [] and request.parts is None
    assert repr(request) == "<write 4 bytes at 512, error 0>"


def test_failing_early() -> None:
    request = Request(FLUSH)
    assert fail(request, errno.EIO) is True
    assert request.error == errno.EIO


def test_a_completion_that_nobody_waits_for_is_a_fault() -> None:
    request = Request(FLUSH)
    with pytest.raises(AssertionError, match="nobody waits"):
        request.done(request)


@given(parts=st.lists(st.binary(max_size=5), min_size=1, max_size=6), data=st.data())
def test_slices_hold_the_bytes_asked_for_and_are_not_copies(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    buffers = [bytearray(part) for part in parts]
    views = slice_iov([memoryview(buffer) for buffer in buffers], start, length)
    assert b"".join(views) == whole[start : start + length]
    for view in views:
        view[:] = b"\xff" * len(view)
    assert b"".join(buffers) == whole[:start] + b"\xff" * length + whole[start + length :]
