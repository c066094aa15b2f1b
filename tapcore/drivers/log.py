"""log: what is written above is remembered, block by block, for whoever copies the disk.

Use: log:|aio:/vm/disk.img             named after the image below: disk.img
     log:NAME|qcow2:/vm/disk.qcow2     named NAME
     log:NAME,granularity=65536|...    one bit for 64 KiB

Options:
    granularity=BYTES   what one bit stands for: a power of two from 512 to 1 MiB, default 4096
    sidecar=PATH        where to keep what has to outlive the host; without a ',' in it. Default: beside the image,
                        as IMAGE.writelog, or NAME.writelog if the log has a NAME; of a block device in
                        $TAPDISK_STATE_DIR (/var/lib/tapdisk). sidecar=none does without
    hot=N               extents of 4 MiB that can be written to without asking the side-car, from 16 to 8128,
                        default 1200: after a crash of the host so many may have to be sent again

Every write, write-zeroes and discard marks its blocks before it goes down. The bitmap is in shared memory: it
outlives this process, however that ends. The side-car outlives the host: the first write to an extent waits until
its intent is on the disk (one flush for all that wait), the next ones do not. After a crash of the host the
extents in the side-car's activity log are dirty, and of the rest what had been. Clients (writelog-client,
writelog-sync) connect to `log__NAME.ctl` in the run directory, see what is dirty, take it, and read it through the
level below this one.

Limits: a log belongs to one process at a time, and a NAME to one disk: what the log knows under it is kept when
the chain below changes, as it does with a snapshot, as long as the images are in one folder. The disk's size is a
multiple of 512 bytes. A log costs 3 bits of /dev/shm a block (96 MiB for 1 TiB at 4096), 8 MiB a client, and a
side-car of 64 KiB and about 1 bit a block (33 MiB for 1 TiB). Opened read-only it does without the side-car, and
to be queried only it does nothing. Images without a file (ram:, nbd:) have no side-car: their log does not outlive
the host. What is written to an image while no log is in its chain, or by another program, is not in the log:
remove the side-car after that (tap-ctl close --forget), so that the next sync starts anew.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tapcore.beside import beside
from tapcore.driver import Driver, Env, Feature, Filter, OpenFlag, leaf_of
from tapcore.errors import LogError
from tapcore.request import BACKGROUND, FLUSH, Request
from writelog.activity import DEFAULT_HOT, MIN_HOT, Activity, Resume
from writelog.bitmap import DEFAULT_GRANULARITY_BYTES, check_granularity
from writelog.control import Figures
from writelog.generations import Generations, new_id
from writelog.logjournal import Journal
from writelog.logstore import LogStore
from writelog.server import LogServer
from writelog.shm import check_name
from writelog.sidecar import PLACE_HINT
from writelog.sidecar_layout import EXTENT_SHIFT, MAX_HOT

MAX_EXTENTS = 65536
"""About how many extents one answer of `dirty_extents` has."""
SIDECAR_SUFFIX: Final = ".writelog"


class Log(Filter):
    """The filter. Its state is a DirtyMap in a LogStore, shown to clients by a LogServer."""

    name = "log"

    def __init__(self, env: Env, params: str, flags: OpenFlag) -> None:
        super().__init__(env, params, flags)
        self._options = _parse(params)
        self.log_name = ""
        """The log's name, known once the driver is open."""
        self._image = ""
        self._done_hook = self._write_done
        self._waiting: dict[Request, Callable[[Request], None]] = {}
        self._store: LogStore | None = None
        self._server: LogServer | None = None
        self._journal: Journal | None = None
        self._activity: Activity | None = None
        self._hot: dict[int, int] = {}
        """The extents that may be written to at once; see writelog.activity."""

    def open(self) -> None:
        """LogError if the log is in use, or its memory or socket cannot be had."""
        leaf = leaf_of(self.next)
        given, granularity_bytes = self._options.name, self._options.granularity_bytes
        self.log_name = check_name(given or _name_from(leaf))
        if self.flags & OpenFlag.QUERY:
            return
        self._image = _identity(leaf)
        identity = f"name:{given}" if given else f"path:{self._image}"
        run_dir = self.env.run_dir
        place = self._options.place(leaf) if not self.info.read_only else None
        store = LogStore(run_dir, self.log_name, self.info.size_bytes, granularity_bytes, identity, place,
                         self._options.hot)
        try:
            self._server = LogServer(self.env.loop, store, self.next, run_dir, self.log_name)
            self._journal = store.start_journal(self.env.loop, self.env.workers, self)
        except BaseException:
            store.close()
            raise
        if self._journal is not None:
            self._activity = self._journal.activity
            self._hot = self._activity.hot
        self._store = store
        self._map = store.map
        self._map.forgets_unflushed = leaf.keeps_tables
        self._next_write, self._next_submit = self.next.queue_write, self.next.submit

    def bind(self, lower: Driver) -> None:
        """Of an open log: go on above `lower`. If that is another image than the one after which the log is named,
        the log keeps the name as one that was given to it, in `params` too: with these it is found again."""
        super().bind(lower)
        if self._store is None or self._server is None:
            return
        self._next_write, self._next_submit = lower.queue_write, lower.submit
        leaf = leaf_of(lower)
        self._map.forgets_unflushed = leaf.keeps_tables
        if not self._options.name and _identity(leaf) != self._image:
            self._options = replace(self._options, name=self.log_name)
            self._store.set_identity(f"name:{self.log_name}")
        if self.sidecar_path is not None and self._options.place(leaf) != self.sidecar_path:
            self._options = replace(self._options, sidecar=str(self.sidecar_path))
        self.params = str(self._options)
        self._server.go_on(lower)
        if self._journal is not None:
            self._journal.go_on()

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
            self._journal = self._activity = None
            if store is not None:
                del self._map
                store.close()

    def queue_write(self, request: Request) -> bool:
        return self._change(request, self._next_write)

    def queue_zeroes(self, request: Request) -> bool:
        return self._change(request, self.next.queue_zeroes)

    def queue_discard(self, request: Request) -> bool:
        return self._change(request, self.next.queue_discard)

    def queue_flush(self, request: Request) -> bool:
        released = self._map.flush_begins() if self._store is not None else None
        if released is None:
            return self.next.queue_flush(request)
        done = request.done

        def ended(request: Request) -> None:
            request.done = done
            self._map.flush_ended(released, request.error)

        def ended_late(request: Request) -> None:
            ended(request)
            done(request)

        request.done = ended_late
        if not self.next.queue_flush(request):
            return False
        ended(request)
        return True

    def _change(self, request: Request, verb: Callable[[Request], bool], is_admitted: bool = False) -> bool:
        """Mark and pass on what goes to hot extents, or `is_admitted`; other requests wait for their intent.

        A request that stays under way is in flight until its `done` is called. The hook is set first, so that it
        comes after those of the levels below, when they are through with the request.
        """
        offset, length, activity = request.offset, request.length, self._activity
        if activity is not None and not is_admitted:
            first, last = offset >> EXTENT_SHIFT, (offset + length - 1) >> EXTENT_SHIFT
            if first == last and first in self._hot:
                self._hot[first] = activity.now
            elif not activity.is_hot(first, last):
                self._wait(activity, first, last, request, verb)
                return False
        done = request.done
        self._map.mark(offset, length)
        request.done = self._done_hook
        if verb(request):
            request.done = done
            return True
        self._map.in_flight[request] = (offset, length)
        self._waiting[request] = done
        return False

    def _wait(
        self, activity: Activity, first: int, last: int, request: Request, verb: Callable[[Request], bool]
    ) -> None:
        """Go on with `request` when its intent is durable. One that is wide is marked now, and in flight, so that
        nobody takes its blocks before it has ended."""
        is_wide = activity.is_wide(first, last)
        if is_wide:
            self._map.mark(request.offset, request.length)
            self._map.in_flight[request] = (request.offset, request.length)
        activity.wait(first, last, partial(self._go_on, request, verb, is_wide))

    def _go_on(self, request: Request, verb: Callable[[Request], bool], is_wide: bool, code: int) -> None:
        if is_wide:
            del self._map.in_flight[request]
        if code:
            request.error = code
            request.done(request)
        elif self._change(request, verb, is_wide):
            request.done(request)

    def submit(self) -> None:
        self._next_submit()
        if self._journal is not None:
            self._journal.submit()

    def _write_done(self, request: Request) -> None:
        del self._map.in_flight[request]
        request.done = self._waiting.pop(request)
        request.done(request)

    # What the journal asks for

    def flush(self, done: Callable[[int], None]) -> None:
        """Make durable what was written so far, then `done(0)`, or with an errno."""
        if not self.info.features & Feature.FLUSH:
            done(0)
            return
        request = Request(FLUSH, flags=BACKGROUND, done=lambda request: done(request.error))
        if self.queue_flush(request):
            done(request.error)
        else:
            self._next_submit()

    def landed(self) -> None:
        """Requests that waited have gone on."""
        self._next_submit()

    def quiesce(self, done: Callable[[], None]) -> None:
        """Start no more reads for clients, and call `done` when none is in flight and the side-car is complete:
        the way to a `close` that does not wait."""
        journal = self._journal
        if self._server is None:
            done()
        elif journal is None:
            self._server.quiesce(done)
        else:
            self._server.quiesce(lambda: journal.quiesce(done))

    @property
    def socket_path(self) -> Path:
        """The control socket. LogError when the log is not being served."""
        return self._serving().path

    @property
    def sidecar_path(self) -> Path | None:
        return self._store.sidecar_path if self._store is not None else None

    @property
    def generations(self) -> Generations:
        return self._opened().generations

    def complete(self, done: Resume) -> None:
        """The disk was handed over: if the copy at the base lacks nothing, both sides have what goes by that name
        now. `done(0)` when that is durable, or with an errno."""
        store = self._opened()
        if self.is_complete:
            store.change(store.generations.completed(), done)
        else:
            done(0)

    @property
    def is_complete(self) -> bool:
        """Whether the copy at the base lacks nothing."""
        has_base = self._opened().generations.base != 0
        return has_base and not (self._map.dirty.bits.any() or self._map.taken.bits.any())

    def part(self, done: Resume) -> None:
        """The disk goes on though it was handed over: it is another one than its copy from now on. `done` as for
        `complete`."""
        store = self._opened()
        store.change(store.generations.parted(new_id()), done)

    def start_over(self, base: int, done: Resume) -> None:
        """Nothing is written; whatever the log knew does not count any more. From now on the copy at `base` lacks
        what is written, and with 0 nothing is known of any copy. `done` as for `complete`."""
        store = self._opened()
        self._map.clear()
        store.change(Generations(new_id(), base), done)

    def _opened(self) -> LogStore:
        if self._store is None:
            raise LogError(f"the log {self.log_name!r} is not open", errno=errno.EBADF)
        return self._store

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


