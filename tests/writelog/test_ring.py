"""Both ends of the ring over one page, and a front end that lies."""

from __future__ import annotations

import random

import pytest

from tapcore.errors import ProtocolError
from writelog.ring import EXTENT, HEADER, MASK, SLOTS, BackRing, FrontRing, is_valid
from writelog.shm import DATA_BYTES, RING_BYTES


def make() -> tuple[bytearray, BackRing, FrontRing]:
    page = bytearray(b"\xaa" * RING_BYTES)
    back = BackRing(memoryview(page))
    return page, back, FrontRing(memoryview(page))


def put_slot(page: bytearray, index: int, sector: int, count: int, offset: int) -> None:
    at = 64 + index % SLOTS * 16
    page[at : at + 16] = EXTENT.pack(sector=sector, count=count, offset=offset)


def set_producer(page: bytearray, value: int) -> None:
    page[0:4] = value.to_bytes(4, "little")


def test_a_fresh_ring() -> None:
    page, _, _ = make()
    assert HEADER.unpack(page) == {"req_prod": 0, "req_event": 1, "rsp_prod": 0, "rsp_event": 1}
    assert page[16:] == bytes(RING_BYTES - 16)


def test_a_request_and_its_response_on_the_page() -> None:
    page, back, front = make()
    front.put_request((8, 2, 512))
    assert back.take_requests() == []
    front.push()
    assert page[:4] == b"\1\0\0\0"
    assert page[64:80] == (8).to_bytes(8, "little") + (2).to_bytes(4, "little") + (512).to_bytes(4, "little")
    assert back.take_requests() == [(8, 2, 512)]
    assert HEADER.unpack(page)["req_event"] == 2
    back.put_response((8, 1, 512))
    assert not front.has_responses
    back.push()
    assert front.has_responses
    assert front.take_responses() == [(8, 1, 512)]
    assert HEADER.unpack(page)["rsp_event"] == 2


def test_indices_run_round_the_ring_and_round_32_bits() -> None:
    page, back, front = make()
    start = MASK - 200
    for word in (0, 8):
        page[word : word + 4] = start.to_bytes(4, "little")
    back._consumed = back._produced = front._consumed = front._produced = start
    randomly = random.Random(1)
    sent = received = 0
    outstanding: list[tuple[int, int, int]] = []
    while received < 600:
        for _ in range(randomly.randint(0, front.free_slots)):
            front.put_request((sent, 1, 0))
            sent += 1
        front.push()
        outstanding += back.take_requests()
        randomly.shuffle(outstanding)
        for _ in range(randomly.randint(0, len(outstanding))):
            back.put_response(outstanding.pop())
        back.push()
        received += len(front.take_responses())
    assert back._consumed < 1000


def test_fault_8_a_request_is_copied_once() -> None:
    page, back, _ = make()
    put_slot(page, 0, 1, 1, 0)
    set_producer(page, 1)
    [request] = back.take_requests()
    put_slot(page, 0, 1 << 60, 1 << 30, 0)
    assert request == (1, 1, 0)


@pytest.mark.parametrize("ahead", [SLOTS + 1, 1 << 20, MASK])
def test_a_producer_too_far_ahead(ahead: int) -> None:
    page, back, _ = make()
    set_producer(page, ahead)
    with pytest.raises(ProtocolError, match="ahead"):
        back.take_requests()


def test_a_full_ring_and_one_more() -> None:
    page, back, _ = make()
    set_producer(page, SLOTS)
    assert len(back.take_requests()) == SLOTS
    set_producer(page, SLOTS + 1)
    with pytest.raises(ProtocolError, match="128 unanswered"):
        back.take_requests()


def test_a_producer_that_goes_back() -> None:
    page, back, _ = make()
    set_producer(page, 5)
    back.take_requests()
    set_producer(page, 4)
    with pytest.raises(ProtocolError):
        back.take_requests()


def test_a_server_with_more_responses_than_requests() -> None:
    page, _, front = make()
    front.put_request((0, 1, 0))
    page[8:12] = b"\2\0\0\0"
    with pytest.raises(ProtocolError, match="2 responses to 1"):
        front.take_responses()


@pytest.mark.parametrize(("extent", "valid"), [
    ((0, 1, 0), True),
    ((99, 1, DATA_BYTES - 512), True),
    ((0, 100, 0), True),
    ((0, 0, 0), False),
    ((100, 1, 0), False),
    ((99, 2, 0), False),
    (((1 << 64) - 1, 1, 0), False),
    ((0, 1, DATA_BYTES - 511), False),
    ((0, 1, MASK), False),
    ((0, MASK, 0), False),
])
def test_what_a_request_may_ask_for(extent: tuple[int, int, int], valid: bool) -> None:
    assert is_valid(extent, 100) is valid
