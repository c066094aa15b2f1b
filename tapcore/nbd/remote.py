"""A disk at the other end of NBD connections: one request, one command, and connections made again when they end.

    queue_…(request) ▶ _queue ── submit ──▶ Link.send ── reply ──▶ request.done
                          ▲                    │ pending
                          └── the link is lost ┘

A request is in exactly one place: in `_queue`, or pending on one link. When a link is lost, its pending requests
return to the queue's head and are sent again, on another link or when there is one again. Nothing is given up: the
requests wait, as they would for a disk that is slow.

Why a command may be carried out twice: the first time may have happened, without its reply, or not. Reading,
writing the same bytes, zeroing, trimming and flushing a second time ends in the state of doing it once, as long as
nobody relies on what was between: and nobody does, for the request is not complete, so a guest has neither read
the outcome nor written over it. A flush under way is repeated like the others: it covers what was complete when
it was queued, and so does the second.

What that cannot cure, and no NBD client can (QEMU's included):
  - A server that *lost* what it had acknowledged and not flushed (its own cache, its host's memory) says nothing
    of it when it is back; the next flush succeeds. With `fua` every change is durable before it is acknowledged.
  - A server that is alive, and still carries out a write of a connection that has ended, could do so after the
    same write was repeated, acknowledged and followed by a newer one. So a connection is not given up lightly:
    each time that one was, only for being silent, the patience with the next one doubles.
"""

from __future__ import annotations

import errno
import logging
import os
import ssl
from functools import partial
from typing import Final

from tapcore.driver import Env
from tapcore.loop import Timer
from tapcore.nbd import wire
from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client_codec import ServerOffer
from tapcore.nbd.link import Dial, Link
from tapcore.nbd.reply_decoder import Transaction
from tapcore.request import (
    FAST,
    FUA,
    NO_HOLE,
    STATUS_HOLE,
    STATUS_ZERO,
    Extent,
    Request,
    fail,
)

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
MIN_DELAY_S: Final = 0.1
MAX_DELAY_S: Final = 5.0
"""Between attempts to connect; a connection that lived for MAX_DELAY_S was a good one."""
MAX_PATIENCE_S: Final = 600.0
WRONG_SERVER_ERRNO: Final = errno.ENXIO

_FLAGS: Final = {
    flags: (wire.NBD_CMD_FLAG_FUA if flags & FUA else 0) | (wire.NBD_CMD_FLAG_NO_HOLE if flags & NO_HOLE else 0)
    | (wire.NBD_CMD_FLAG_FAST_ZERO if flags & FAST else 0)
    for flags in range((FUA | NO_HOLE | FAST) + 1)
}
_FLAG_MASK: Final = FUA | NO_HOLE | FAST
_CHANGE_FLAGS: Final = (wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_SEND_TRIM
                        | wire.NBD_FLAG_SEND_WRITE_ZEROES | wire.NBD_FLAG_SEND_FAST_ZERO)
_ERRNOS: Final = frozenset(wire.NBD_ERRORS.values())
_READ, _WRITE, _STATUS = wire.NBD_CMD_READ, wire.NBD_CMD_WRITE, wire.NBD_CMD_BLOCK_STATUS


