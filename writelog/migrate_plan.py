"""What a migration does next: a table of what happens in each of its states. No I/O, no clock.

     disks ──▶ memory ──▶ last round ──▶ handing over ──▶ promoting ──▶ moving ──▶ done
       │          │            │              │               │            │
       └──────────┴─────┬──────┴──────────────┘               └─────┬──────┘
                        ▼                                           ▼
                     undone: the guest runs on here             stranded: an operator decides

The disks are copied until all could switch; then QEMU copies the memory, and stops the guest (its pre-switchover).
In the stop the disks' last round is sent, confirmed and handed over, all of them; the first promotion of a replica
is the point of no return. Then QEMU sends what is left, and the guest runs there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final


class State(Enum):
    DISKS = "copying the disks"
    MEMORY = "copying the memory"
    LAST_ROUND = "sending the last round"
    HANDING_OVER = "handing over"
    PROMOTING = "promoting the replicas"
    MOVING = "moving the guest"
    DONE = "done"
    UNDONE = "undone"
    STRANDED = "stranded"


class Event(Enum):
    READY = "all disks are in sync"
    STOPPED = "QEMU has copied the memory and stopped the guest"
    CONFIRMED = "all replicas have confirmed the last round"
    HANDED_OVER = "all disks are handed over"
    PROMOTED = "all replicas are promoted"
    MOVED = "the guest runs at the destination"
    FAULT = "something failed, took too long or was interrupted"


class Action(Enum):
    COPY_MEMORY = "have QEMU begin"
    SEND_LAST_ROUND = "let the disks pause and send the rest"
    HAND_OVER = "let the disks hand over"
    PROMOTE = "let the replicas be promoted"
    CONTINUE = "have QEMU send the rest and start the guest there"
    FINISH = "report"
    UNDO = "abort the syncs, cancel QEMU's migration, see that the guest runs on"
    STRAND = "see that the guest stands still here, and say how to go on"


TABLE: Final[Mapping[tuple[State, Event], tuple[State, Action]]] = {
    (State.DISKS, Event.READY): (State.MEMORY, Action.COPY_MEMORY),
    (State.MEMORY, Event.STOPPED): (State.LAST_ROUND, Action.SEND_LAST_ROUND),
    (State.LAST_ROUND, Event.CONFIRMED): (State.HANDING_OVER, Action.HAND_OVER),
    (State.HANDING_OVER, Event.HANDED_OVER): (State.PROMOTING, Action.PROMOTE),
    (State.PROMOTING, Event.PROMOTED): (State.MOVING, Action.CONTINUE),
    (State.MOVING, Event.MOVED): (State.DONE, Action.FINISH),
    (State.DISKS, Event.FAULT): (State.UNDONE, Action.UNDO),
    (State.MEMORY, Event.FAULT): (State.UNDONE, Action.UNDO),
    (State.LAST_ROUND, Event.FAULT): (State.UNDONE, Action.UNDO),
    (State.HANDING_OVER, Event.FAULT): (State.UNDONE, Action.UNDO),
    (State.PROMOTING, Event.FAULT): (State.STRANDED, Action.STRAND),
    (State.MOVING, Event.FAULT): (State.STRANDED, Action.STRAND),
}

FINAL: Final = frozenset({State.DONE, State.UNDONE, State.STRANDED})
NO_RETURN: Final = frozenset({State.PROMOTING, State.MOVING, State.DONE, State.STRANDED})
PAUSED: Final = frozenset({State.LAST_ROUND, State.HANDING_OVER})
"""The guest stands still, and may go on here: this is not to last."""


def fate_here(was_running: bool) -> str:
    """Of a guest whose migration was undone."""
    if was_running:
        return "the guest runs on here"
    return "the guest is here, paused as it was (QEMU wants a 'cont' before it tries again)"


def how_to_go_back(disks: Iterable[str], is_moving: bool) -> str:
    """What an operator does for the guest to run on here, after the point of no return."""
    unpause = " and ".join(f"tap-ctl unpause --force {name}" for name in disks)
    where = "if the guest runs there, quit QEMU here; if it does not," if is_moving else "the guest ran nowhere:"
    return (f"{where} end QEMU and the replicas there, then here {unpause}, and then 'migrate_cancel' and 'cont' "
            "in QEMU's monitor, which may not answer before; or start it again, if it has ended")