@dataclass(frozen=True)
class _Options:
    """What the level's text says."""

    name: str = ""
    """Empty if it is to be found."""
    granularity_bytes: int = DEFAULT_GRANULARITY_BYTES
    sidecar: str = ""
    """A path, "none", or empty: beside the image."""
    hot: int = DEFAULT_HOT

    def __str__(self) -> str:
        parts = [self.name]
        if self.granularity_bytes != DEFAULT_GRANULARITY_BYTES:
            parts.append(f"granularity={self.granularity_bytes}")
        if self.sidecar:
            parts.append(f"sidecar={self.sidecar}")
        if self.hot != DEFAULT_HOT:
            parts.append(f"hot={self.hot}")
        return ",".join(parts)

    def place(self, leaf: Driver) -> Path | None:
        """The side-car's path; None if there is to be none. LogError if it would be missed."""
        if self.sidecar not in ("", "none"):
            return Path(self.sidecar).absolute()
        if leaf.path is None:
            return None
        # An image that a snapshot puts above this one finds the log by its name, beside it as well.
        is_device = Path(leaf.path).is_block_device()
        path = beside(leaf.path, SIDECAR_SUFFIX, self.name or ("" if is_device else _name_from(leaf)))
        if not self.sidecar:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise LogError(f"cannot make the folder of the side-car: {error.strerror}", errno=error.errno,
                               path=str(path), hint=PLACE_HINT) from error
            return path
        if path.exists():
            raise LogError("there is a side-car, and what is written without it would be missing from it",
                           errno=errno.EEXIST, path=str(path), hint="leave out sidecar=none, or remove it")
        return None


