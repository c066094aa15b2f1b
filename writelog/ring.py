"""The extent ring: Xen's shared ring over one page, both ends (xen/include/public/io/ring.h).

    0   u32 req_prod, req_event, rsp_prod, rsp_event       48 bytes of padding
    64  128 slots of 16 bytes: log_extent = u64 sector, u32 count, u32 offset into the data area

Requests and responses share the slots; indices run freely through 32 bits, and index modulo 128 is the slot. The
front (client) owns req_prod and rsp_event, the back (server) rsp_prod and req_event. Each end keeps its own
indices to itself and only believes of the page what it must: the other end's producer index, checked, and the
slots, each copied once before it is looked at.

A producer index is read and written through a memoryview of machine words, one instruction each; `struct` would
move it byte by byte. The kick over the socket, a system call, orders what was written before it.
"""

from __future__ import annotations

import sys
from typing import Final, TypeAlias

from tapcore.errors import ProtocolError
from tapcore.layout import Layout
from writelog.bitmap import SECTOR_BYTES
from writelog.shm import DATA_BYTES, RING_BYTES

if sys.byteorder != "little":
    raise ImportError("the write log's region has little-endian counters, which this machine cannot share")

HEADER = Layout("ring header", "<", "req_prod:I req_event:I rsp_prod:I rsp_event:I :48x", size=64)
EXTENT = Layout("log_extent", "<", "sector:Q count:I offset:I", size=16)
SLOTS: Final = 128
MASK: Final = 0xFFFFFFFF
REQ_PROD: Final = 0
REQ_EVENT: Final = 1
RSP_PROD: Final = 2
RSP_EVENT: Final = 3


Extent: TypeAlias = tuple[int, int, int]
"""(sector, count, offset): `count` sectors from `sector` on, at `offset` bytes of the data area."""


def is_valid(extent: Extent, disk_sectors: int) -> bool:
    """Whether a request lies in the disk and in the data area, and asks for anything."""
    sector, count, offset = extent
    return count > 0 and sector + count <= disk_sectors and offset + count * SECTOR_BYTES <= DATA_BYTES


class _End:
    """What both ends share: the page's words and slots."""

    def __init__(self, page: memoryview) -> None:
        assert len(page) == RING_BYTES
        self._page = page
        self._words = page[:16].cast("I")

    def _get(self, index: int) -> Extent:
        sector, count, offset = EXTENT.struct.unpack_from(self._page, HEADER.size + index % SLOTS * EXTENT.size)
        return sector, count, offset

    def _put(self, index: int, extent: Extent) -> None:
        EXTENT.struct.pack_into(self._page, HEADER.size + index % SLOTS * EXTENT.size, *extent)

    def release(self) -> None:
        """Let go of the page, so that it can be unmapped."""
        self._words.release()


class BackRing(_End):
    """The server's end. Making one resets the page."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page)
        page[:] = bytes(RING_BYTES)
        HEADER.pack_into(page, 0, req_prod=0, req_event=1, rsp_prod=0, rsp_event=1)
        self._consumed = 0
        self._produced = 0

    def take_requests(self) -> list[Extent]:
        """The requests placed since the last call, copied and not yet validated.

        ProtocolError if the client's index says that more are open than the ring has slots for.
        """
        words = self._words
        taken: list[Extent] = []
        while (count := (words[REQ_PROD] - self._consumed) & MASK) > 0:
            if count + self.open_requests > SLOTS:
                raise ProtocolError(f"ring index is {count} requests ahead with {self.open_requests} unanswered",
                                    hint=f"the ring has {SLOTS} slots")
            for index in range(self._consumed, self._consumed + count):
                taken.append(self._get(index))
            self._consumed = (self._consumed + count) & MASK
            words[REQ_EVENT] = (self._consumed + 1) & MASK
        return taken

    @property
    def open_requests(self) -> int:
        """Requests taken that have no response yet."""
        return (self._consumed - self._produced) & MASK

    def put_response(self, extent: Extent) -> None:
        """Answer one of the requests taken. The client sees it after `push`."""
        assert self.open_requests > 0
        self._put(self._produced, extent)
        self._produced = (self._produced + 1) & MASK

    def push(self) -> None:
        """Show the client all responses."""
        self._words[RSP_PROD] = self._produced


class FrontRing(_End):
    """The client's end of a ring that the server has just made."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page)
        self._produced = 0
        self._consumed = 0

    @property
    def free_slots(self) -> int:
        return SLOTS - self.open_requests

    @property
    def open_requests(self) -> int:
        """Requests put that have no response yet."""
        return (self._produced - self._consumed) & MASK

    def put_request(self, extent: Extent) -> None:
        """Place a request. The server sees it after `push`."""
        assert self.free_slots > 0
        self._put(self._produced, extent)
        self._produced = (self._produced + 1) & MASK

    def push(self) -> None:
        """Show the server all requests."""
        self._words[REQ_PROD] = self._produced

    @property
    def has_responses(self) -> bool:
        """Whether `take_responses` would find any."""
        return self._words[RSP_PROD] != self._consumed

    def take_responses(self) -> list[Extent]:
        """The responses placed since the last call; ProtocolError if there are more than requests."""
        count = (self._words[RSP_PROD] - self._consumed) & MASK
        if count > self.open_requests:
            raise ProtocolError(f"ring shows {count} responses to {self.open_requests} requests")
        taken = [self._get(index) for index in range(self._consumed, self._consumed + count)]
        self._consumed = (self._consumed + count) & MASK
        self._words[RSP_EVENT] = (self._consumed + 1) & MASK
        return taken
