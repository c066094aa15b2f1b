"""What a replica knows of its image, in a small file beside it: so a sync goes on after either end was restarted.

    /vm/copy.img            the image
    /vm/copy.img.replica    {"base": "1f…", "disk": "vm1", "image": "2049:1234", "epoch": 5, …}

`base` is the primary's name for the state that this copy is being brought to: it lacks what the primary's log has
dirty or leased under that name, and nothing else. So the name is recorded, durably, before the first extent under
it is applied; and what is acknowledged is flushed. Each sync gives it a new one: `history` has the former ones, so
that a log which knows only those can be told that it is out of date. `is_consistent`: the image is the disk as it
was at one instant, the epoch; before anything else is written to it that is recorded, durably, too. `image` is the
device and inode of the image: beside another file of the same name the record counts for nothing.

The image has a fence (tapcore.fence) as long as it is a copy: a tapdisk that opens it for writing serves it
paused. Who forces it to go on, for a drill maybe, takes the fence away, and then no sync may go on with the copy.
That of a disk that was handed over names the state that its image holds: so a former primary is a copy, and gets
back what has changed since. What is found beside an image when it is to become a replica:

    fence          record          side-car     the image is
    of a state     -               -            a copy at that state
    a copy's       a copy's        -            that copy
    of no state    -               -            to be overwritten: its disk lives elsewhere
    none           a copy's        -            one that was opened by force: a copy of nothing that a log knows
    none           promoted        -            a disk of its own: only with --discard-my-data
    none           none            there        as that: it was served with a log, and never handed over
    none           none            none         new

Everything here blocks.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from tapcore import fence
from tapcore.beside import beside
from tapcore.drivers.log import SIDECAR_SUFFIX
from tapcore.durablefile import replace_file
from tapcore.errors import ImageError, ReplicationError, image_error
from writelog.generations import MAX_HISTORY, new_id

logger = logging.getLogger(__name__)

SUFFIX: Final = ".replica"
COPY: Final = "made a copy of disk"
"""The first words of a copy's fence."""
MAX_BYTES: Final = 8192
MAX_BASE: Final = (1 << 64) - 1
MAX_AT_MS: Final = 1 << 46
"""Of a clock that can be printed."""


@dataclass(frozen=True)
class State:
    """`base` 0: it is a copy of nothing yet. `epoch` counts the instants that the image was brought to, and what
    came between them; `at_ms` is the last instant by the primary's clock, or if it `is_consistent` no more, since
    when by this host's."""

    base: int = 0
    disk: str = ""
    promoted: bool = False
    history: tuple[int, ...] = ()
    """Newest first."""
    is_consistent: bool = False
    epoch: int = 0
    at_ms: int = 0
    has_journal: bool = False
    """What was acknowledged may be there alone."""

    def renamed(self, base: int, disk: str) -> State:
        """The copy is called `base` from now on, its disk `disk`."""
        former = (self.base, *self.history) if self.base not in (0, base) else self.history
        return replace(self, base=base, disk=disk, history=former[:MAX_HISTORY])


def judge(record: State | None, fence: str | None, fence_state: int, has_sidecar: bool) -> tuple[State, str]:
    """See the table: what the image is a copy of, and if it is a disk of its own, why."""
    if fence_state:
        former = record or State()
        return replace(former, base=fence_state, promoted=False, is_consistent=True, epoch=former.epoch + 1), ""
    if record is not None and record.base and fence is not None and fence.startswith(COPY):
        return replace(record, promoted=False), ""  # if it was promoted, then not to the end
    if fence is not None:
        return State(), ""
    if record is not None and record.promoted:
        return record, "this image was promoted: it is the primary, not a replica"
    if record is not None and record.base:
        return replace(record, base=new_id(), is_consistent=False, epoch=record.epoch + 1), ""
    if record is None and has_sidecar:
        return State(), "this image was served with a write log and not handed over: it is a disk of its own"
    return State(), ""