def _parse(params: str) -> _Options:
    name, *options = params.split(",")
    name = name.strip()
    if "=" in name and name.partition("=")[0] in ("granularity", "sidecar", "hot"):
        raise LogError(f"option {name!r} stands where the name of the log is", errno=errno.EINVAL,
                       hint=f"without a name it is log:,{name}")
    if name:
        check_name(name)
    granularity_bytes, sidecar, hot = DEFAULT_GRANULARITY_BYTES, "", DEFAULT_HOT
    for option in options:
        key, _, value = option.strip().partition("=")
        if key == "granularity":
            granularity_bytes = check_granularity(_number(key, value, "65536"))
        elif key == "hot":
            hot = _number(key, value, "5000")
            if not MIN_HOT <= hot <= MAX_HOT:
                raise LogError(f"hot={hot}: from {MIN_HOT} to {MAX_HOT} extents can be hot", errno=errno.EINVAL)
        elif key == "sidecar" and value:
            sidecar = value
        else:
            raise LogError(f"unknown option {option.strip()!r}", errno=errno.EINVAL,
                           hint="log:[NAME][,granularity=BYTES][,sidecar=PATH][,hot=N]")
    return _Options(name, granularity_bytes, sidecar, hot)


def _number(key: str, value: str, example: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise LogError(f"{key} {value!r} is no number", errno=errno.EINVAL,
                       hint=f"for example log:NAME,{key}={example}")
    return int(value)


def _identity(leaf: Driver) -> str:
    """What tells the image below from all others."""
    return os.path.realpath(leaf.path) if leaf.path else f"{leaf.name}:{leaf.params}"


def _name_from(leaf: Driver) -> str:
    """A log's name from the image below: its last component, with what a name may not have replaced by '_'."""
    return re.sub(r"[^A-Za-z0-9_.+=@-]", "_", Path(leaf.path or leaf.params).name)
