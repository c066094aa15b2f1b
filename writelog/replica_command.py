"""`writelog-replica status` and `promote`: what a copy is good for, and how it becomes the disk by itself."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from tapcore import reach
from tapcore.chain import open_chain, parse
from tapcore.driver import Driver, Env, OpenFlag, leaf_of
from tapcore.drivers.log import Log
from tapcore.errors import ImageError, UsageError, WritelogError
from tapcore.loop import Loop
from tapcore.rundir import default_run_dir
from tapcore.text import size_text
from tapcore.vbd import Vbd
from tapcore.workers import Workers
from writelog.replica_copy import SUFFIX as JOURNAL_SUFFIX
from writelog.replica_copy import Copy
from writelog.replica_redofile import look
from writelog.replica_state import SUFFIX, State, StateStore, read_record

LONGEST_REPLAY_S: Final = 7 * 86400.0

STATUS_DESCRIPTION = """\
Tell what the copy at IMAGE is good for. It may be in use meanwhile. Exit code 0: it is consistent, the disk as it
was at one instant, and `writelog-replica promote` makes a disk of it; 1: it is not, or no copy at all."""

PROMOTE_DESCRIPTION = """\
The primary is lost: make the copy in CHAIN the disk. It is as the last epoch says; what came since is left out. No
writelog-replica may have it open. Serve it with tapdisk then. If the primary comes back it must not go on: what it
has is not what is written here from now on."""


def status(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="writelog-replica status", description=STATUS_DESCRIPTION,
                                     epilog="example:\n  writelog-replica status /vm/copy.img",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE", help="the image, or the chain that leads to it")
    _add_place_options(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    image = options.image if Path(options.image).exists() else parse(options.image)[-1].params
    record = options.state or _beside(image, SUFFIX)
    found = read_record(record)
    if found is None:
        raise UsageError("is no copy: nothing is known of it", path=image, hint=f"there is no {record}")
    state, _, _ = found
    epoch, journal_bytes, is_complete = look(options.journal or journal_of(record))
    if epoch != state.epoch:
        journal_bytes, is_complete = 0, False
    figures = {"disk": state.disk, "promoted": state.promoted, "consistent": state.is_consistent,
               "epoch": state.epoch, "time": state.at_ms / 1000, "journal_bytes": journal_bytes,
               "applying": is_complete}
    print(json.dumps(figures) if options.json else describe(state, journal_bytes, is_complete))
    return 0 if state.is_consistent or state.promoted else 1


def describe(state: State, journal_bytes: int = 0, is_applying: bool = False) -> str:
    """What the copy is good for."""
    if state.promoted:
        return f"promoted: it was a copy of disk {state.disk!r}, and is the primary now"
    if not state.is_consistent and not state.disk:
        return "empty: no sync has brought a copy yet"
    if not state.is_consistent:
        return (f"inconsistent since {when(state.at_ms)}: half a copy of disk {state.disk!r}, which a sync has to "
                "complete")
    text = f"consistent: disk {state.disk!r} as of {when(state.at_ms)} (epoch {state.epoch})"
    if is_applying:
        text += ("; the journal of the next epoch is complete and half applied, so that the image alone is of no "
                 "use before a writelog-replica, or `promote`, has ended that")
    elif journal_bytes:
        text += f"; {size_text(journal_bytes)} of the next epoch in the journal"
    return text


def when(at_ms: int) -> str:
    """A moment, for people."""
    return datetime.fromtimestamp(at_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")


def promote(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="writelog-replica promote", description=PROMOTE_DESCRIPTION,
                                     epilog="example:\n  writelog-replica promote qcow2:/vm/copy.qcow2",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", metavar="CHAIN", help="as it was given to writelog-replica")
    _add_place_options(parser)
    reach.add_option(parser)
    parser.add_argument("--force", action="store_true",
                        help="also a copy that is inconsistent: no file system may be whole on it")
    options = parser.parse_args(arguments)
    loop = Loop()
    workers = Workers(loop)
    env = Env(loop, workers, reach=reach.given(options.backing_dirs))
    vbd = Vbd(env, "replica")
    if any(level.driver == Log.name for level in parse(options.chain)):
        env.run_dir = default_run_dir().absolute()
    try:
        vbd.open(options.chain)
        vbd.pause(lambda: None)
        store = open_store(env, options.chain, options.state)
        copy = open_copy(env, vbd.chain.head, store, options.journal)
        _promote(loop, copy, options.force)
    finally:
        if vbd.state != "closed":
            vbd.close(lambda: None)
        workers.close()
    return 0


def _promote(loop: Loop, copy: Copy, force: bool) -> None:
    if copy.record is None or not (copy.state.base or copy.state.promoted):
        raise UsageError("nothing is known of this image: it is no copy that a writelog-replica has made",
                         hint="a disk that it is can be served by tapdisk as it is")
    if copy.state.promoted:
        raise UsageError("was promoted already", path=str(copy.record))
    recover(loop, copy)
    state = copy.state
    if not (state.is_consistent or force):
        raise ImageError(describe(state), path=str(copy.record),
                         hint="--force promotes it all the same: no file system may be whole on it")
    dropped_bytes = copy.part()
    print(f"promoted: {describe(state)}")
    if dropped_bytes:
        print(f"left out: {size_text(dropped_bytes)} that came since, and are no disk of one instant")


def open_store(env: Env, chain_text: str, record: Path | None) -> StateStore:
    """What is known of the image in a chain. `record` is where that is kept, None: beside the image, if that is a
    file."""
    chain = open_chain(env, chain_text, OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        image, size_bytes = leaf_of(chain.head).path, chain.info.size_bytes
    finally:
        chain.close()
    if record is None and image and stat.S_ISREG(Path(image).stat().st_mode):
        record = _beside(image, SUFFIX)
    return StateStore(record, Path(image) if image else None, size_bytes)


def open_copy(env: Env, head: Driver, store: StateStore, journal: Path | None,
              limit_bytes: int | None = None) -> Copy:
    """The copy in an open chain with `head`. `journal` is where its journal may be, None: beside what is known of
    it."""
    if store.path is not None and journal is None:
        journal = journal_of(store.path)
    return Copy(env, head, store, journal if store.path is not None else None, limit_bytes)


def recover(loop: Loop, copy: Copy) -> None:
    """Make good for whatever ended the last process that had the copy. WritelogError if that fails."""
    ended: list[WritelogError | None] = []
    copy.recover(ended.append)
    loop.run_until(lambda: bool(ended), LONGEST_REPLAY_S)
    if ended[0] is not None:
        raise ended[0]


def journal_of(record: Path) -> Path:
    """Where the journal is, if nobody says otherwise."""
    return record.with_name(record.name.removesuffix(SUFFIX) + JOURNAL_SUFFIX)


def _add_place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, metavar="FILE", help="as it was given to writelog-replica")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="the same")


def _beside(image: str, suffix: str) -> Path:
    return Path(os.path.realpath(image) + suffix)