class Remote:
    """The export at `address`. Its verbs complete requests early only when the server there is the wrong one.

    Requests must be what the server's `offer` allows: flags, commands, block sizes. `connections` is how many to
    have, if the server says that several show the same disk; `timeout_s` how long a server may owe a reply and be
    silent, 0 for ever; `fua` adds FUA to every change; not `writing` says that there are no changes.
    """

    def __init__(
        self, env: Env, address: NbdAddress, *, connections: int, timeout_s: float, writing: bool, fua: bool,
        tls: ssl.SSLContext | None = None
    ) -> None:
        self.address = address
        self._tls = tls
        self.offer: ServerOffer
        self._env = env
        self._wanted = connections
        self._timeout_s = timeout_s
        self._patience_s = timeout_s
        self._writing = writing
        self._fua_flag = wire.NBD_CMD_FLAG_FUA if fua else 0
        self._links: list[Link] = []
        self._turn = 0
        """Which link is the next to get a request."""
        self._queue: list[Transaction] = []
        self._free: list[Transaction] = []
        self._dial: Dial | None = None
        self._dial_timer: Timer | None = None
        self._delay_s = MIN_DELAY_S
        self._working = True
        """The last thing that was logged of the connection is that it works."""
        self._wrong = ""
        """Why the server that is there now is not the one that was opened."""
        self._closed = False

    def open(self) -> None:
        """Connect once, waiting for it; further connections follow in the background. ImageError says what is
        wrong."""
        dial = Dial(self.address, min(DIAL_TIMEOUT_S, self._timeout_s or DIAL_TIMEOUT_S), self._tls)
        dial.run()
        if dial.error is not None:
            raise dial.error
        assert dial.offer is not None
        self.offer = dial.offer
        if not self.offer.flags & wire.NBD_FLAG_CAN_MULTI_CONN:
            self._wanted = 1
        self._connected(dial)

    def close(self) -> None:
        """Hang up. What still waits fails with ESHUTDOWN."""
        self._closed = True
        if self._dial is not None:
            self._dial.cancel()
        if self._dial_timer is not None:
            self._dial_timer.cancel()
        links, self._links = self._links, []
        for link in links:
            self._finish(link)
            link.close(goodbye=True)
            self._queue.extend(link.decoder.pending.values())
        self._fail_all(errno.ESHUTDOWN)

    @property
    def waiting(self) -> int:
        """Requests that no connection has."""
        return len(self._queue)

    # Requests down

    def queue_read(self, request: Request) -> bool:
        return self._start(request, _READ, 0)

    def queue_write(self, request: Request) -> bool:
        return self._start(request, _WRITE, _FLAGS[request.flags & FUA] | self._fua_flag)

    def queue_flush(self, request: Request) -> bool:
        if self._start(request, wire.NBD_CMD_FLUSH, 0):
            return True
        flush = self._queue[-1]
        flush.offset = flush.length = 0
        flush.iov = ()
        return False

    def queue_discard(self, request: Request) -> bool:
        return self._start(request, wire.NBD_CMD_TRIM, _FLAGS[request.flags & FUA] | self._fua_flag)

    def queue_zeroes(self, request: Request) -> bool:
        return self._start(request, wire.NBD_CMD_WRITE_ZEROES,
                           _FLAGS[request.flags & _FLAG_MASK] | self._fua_flag)

    def queue_status(self, request: Request) -> bool:
        return self._start(request, _STATUS, 0)

    def _start(self, request: Request, command: int, flags: int) -> bool:
        if self._wrong:
            return fail(request, WRONG_SERVER_ERRNO)
        transaction = self._free.pop() if self._free else Transaction(0, 0, 0, 0)
        transaction.command = command
        transaction.flags = flags
        transaction.offset = request.offset
        transaction.length = request.length
        transaction.iov = request.iov
        transaction.missing_bytes = request.length if command == _READ else 0
        transaction.owner = request
        self._queue.append(transaction)
        return False

    def submit(self) -> None:
        """Send what is queued, if there is a link that takes it."""
        if not self._queue:
            return
        links = [link for link in self._links if not link.blocked]
        if not links:
            return
        queue, self._queue = self._queue, []
        count = len(links)
        if count == 1:
            links[0].send(queue)
            return
        self._turn += len(queue)
        for number, link in enumerate(links):
            if share := queue[(number + self._turn) % count :: count]:
                link.send(share)

    # Replies up

    def _finish(self, link: Link) -> None:
        """Complete the requests that `link` has replies to. The hot loop."""
        finished, free = link.decoder.finished, self._free
        while finished:
            transaction = finished.popleft()
            request: Request = transaction.owner
            if transaction.error or transaction.command == _STATUS:
                if transaction.error == wire.NBD_ESHUTDOWN and not self._closed:
                    # It has not been done, and never will be here.
                    self._again(transaction)
                    link.blocked = True
                    self._env.loop.call_soon(partial(link.give_up, "the server is shutting down"))
                    continue
                request.error = self._outcome(transaction, link.offer)
            if not link.proven:
                self._prove(link)
            transaction.owner = None
            transaction.iov = ()
            free.append(transaction)
            request.done(request)

    def _outcome(self, transaction: Transaction, offer: ServerOffer) -> int:
        """The errno of a request that failed, or of a block status, whose extents are set; it is as good as new
        afterwards."""
        code, extents = transaction.error, transaction.extents
        if transaction.message:
            logger.debug("%s", transaction.failed())
        transaction.error, transaction.message, transaction.extents = 0, "", {}
        if code:
            return code if code in _ERRNOS else errno.EIO
        context_id = allocation_id(offer)
        found = _clipped(extents.get(context_id, []) if context_id is not None else [], transaction.length)
        if not found:
            logger.warning("%s: no usable answer to %s", self.address, transaction)
            return errno.EIO
        transaction.owner.extents = found
        return 0

    def _again(self, transaction: Transaction) -> None:
        """Put a request back, as if it had never been sent."""
        transaction.error, transaction.message = 0, ""
        transaction.extents.clear()
        transaction.missing_bytes = transaction.length if transaction.command == _READ else 0
        self._queue.append(transaction)

    def _fail_all(self, code: int) -> None:
        queue, self._queue = self._queue, []
        for transaction in queue:
            request: Request = transaction.owner
            request.error = code
            request.done(request)

    # Connections

    def _connected(self, dial: Dial) -> None:
        assert dial.sock is not None and dial.offer is not None
        self._links.append(Link(self._env.loop, dial.sock, dial.offer, self._patience_s,
                                finished=self._finish, lost=self._lost, writable=self.submit))
        if len(self._links) < self._wanted:
            self._start_dial()

    def _lost(self, link: Link, why: str) -> None:
        self._links.remove(link)
        fresh, self._queue = self._queue, []
        for transaction in link.decoder.pending.values():
            self._again(transaction)
        count = len(self._queue)
        self._queue += fresh
        if link.proven or self._env.loop.time_s() - link.born_s >= MAX_DELAY_S:
            self._delay_s = MIN_DELAY_S
        if link.timed_out:
            self._patience_s = min(2 * self._patience_s, max(MAX_PATIENCE_S, self._timeout_s))
        if self._links:
            logger.info("%s: one connection is lost (%s); %d others go on", self.address, why, len(self._links))
        elif self._working:
            self._working = False
            logger.warning("%s: the connection is lost (%s); %d requests wait until it is back", self.address, why,
                           count)
        else:
            logger.debug("%s: lost again: %s", self.address, why)
        self._dial_later()
        self.submit()

    def _prove(self, link: Link) -> None:
        """The first reply on a link: the server is back, if it was away."""
        link.proven = True
        self._delay_s = MIN_DELAY_S
        self._patience_s = self._timeout_s
        if not self._working:
            self._working = True
            logger.warning("%s: the server answers again", self.address)

    def _dial_later(self) -> None:
        if self._dial is None and self._dial_timer is None:
            self._dial_timer = self._env.loop.call_later(self._delay_s, self._start_dial)
            self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)

    def _start_dial(self) -> None:
        self._dial_timer = None
        if self._dial is None:
            self._dial = dial = Dial(self.address, DIAL_TIMEOUT_S, self._tls)
            self._env.workers.submit(dial.run, partial(self._dialled, dial))

    def _dialled(self, dial: Dial) -> None:
        self._dial = None
        offer = dial.offer
        wrong = "" if offer is None else self._difference(offer)
        if offer is None or wrong or self._closed:
            if dial.sock is not None:
                dial.sock.close()
            if not self._closed:
                self._not_connected(dial, wrong)
            return
        if self._wrong:
            logger.warning("%s: the server is the right one again", self.address)
            self._wrong = ""
        self._connected(dial)
        self.submit()

    def _not_connected(self, dial: Dial, wrong: str) -> None:
        logger.debug("%s: %s", self.address, wrong or dial.error)
        self._dial_later()
        if wrong and not self._links and wrong != self._wrong:
            logger.error("%s: %s: this is not the disk that was opened; requests fail with %s until it is back",
                         self.address, wrong, os.strerror(WRONG_SERVER_ERRNO))
            self._wrong = wrong
            self._fail_all(WRONG_SERVER_ERRNO)

    def _difference(self, new: ServerOffer) -> str:
        """Why requests made for the export that was opened must not be sent to `new`; "" if they may."""
        old = self.offer
        needed = old.flags & ((_CHANGE_FLAGS if self._writing else 0)
                              | (wire.NBD_FLAG_CAN_MULTI_CONN if self._wanted > 1 else 0))
        if new.size_bytes != old.size_bytes:
            return f"it has {new.size_bytes} bytes, not {old.size_bytes}"
        if self._writing and new.flags & wire.NBD_FLAG_READ_ONLY:
            return "it is read-only now"
        if needed & ~new.flags:
            return f"it lost features: its flags are {new.flags:#x}, they were {old.flags:#x}"
        if new.min_block not in range(1, old.min_block + 1) or max_payload_bytes(new) < max_payload_bytes(old):
            return (f"its block sizes are {new.min_block} to {new.max_block}, they were {old.min_block} to "
                    f"{old.max_block}")
        if allocation_id(old) is not None and allocation_id(new) is None:
            return "it has no block status any more"
        return ""


def allocation_id(offer: ServerOffer) -> int | None:
    """The id of the metadata context base:allocation, if the server agreed to it."""
    return next((number for number, name in offer.contexts.items() if name == wire.BASE_ALLOCATION), None)


def max_payload_bytes(offer: ServerOffer) -> int:
    """The longest read or write, a multiple of the smallest block."""
    longest_bytes = min(offer.max_block, wire.DEFAULT_MAX_PAYLOAD_BYTES)
    return longest_bytes - longest_bytes % offer.min_block


def _clipped(extents: list[Extent], length: int) -> list[Extent]:
    """`extents` as far as `length` bytes; none if one of them is empty."""
    found: list[Extent] = []
    for extent_length, state in extents:
        if extent_length == 0:
            return []
        found.append((min(extent_length, length), state & (STATUS_HOLE | STATUS_ZERO)))
        length -= extent_length
        if length <= 0:
            break
    return found
