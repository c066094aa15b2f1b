"""Whether a replica can take a disk, asked before anything begins: it answers with FACTS, and stays as it is."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from typing import Any, Final

import zmq

from tapcore.errors import ReplicationError
from tapcore.text import size_text
from writelog.sync_link import Link, LinkLost, Peer
from writelog.sync_source import Source
from writelog.wire import MAX_INT, VERSION, Facts, Failure, Hello, Message, Refused

ANSWER_S: Final = 30.0
QUESTIONS: Final = 2
"""How often to ask on one connection: the shortest answer tells the round trip."""


class _Again(ReplicationError):
    """The connection ended before there was an answer."""


@dataclass
class Target:
    """A replica as it is now; `problem` is why it cannot take the disk, if it cannot."""

    endpoint: str
    facts: Facts | None = None
    round_trip_s: float = 0.0
    problem: ReplicationError | None = None

    def figures(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = self.facts
        about = {} if facts is None else {
            "resumed": facts.base != 0, "size_bytes": facts.size_bytes, "free_bytes": facts.free_bytes,
            "held_bytes": facts.held_bytes, "round_trip_s": self.round_trip_s}
        return {"replica": self.endpoint, "problem": str(self.problem) if self.problem else None, **about}

    def __str__(self) -> str:
        facts = self.facts
        if facts is None:
            return str(self.problem)
        text = f"{self.endpoint}, {size_text(facts.size_bytes)}, answers in {self.round_trip_s * 1000:.1f} ms"
        if facts.free_bytes < MAX_INT:
            text += f", {size_text(facts.free_bytes)} free there"
        if facts.base:
            text += ", has the former copy"
        return f"{text}; it cannot take the disk: {self.problem}" if self.problem else f"{text}; it can take it"


def check(source: Source, peer: Peer, downtime_s: float, overwrite: bool = False) -> Target:
    """Ask the replica, and judge by what it says."""
    target = Target(peer.endpoint)
    try:
        hello = Hello(VERSION, bytes(16), source.size_bytes, source.name, *source.bases(), overwrite, False, True)
        try:
            target.facts, target.round_trip_s = _ask(peer, hello)
        except _Again:  # the replica listens anew, maybe, with another key
            target.facts, target.round_trip_s = _ask(peer, hello)
        target.problem = (_refusal(target) or _too_little_room(target.facts, source)
                          or _too_short_pause(target.round_trip_s, downtime_s))
    except ReplicationError as error:
        target.problem = error
    return target


def must_take(source: Source, peer: Peer, downtime_s: float, overwrite: bool) -> None:
    """ReplicationError if the replica cannot take the disk."""
    problem = check(source, peer, downtime_s, overwrite).problem
    if problem is not None:
        raise ReplicationError(f"disk {source.name!r}: {problem.message}", errno=problem.errno, hint=problem.hint)


def _ask(peer: Peer, hello: Hello) -> tuple[Facts, float]:
    """What it answers, and how soon. ReplicationError if it cannot be asked, or is of another version."""
    with zmq.Context() as context:
        link = Link(context, peer)
        try:
            link.greet(hello)
            facts = _answer(link)
            shortest_s = float("inf")
            for _ in range(QUESTIONS):
                asked_s = time.monotonic()
                link.send(hello)
                facts = _answer(link)
                shortest_s = min(shortest_s, time.monotonic() - asked_s)
            return facts, shortest_s
        except LinkLost as lost:
            kind = _Again if link.reached else ReplicationError
            raise kind(f"{peer.endpoint}: {lost}", errno=lost.errno, hint=lost.hint) from None
        finally:
            link.close()


def _answer(link: Link) -> Facts:
    deadline_s = time.monotonic() + ANSWER_S
    poller = zmq.Poller()
    for pollable in (link.socket, link.monitor):
        poller.register(pollable, zmq.POLLIN)
    while time.monotonic() < deadline_s:
        for message in link.receive():
            return _as_facts(link.peer.endpoint, message)
        link.check()
        poller.poll(50)
    raise ReplicationError(f"{link.peer.endpoint}: the replica does not answer, though it is there",
                           errno=errno.ETIMEDOUT)


def _as_facts(endpoint: str, message: Message) -> Facts:
    if isinstance(message, Facts):
        return message
    if isinstance(message, Refused | Failure):
        raise ReplicationError(f"{endpoint}: {message.message}", errno=errno.EPROTO, hint=message.hint or None)
    raise ReplicationError(f"{endpoint}: the replica answered {type(message).__name__} to a question",
                           errno=errno.EPROTO)


def _refusal(target: Target) -> ReplicationError | None:
    facts = target.facts
    if facts is None or not facts.reason:
        return None
    return ReplicationError(f"{target.endpoint}: {facts.message}", errno=errno.EINVAL, hint=facts.hint or None)


def _too_little_room(facts: Facts, source: Source) -> ReplicationError | None:
    """Of a full copy. What the image holds is written over; zeroes become holes."""
    has_bytes = facts.free_bytes + facts.held_bytes
    if facts.base or has_bytes >= source.size_bytes:
        return None
    needed_bytes = source.data_bytes()
    if needed_bytes <= has_bytes:
        return None
    return ReplicationError(
        f"the disk holds {size_text(needed_bytes)} of data, but the replica's file system has room for "
        f"{size_text(has_bytes)} of it: {size_text(facts.free_bytes)} free, and {size_text(facts.held_bytes)} in "
        "the image", errno=errno.ENOSPC, hint=f"make {size_text(needed_bytes - has_bytes)} of room there")


def _too_short_pause(round_trip_s: float, downtime_s: float) -> ReplicationError | None:
    if downtime_s > round_trip_s:
        return None
    return ReplicationError(
        f"a downtime of {downtime_s * 1000:.3g} ms is impossible: an answer of the replica alone takes "
        f"{round_trip_s * 1000:.3g} ms", errno=errno.EINVAL, hint="allow more with --downtime")
