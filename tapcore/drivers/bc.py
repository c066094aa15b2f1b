"""bc: a read cache over something slow, such as a parent image of many guests on another host.

Use: bc:size=256M|nbd:tcp://images:10809/base
     bc:size=10G,file=/fast/base.cache,id=base-2024|nbd:tcp://images:10809/base
     bc:file=/fast/disk.cache|aio:/slow/disk.img

Options:
    size=BYTES    how much is kept, default 64M
    block=BYTES   in blocks of this size, a power of two from 4K to 1M, default 64K
    file=PATH     in a file, which is made if it is not there, instead of in memory
    id=TEXT       what tells the content below from any other, where that is not seen by its files

A block that is missing is read from below as a whole, once for all who wait for it, and kept. A block is served
only if its checksum (XXH3) is right, or else read again. Blocks that nobody asks for are the first to go (CLOCK).
Background reads (a sync, a job) pass by: they would fill the cache with what nobody asks for again.

Writes go through, and what they touch is forgotten. With `file` the first of them, and a snapshot below, marks
the file: opened again it is empty. As long as nothing is written it is kept, whatever ends the process, and used
again if what is below is the same: the disk's size, the id, and of each image file device, inode, size and times.

Figures (tap-ctl stats): hits, misses, damaged, in blocks.

Limits: content below without a file to be seen (nbd, a block device) needs `id` if `file` is given, and whoever
gives it sees to a new one when the content changes. One file belongs to one disk. The file's path has no comma.
Memory of about 150 bytes a block beside the blocks.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

from xxhash import xxh3_64_intdigest

from tapcore import params
from tapcore.blockcache import FileStore, MemoryStore, Slots, Store
from tapcore.driver import Driver, Env, Filter, OpenFlag, leaf_of
from tapcore.errors import ImageError, UsageError
from tapcore.request import READ, Request, slice_iov

logger = logging.getLogger(__name__)

MIN_BLOCK_BYTES: Final = 4 << 10
MAX_BLOCK_BYTES: Final = 1 << 20
MAX_FETCH_BYTES: Final = 1 << 20
MAX_BLOCKS: Final = 1 << 24
MAX_PUTS: Final = 64
"""Blocks on their way into the file; what is read while there are so many is not kept."""


class _Read:
    """A guest's read, of which `pending` parts are not there yet."""

    __slots__ = ("error", "is_late", "pending", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending = 1
        self.error = 0
        self.is_late = False


class _Part:
    """The part of a read that lies in one block: `length` bytes from `within` on, at `at` of the read."""

    __slots__ = ("at", "block", "length", "read", "within")

    def __init__(self, read: _Read, block: int, within: int, length: int, at: int) -> None:
        self.read = read
        self.block = block
        self.within = within
        self.length = length
        self.at = at

    def fill(self, data: memoryview) -> None:
        """With `data`, the whole block."""
        source = data[self.within : self.within + self.length]
        done = 0
        for view in slice_iov(self.read.request.iov, self.at, self.length):
            view[:] = source[done : done + len(view)]
            done += len(view)


class _Fetch:
    """Blocks being read from below, from `first` on, for `parts`."""

    __slots__ = ("count", "data", "first", "is_current", "parts")

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = 0
        self.parts: list[_Part] = []
        self.data = memoryview(b"")
        self.is_current = True
        """Nothing was written there since it began."""


class ReadCache(Filter):
    name = "bc"

    def __init__(self, env: Env, params_text: str, flags: OpenFlag) -> None:
        """UsageError for a bad option."""
        super().__init__(env, params_text, flags)
        given = params.options(self.name, params_text, ("size", "block", "file", "id"))
        self._block_bytes = size = params.size_bytes("block", given.get("block", "64K"))
        if not MIN_BLOCK_BYTES <= size <= MAX_BLOCK_BYTES or size & size - 1:
            raise UsageError(f"block {given['block']!r} is not a power of two from 4K to 1M")
        self._count = params.size_bytes("size", given.get("size", "64M")) // self._block_bytes
        if not 1 <= self._count <= MAX_BLOCKS:
            raise UsageError(f"size {given.get('size', '64M')!r} is not 1 to {MAX_BLOCKS} blocks of "
                             f"{self._block_bytes} bytes")
        self._file, self._id = given.get("file"), given.get("id")
        if self._file is not None and not self._file.startswith(("/", ".")):
            raise UsageError(f"file {self._file!r} is not a path", hint="a path begins with / or ./")
        self.hits = self.misses = self.damaged = 0
        self._store: Store | None = None
        self._fetching: dict[int, _Fetch] = {}
        self._puts: dict[int, memoryview] = {}
        """Blocks on their way into the file; one that is changed meanwhile is taken out."""
        self._putting = 0
        self._quiet: list[Callable[[], None]] = []
        self._changes: dict[Request, Callable[[Request], None]] = {}
        self._is_marked = False
        self._held: list[tuple[Request, Callable[[Request], bool]]] = []
        """Changes that wait until the file is marked."""

    def open(self) -> None:
        """UsageError without an id that is needed; ImageError if the file cannot be used."""
        self._leaf = leaf_of(self.next)
        count = 1 if self.flags & OpenFlag.QUERY else self._count
        self._slots = Slots(count)
        if self._file is None or self.flags & OpenFlag.QUERY:
            self._store = MemoryStore(count, self._block_bytes)
            self._is_marked = True
            return
        store = FileStore(self._file, count, self._block_bytes, self._identity())
        try:
            store.load(self._slots, blocks=-(-self.info.size_bytes // self._block_bytes))
        except BaseException:
            store.close()
            raise
        self._store = store

    def _identity(self) -> int:
        """Of the content below. UsageError if it takes an id."""
        seen: list[object] = [self.info.size_bytes, self._id]
        level: Driver | None = self.next
        while level is not None:
            if isinstance(level, Filter):
                level = level.next
                continue
            status = Path(level.path).stat() if level.path else None
            if status is not None and stat.S_ISREG(status.st_mode):
                seen += [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            elif self._id is None:
                raise UsageError(f"whether {level.name}:{level.params} has changed cannot be seen",
                                 hint="give its content an id: bc:file=…,id=TEXT")
            level = level.backing
        return xxh3_64_intdigest(repr(seen).encode())

    def bind(self, lower: Driver) -> None:
        """Of an open cache: `lower` shows the same content, but of another image what is written to it later goes
        elsewhere, so the file says nothing of the former one any more."""
        super().bind(lower)
        if self._store is not None and not self._is_marked and leaf_of(lower) is not self._leaf:
            self._is_marked = True
            try:
                self._store.mark_changed()
            except ImageError as error:
                logger.error("%s; remove it before it is used again", error)

    def quiesce(self, done: Callable[[], None]) -> None:
        if self._putting:
            self._quiet.append(done)
        else:
            done()

    def close(self) -> None:
        assert self._store is not None
        self._store.close()

    def counters(self) -> dict[str, int]:
        return {"hits": self.hits, "misses": self.misses, "damaged": self.damaged}

    # Reads

    def queue_read(self, request: Request) -> bool:
        if request.flags:
            return self.next.queue_read(request)
        read = _Read(request)
        offset, end, size = request.offset, request.offset + request.length, self._block_bytes
        fetches: list[_Fetch] = []
        while offset < end:
            block, within = divmod(offset, size)
            part = _Part(read, block, within, min(size - within, end - offset), offset - request.offset)
            slot = self._slots.find(block)
            if slot is not None:
                if not self._serve(part, slot):
                    self._read_slot(part, slot)
            elif (data := self._puts.get(block)) is not None:
                part.fill(data)
                self.hits += 1
            else:
                self._miss(part, fetches)
            offset += part.length
        for fetch in fetches:
            self._fetch(fetch)
        read.pending -= 1
        read.is_late = bool(read.pending)
        request.error = read.error
        return not read.pending

    def _serve(self, part: _Part, slot: int) -> bool:
        """Fill a part from a slot, if that takes no waiting and the checksum is right."""
        assert self._store is not None
        data = self._store.get_now(slot, self._length_of(part.block))
        if data is None or self._store.checksum(part.block, data) != self._slots.sums[slot]:
            return False
        part.fill(data)
        self.hits += 1
        return True

    def _read_slot(self, part: _Part, slot: int) -> None:
        """Fill a part from a slot in a worker, or if it is damaged from below."""
        store = self._store
        assert store is not None
        data = memoryview(bytearray(self._length_of(part.block)))
        result = [errno.EIO]
        expected = self._slots.sums[slot]
        part.read.pending += 1
        self._slots.pin(slot)

        def work() -> None:
            result[0] = store.get(slot, data)

        def done() -> None:
            is_right = not result[0] and store.checksum(part.block, data) == expected
            self._slots.unpin(slot)
            if is_right:
                part.fill(data)
                self.hits += 1
                self._arrived(part.read, 0)
                return
            self.damaged += 1
            if self._slots.slot_of.get(part.block) == slot:
                self._slots.drop(part.block)
            fetches: list[_Fetch] = []
            self._miss(part, fetches)
            for fetch in fetches:
                self._fetch(fetch)
            self.next.submit()
            self._arrived(part.read, 0)

        self.env.workers.submit(work, done)

    def _arrived(self, read: _Read, code: int) -> None:
        read.error = read.error or code
        read.pending -= 1
        if not read.pending and read.is_late:
            read.request.error = read.error
            read.request.done(read.request)

    def _length_of(self, block: int) -> int:
        return min(self._block_bytes, self.info.size_bytes - block * self._block_bytes)

    # Fetches

    def _miss(self, part: _Part, fetches: list[_Fetch]) -> None:
        """Let a part wait for its block: with those that do already, or for one of the new `fetches`."""
        self.misses += 1
        part.read.pending += 1
        fetch = self._fetching.get(part.block)
        if fetch is None:
            last = fetches[-1] if fetches else None
            if (last is not None and last.first + last.count == part.block
                    and (last.count + 1) * self._block_bytes <= MAX_FETCH_BYTES):
                fetch = last
            else:
                fetch = _Fetch(part.block)
                fetches.append(fetch)
            fetch.count += 1
            self._fetching[part.block] = fetch
        fetch.parts.append(part)

    def _fetch(self, fetch: _Fetch) -> None:
        offset = fetch.first * self._block_bytes
        length = min(fetch.count * self._block_bytes, self.info.size_bytes - offset)
        fetch.data = memoryview(bytearray(length))
        request = Request(READ, offset, length, [fetch.data], done=partial(self._fetched, fetch))
        if self.next.queue_read(request):
            self._fetched(fetch, request)

    def _fetched(self, fetch: _Fetch, request: Request) -> None:
        for block in range(fetch.first, fetch.first + fetch.count):
            if self._fetching.get(block) is fetch:
                del self._fetching[block]
        for part in fetch.parts:
            if request.error:
                self._read_directly(part)
            else:
                part.fill(self._block_in(fetch, part.block))
                self._arrived(part.read, 0)
        if request.error:
            self.next.submit()
        elif fetch.is_current:
            for block in range(fetch.first, fetch.first + fetch.count):
                self._keep(block, self._block_in(fetch, block))

    def _block_in(self, fetch: _Fetch, block: int) -> memoryview:
        at = (block - fetch.first) * self._block_bytes
        return fetch.data[at : at + self._length_of(block)]

    def _read_directly(self, part: _Part) -> None:
        """The whole block could not be read; what was asked for perhaps can."""
        def done(request: Request) -> None:
            self._arrived(part.read, request.error)

        whole = part.read.request
        request = Request(READ, whole.offset + part.at, part.length, slice_iov(whole.iov, part.at, part.length),
                          done=done)
        if self.next.queue_read(request):
            done(request)

    def _keep(self, block: int, data: memoryview) -> None:
        store = self._store
        assert store is not None
        if self._putting >= MAX_PUTS:
            return
        slot = self._slots.allocate()
        if slot is None:
            return
        checksum = store.checksum(block, data)
        if store.is_memory:
            store.put(slot, block, data, checksum)
            self._slots.fill(slot, block, checksum)
            self._slots.unpin(slot)
            return
        self._puts[block] = data
        result = [errno.EIO]
        self._putting += 1

        def work() -> None:
            result[0] = store.put(slot, block, data, checksum)

        def done() -> None:
            self._putting -= 1
            if self._puts.get(block) is data:
                del self._puts[block]
                if not result[0]:
                    self._slots.fill(slot, block, checksum)
            self._slots.unpin(slot)
            if not self._putting:
                quiet, self._quiet = self._quiet, []
                for action in quiet:
                    action()

        self.env.workers.submit(work, done)

    # Changes

    def queue_write(self, request: Request) -> bool:
        return self._change(request, self.next.queue_write)

    def queue_zeroes(self, request: Request) -> bool:
        return self._change(request, self.next.queue_zeroes)

    def queue_discard(self, request: Request) -> bool:
        return self._change(request, self.next.queue_discard)

    def _change(self, request: Request, verb: Callable[[Request], bool]) -> bool:
        """What a change touches is forgotten when it begins, and once more when it has ended: what was read from
        below in between may be the former data."""
        if not self._is_marked:
            self._hold(request, verb)
            return False
        self._forget(request.offset, request.length)
        done = request.done
        request.done = self._changed
        if verb(request):
            request.done = done
            return True
        self._changes[request] = done
        return False

    def _changed(self, request: Request) -> None:
        request.done = self._changes.pop(request)
        self._forget(request.offset, request.length)
        request.done(request)

    def _forget(self, offset: int, length: int) -> None:
        touched = range(offset // self._block_bytes, -(-(offset + length) // self._block_bytes))
        for block in _within(self._slots.slot_of, touched):
            self._slots.drop(block)
        for block in _within(self._fetching, touched):
            self._fetching.pop(block).is_current = False
        for block in _within(self._puts, touched):
            del self._puts[block]

    def _hold(self, request: Request, verb: Callable[[Request], bool]) -> None:
        """Let a change wait until the file says that there are some."""
        self._held.append((request, verb))
        if len(self._held) > 1:
            return
        store, result = self._store, [errno.EIO]
        assert store is not None

        def work() -> None:
            try:
                store.mark_changed()
                result[0] = 0
            except ImageError as error:
                logger.error("%s", error)
                result[0] = error.errno

        def done() -> None:
            self._is_marked = not result[0]
            held, self._held = self._held, []
            for request, verb in held:
                if result[0]:
                    request.error = result[0]
                if result[0] or self._change(request, verb):
                    request.done(request)
            self.next.submit()

        self.env.workers.submit(work, done)


def _within(blocks: Collection[int], touched: range) -> list[int]:
    """Those of `blocks` that are in the range."""
    if len(touched) < len(blocks):
        return [block for block in touched if block in blocks]
    return [block for block in blocks if block in touched]
