"""What the connections of one log share: the log itself, who has it, and the reads that are under way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tapcore.driver import Driver
from tapcore.errors import LogError
from tapcore.loop import Loop
from writelog.control import Figures
from writelog.dirtymap import WINDOW_BLOCKS, DirtyMap
from writelog.generations import Generations
from writelog.logstore import LogStore
from writelog.shm import Region, region_name

if TYPE_CHECKING:
    from writelog.logconn import Connection

Begin = Callable[[Callable[[], None]], None]
"""Starts something, and calls back when it has ended."""
Steps = Generator[Begin | None, None, None]
"""None gives others their turn; a Begin has the connection wait."""


@dataclass
class LogContext:
    """What the connections of one log share."""

    loop: Loop
    store: LogStore
    lower: Driver
    """The level below the log: what the ring reads."""
    run_dir: Path
    name: str
    holder: Connection | None = None
    """The one that has taken or filled by a version 1 message: until it ends, others only look."""
    clearing: int = 0
    """Messages of the original that clear bits and are under way: nobody becomes the holder meanwhile."""
    watcher: Connection | None = None
    """The one for which written chunks are noted down."""
    connections: set[Connection] = field(default_factory=set)
    """All that still have a client or reads in flight."""
    reads: int = 0
    """Ring reads in flight, of all connections."""
    quiescing: bool = False
    """No more reads are started."""
    reads_ended: list[Callable[[], None]] = field(default_factory=list)
    """Called once, when `reads` becomes 0."""
    regions_made: int = 0

    @property
    def map(self) -> DirtyMap:
        return self.store.map

    def new_region(self) -> Region:
        self.regions_made += 1
        return Region.create(region_name(self.run_dir, self.name, self.regions_made))

    def figures_steps(self) -> Generator[None, None, Figures]:
        """The figures, counted a window at a time."""
        dirty_map, ids = self.map, self.store.generations
        dirty = leased = 0
        for start in range(0, dirty_map.blocks, WINDOW_BLOCKS):
            dirty += dirty_map.dirty.bits.count(1, start, start + WINDOW_BLOCKS)
            leased += dirty_map.taken.bits.count(1, start, start + WINDOW_BLOCKS)
            yield
        return Figures(
            granularity_bytes=dirty_map.dirty.granularity_bytes, sectors=dirty_map.sectors,
            generation=self.store.generation, dirty_blocks=dirty, leased_blocks=leased,
            in_flight=len(dirty_map.in_flight), clients=len(self.connections), leases=len(dirty_map.leases),
            current=ids.current, base=ids.base, former=ids.former)

    def rename(self, ids: Generations, *, all_dirty: bool = False) -> Steps:
        """Give the log other ids; LogError if that cannot be made durable."""
        codes: list[int] = []

        def begin(ended: Callable[[], None]) -> None:
            def changed(code: int) -> None:
                codes.append(code)
                ended()

            self.store.change(ids, changed, all_dirty=all_dirty)

        yield begin
        if codes[0]:
            raise LogError("the log's side-car cannot be written", errno=codes[0])