class StateStore:
    """The state, kept in `path` for an `image` of `size_bytes`; without a path, in memory alone. `own` says why
    the image is a disk of its own, if it is one, and no replica."""

    def __init__(self, path: Path | None = None, image: Path | None = None, size_bytes: int = 0) -> None:
        """ImageError if there is a file that cannot be read or makes no sense."""
        self.state = State()
        self.own = ""
        self.path = path
        self._size_bytes = size_bytes
        self.image = str(image) if image is not None else None
        self._identity = _identity(image) if image is not None else ""
        self._was_copy = False
        """What was here before this image was one: the side-car is that one's."""
        if path is not None:
            record = self._load(path)
            if image is None:
                self.state = record or State()
                return
            why, state = fence.read(str(image)), fence.state_of(str(image))
            has_sidecar = not self._was_copy and beside(str(image), SIDECAR_SUFFIX).exists()
            self.state, self.own = judge(record, why, state, has_sidecar)
            if state:
                self.state = replace(self.state, at_ms=fence.time_ms(str(image)))
            if record is not None and record.base and self.state.base not in (0, record.base):
                logger.warning("%s is not the copy of disk %r any more that it was: it was opened by force, or "
                               "was a primary since", image, record.disk)

    def discard(self) -> None:
        """What the image holds may be overwritten, though it is a disk of its own."""
        self.state, self.own = State(), ""

    def claim(self) -> None:
        """Before a new image gets a log, have a record of what it is meant to be."""
        if self.path is not None and not self.path.exists():
            self._write(self.path, self.state)

    def _load(self, path: Path) -> State | None:
        found = read_record(path)
        if found is None:
            return None
        state, image, size_bytes = found
        if (image, size_bytes) != (self._identity, self._size_bytes):
            logger.warning("%s was written for another image of this name, and is ignored", path)
            self._was_copy = not state.promoted
            return None
        return state

    def store(self, state: State) -> None:
        """Durably, and fence the image, or take its fence away if it is promoted. ReplicationError or ImageError,
        with nothing changed that counts, if that cannot be done."""
        image = self.image
        if self.path is not None:
            why = f"{COPY} {state.disk!r} of another host"
            is_copy = image is not None and not state.promoted
            if is_copy and fence.read(str(image)) is None:
                self._write(self.path, State())  # with a fence, a former record would count
                fence.write(str(image), why)
            self._write(self.path, state)
            if is_copy and fence.read(str(image)) != why:
                fence.write(str(image), why)  # not before: until then the fence says what the image holds
        if image is not None and state.promoted:
            fence.clear(image)
        self.state = state

    def _write(self, path: Path, state: State) -> None:
        record = asdict(state) | {"base": f"{state.base:016x}", "image": self._identity,
                                  "size_bytes": self._size_bytes,
                                  "history": [f"{name:016x}" for name in state.history]}
        try:
            replace_file(path, json.dumps(record, indent=1).encode() + b"\n")
        except OSError as error:
            raise ReplicationError(f"cannot record the state of the replica: {error.strerror}",
                                   errno=error.errno, path=str(path)) from error


def read_record(path: Path) -> tuple[State, str, int] | None:
    """(state, the image's identity, the disk's size) as `path` has it; None if there is no such file. ImageError
    if it cannot be read or makes no sense."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise image_error(error, str(path), "read what is known of the replica") from error
    try:
        found = json.loads(text)
        history = tuple(int(name, 16) for name in found["history"])
        state = State(int(found["base"], 16), found["disk"], found["promoted"], history[:MAX_HISTORY],
                      found["is_consistent"], found["epoch"], found["at_ms"], found["has_journal"])
        if not _makes_sense(state):
            raise ValueError
        return state, str(found["image"]), int(found["size_bytes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ImageError("this is no record of a replica", path=str(path),
                         hint="remove it if the image may be overwritten") from None


def _makes_sense(state: State) -> bool:
    return (0 <= state.base <= MAX_BASE and isinstance(state.disk, str) and type(state.promoted) is bool
            and type(state.is_consistent) is bool and type(state.has_journal) is bool
            and type(state.epoch) is int and state.epoch >= 0
            and type(state.at_ms) is int and 0 <= state.at_ms <= MAX_AT_MS)


def _identity(image: Path) -> str:
    try:
        status = image.stat()
    except OSError as error:
        raise image_error(error, str(image), "look at the image") from error
    return f"{status.st_dev}:{status.st_ino}"
