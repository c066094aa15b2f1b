"""log: what is written above is remembered, block by block, for whoever copies the disk.

Use: log:|aio:/vm/disk.img             named after the image below: disk.img
     log:NAME|qcow2:/vm/disk.qcow2     named NAME
     log:NAME,granularity=65536|...    one bit for 64 KiB

Options:
    granularity=BYTES   what one bit stands for: a power of two from 512 to 1 MiB, default 4096

Every write, write-zeroes and discard marks its blocks before it goes down. The bitmap is in shared memory: it
outlives this process, however that ends, but not a reboot. Clients (writelog-client, writelog-sync) connect to
`log__NAME.ctl` in the run directory, see what is dirty, take it, and read it through the level below this one.

Limits: a log belongs to one process at a time, and a NAME to one disk: what the log knows under it is kept when
the chain below changes, as it does with a snapshot. The disk's size is a multiple of 512 bytes. A log costs 2 bits
of /dev/shm a block (64 MiB for 1 TiB at 4096) and 8 MiB a client. Opened to be queried only, it does nothing.
What is written to an image while no log is in its chain, or by another program, is not in the log: after that
start anew with a full copy (writelog-sync always does).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from tapcore.driver import Driver, Env, Filter, OpenFlag, leaf_of
from tapcore.errors import LogError
from tapcore.request import Request
from writelog.bitmap import DEFAULT_GRANULARITY_BYTES, check_granularity
from writelog.control import Figures
from writelog.logstore import LogStore
from writelog.server import LogServer
from writelog.shm import check_name

MAX_EXTENTS = 65536
"""About how many extents one answer of `dirty_extents` has."""


class Log(Filter):
    """The filter. Its state is a DirtyMap in a LogStore, shown to clients by a LogServer."""

    name = "log"

    def __init__(self, env: Env, params: str, flags: OpenFlag) -> None:
        super().__init__(env, params, flags)
        self._given_name, self._granularity_bytes = _parse(params)
        self.log_name = ""
        """The log's name, known once the driver is open."""
        self._image = ""
        self._done_hook = self._write_done
        self._waiting: dict[Request, Callable[[Request], None]] = {}
        self._store: LogStore | None = None
        self._server: LogServer | None = None

    def open(self) -> None:
        """LogError if the log is in use, or its memory or socket cannot be had."""
        leaf = leaf_of(self.next)
        self.log_name = check_name(self._given_name or _name_from(leaf))
        if self.flags & OpenFlag.QUERY:
            return
        self._image = _identity(leaf)
        identity = f"name:{self._given_name}" if self._given_name else f"path:{self._image}"
        run_dir = self.env.run_dir
        store = LogStore(run_dir, self.log_name, self.info.size_bytes, self._granularity_bytes, identity)
        try:
            self._server = LogServer(self.env.loop, store.map, self.next, run_dir, self.log_name, store.generation)
        except BaseException:
            store.close()
            raise
        self._store = store
        self._map = store.map
        self._next_write = self.next.queue_write

    def bind(self, lower: Driver) -> None:
        """Of an open log: go on above `lower`. If that is another image than the one after which the log is named,
        the log keeps the name as one that was given to it, in `params` too: with these it is found again."""
        super().bind(lower)
        if self._store is None or self._server is None:
            return
        self._next_write = lower.queue_write
        if not self._given_name and _identity(leaf_of(lower)) != self._image:
            self._given_name = self.log_name
            self.params = ",".join([self.log_name, *self.params.split(",")[1:]])
            self._store.set_identity(f"name:{self.log_name}")
        self._server.go_on(lower)

    def close(self) -> None:
        """Disconnect clients, which returns their leases, and let go of the bitmap. Reads of theirs in flight are
        waited for, unless `quiesce` has done so."""
        server, store = self._server, self._store
        self._server = self._store = None
        try:
            if server is not None:
                server.close()
        finally:
            server = None
            if store is not None:
                del self._map
                store.close()

    def queue_write(self, request: Request) -> bool:
        return self._change(request, self._next_write)

    def queue_zeroes(self, request: Request) -> bool:
        return self._change(request, self.next.queue_zeroes)

    def queue_discard(self, request: Request) -> bool:
        return self._change(request, self.next.queue_discard)

    def _change(self, request: Request, verb: Callable[[Request], bool]) -> bool:
        """Mark, then pass on; a request that stays under way is in flight until its `done` is called. The hook is
        set first, so that it comes after those of the levels below, when they are through with the request."""
        offset, length, done = request.offset, request.length, request.done
        self._map.mark(offset, length)
        request.done = self._done_hook
        if verb(request):
            request.done = done
            return True
        self._map.in_flight[request] = (offset, length)
        self._waiting[request] = done
        return False

    def _write_done(self, request: Request) -> None:
        del self._map.in_flight[request]
        request.done = self._waiting.pop(request)
        request.done(request)

    def quiesce(self, done: Callable[[], None]) -> None:
        """Start no more reads for clients, and call `done` when none is in flight: the way to a `close` that does
        not wait."""
        if self._server is None:
            done()
        else:
            self._server.quiesce(done)

    @property
    def socket_path(self) -> Path:
        """The control socket. LogError when the log is not being served."""
        return self._serving().path

    def figures(self) -> Figures:
        """The log's figures, as clients see them."""
        return self._serving().figures()

    def dirty_extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length in bytes, dirty or leased?) of the extents from `offset` on, consecutive and alternating. They
        cover [offset, offset + length), or less if that is more than about MAX_EXTENTS."""
        self._serving()
        return self._map.extents(offset, length, MAX_EXTENTS)

    def _serving(self) -> LogServer:
        if self._server is None:
            raise LogError(f"the log {self.log_name!r} is not open", errno=errno.EBADF)
        return self._server


def _parse(params: str) -> tuple[str, int]:
    """The name, empty if it is to be found, and the granularity in bytes."""
    given, *options = params.split(",")
    given = given.strip()
    if given:
        check_name(given)
    granularity_bytes = DEFAULT_GRANULARITY_BYTES
    for option in options:
        key, _, value = option.strip().partition("=")
        if key != "granularity":
            raise LogError(f"unknown option {option.strip()!r}", errno=errno.EINVAL,
                           hint="log:[NAME][,granularity=BYTES]")
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise LogError(f"granularity {value!r} is no number of bytes", errno=errno.EINVAL,
                           hint="for example log:NAME,granularity=65536")
        granularity_bytes = check_granularity(int(value))
    return given, granularity_bytes


def _identity(leaf: Driver) -> str:
    """What tells the image below from all others."""
    return os.path.realpath(leaf.path) if leaf.path else f"{leaf.name}:{leaf.params}"


def _name_from(leaf: Driver) -> str:
    """A log's name from the image below: its last component, with what a name may not have replaced by '_'."""
    return re.sub(r"[^A-Za-z0-9_.+=@-]", "_", Path(leaf.path or leaf.params).name)
