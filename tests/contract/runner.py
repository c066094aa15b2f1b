"""Runs requests on an open chain and holds it to the contract: each is completed once, early or late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tapcore.chain import Chain, open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.request import DISCARD, FLUSH, READ, STATUS, STATUS_ZERO, WRITE, ZEROES, Extent, Request

TIMEOUT_S = 20


def pieces(data: bytearray, cuts: Sequence[int]) -> list[memoryview]:
    """`data` as consecutive views, cut at the given places."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [memoryview(data)[start:end] for start, end in pairwise(edges)]


class Runner:
    """A chain, and what one does with it. Every helper returns when its requests are complete."""

    def __init__(self, env: Env, text: str, flags: OpenFlag = OpenFlag.NONE) -> None:
        self.env = env
        self.chain: Chain = open_chain(env, text, flags)
        self.head = self.chain.head
        self.size = self.chain.info.size_bytes
        self.early = 0
        self.late = 0
        self._waiting: set[Request] = set()
        self._complete: set[Request] = set()

    def close(self) -> None:
        """Quiesce and close the chain, unless something is in flight or was completed twice."""
        self.env.loop.turn(0)
        assert not self._waiting
        quiet: list[bool] = []
        self.chain.quiesce(lambda: quiet.append(True))
        self.env.loop.run_until(lambda: bool(quiet), TIMEOUT_S)
        self.chain.close()

    def done(self, request: Request) -> None:
        assert request not in self._complete, f"{request} was completed twice"
        assert request in self._waiting, f"{request} was completed early and late, or before its verb returned"
        self._waiting.discard(request)
        self._complete.add(request)
        self.late += 1

    def start(self, *batch: Request) -> None:
        """Queue and submit, without waiting."""
        verbs = [self.head.queue_read, self.head.queue_write, self.head.queue_flush, self.head.queue_discard,
                 self.head.queue_zeroes, self.head.queue_status]
        for request in batch:
            request.done = self.done
            if verbs[request.op](request):
                self._complete.add(request)
                self.early += 1
            else:
                self._waiting.add(request)
        self.head.submit()

    def wait(self) -> None:
        """Until everything that was started is complete."""
        self.env.loop.run_until(lambda: not self._waiting, TIMEOUT_S)

    def run(self, *batch: Request) -> list[int]:
        """Queue, submit and wait for these; the errnos."""
        self.start(*batch)
        self.env.loop.run_until(lambda: self._waiting.isdisjoint(batch), TIMEOUT_S)
        return [request.error for request in batch]

    def read(self, offset: int, length: int, *, flags: int = 0, cuts: Sequence[int] = ()) -> bytes:
        data = bytearray(b"\xee" * length)
        assert self.run(Request(READ, offset, length, pieces(data, cuts), flags)) == [0]
        return bytes(data)

    def write(self, offset: int, data: bytes, *, flags: int = 0, cuts: Sequence[int] = ()) -> int:
        return self.run(Request(WRITE, offset, len(data), pieces(bytearray(data), cuts), flags))[0]

    def flush(self) -> int:
        return self.run(Request(FLUSH))[0]

    def zeroes(self, offset: int, length: int, flags: int = 0) -> int:
        return self.run(Request(ZEROES, offset, length, flags=flags))[0]

    def discard(self, offset: int, length: int, flags: int = 0) -> int:
        return self.run(Request(DISCARD, offset, length, flags=flags))[0]

    def status(self, offset: int, length: int, flags: int = 0) -> list[Extent]:
        """The whole range's extents, asked for as often as it takes; those said to be zero are read."""
        extents: list[Extent] = []
        end = offset + length
        while offset < end:
            request = Request(STATUS, offset, end - offset, flags=flags)
            assert self.run(request) == [0]
            covered = sum(extent_length for extent_length, _ in request.extents)
            assert 0 < covered <= end - offset
            for extent_length, state in request.extents:
                assert extent_length > 0
                if state & STATUS_ZERO:
                    assert self.read(offset, extent_length) == bytes(extent_length)
                offset += extent_length
            extents += request.extents
        return extents
