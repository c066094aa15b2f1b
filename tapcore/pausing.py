"""Pausing, holding, slowing down, handing over: the ops of the control protocol that stop a disk and let it go on.

Who wants a disk paused, and what follows:

    pinned    a plain `pause`, or a hand-over     until `unpause`
    handed    `handover`, while it is recorded    until that is done, or has failed
    holder    the connection of `pause` + hold    until its `unpause` or `handover`, it ends, or its time is over
    closing   `close` or a shutdown               it does not run again

A disk runs when none of these is left. A connection that ends takes its hold with it, whatever ended it, and a
hold with a time limit ends with that: a program that dies, stops or hangs while it holds a disk does not leave a
guest waiting. A hand-over is answered when the fence beside the image (tapcore.fence) is on the disk; from the
moment it is asked for nothing lets the disk go on; the fence names what the copy was called, `state`, if the image
has all of it durably; a job (tapcore.jobs) is ended first. Who opens an image that
has a fence finds its disk paused.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, Final

from tapcore import fence
from tapcore.control_server import Call, Connection
from tapcore.disk import Disk
from tapcore.driver import Env
from tapcore.drivers.log import Log
from tapcore.errors import ControlError, WritelogError
from tapcore.vbd import PAUSED, REPLACING, RUNNING
from writelog.activity import Resume

logger = logging.getLogger(__name__)

TRY_AGAIN_S: Final = 0.01
"""Between looks whether a job has ended its exchange of a chain."""


class Pausing:
    """`disks` are the engine's, `find` gives the one that a call names or raises ControlError."""

    def __init__(self, env: Env, disks: dict[str, Disk], find: Callable[[Call], Disk]) -> None:
        self._env = env
        self._disks = disks
        self._find = find

    def pause(self, call: Call) -> None:
        disk = self._find(call)
        if self._comes_again(disk, self.pause, call):
            return
        hold = call.params.get("hold", False)
        if "hold_s" in call.params and not hold:
            raise ControlError("hold_s goes with hold", errno=errno.EINVAL)
        if hold:
            self._check_may_hold(disk, call.connection)

        def paused() -> None:
            if disk.vbd.state == PAUSED:
                call.finish({"state": PAUSED})
            else:
                call.fail(ControlError(f"disk {disk.name!r} was to go on, or to close, before it had paused",
                                       errno=errno.ECANCELED))

        disk.vbd.pause(paused)
        if hold:
            self._hold(disk, call.connection, call.params.get("hold_s"))
        else:
            disk.pinned = True

    def _comes_again(self, disk: Disk, op: Callable[[Call], dict[str, Any] | None], call: Call) -> bool:
        """A job is exchanging the disk's chain, which takes a moment: then `op` is done again after that."""
        if not disk.is_busy or disk.vbd.state != REPLACING:
            return False
        self._env.loop.call_later(TRY_AGAIN_S, lambda: _answer(op, call))
        return True

    def _check_may_hold(self, disk: Disk, connection: Connection) -> None:
        if disk.holder not in (None, connection):
            raise held(disk)
        if connection.ended:
            raise ControlError("the connection that is to hold the disk has ended", errno=errno.ENOTCONN)
        _check_not_overdue(disk, connection)

    def _hold(self, disk: Disk, connection: Connection, limit_s: float | None) -> None:
        """Make `connection` the holder, for `limit_s` seconds from now on if there is such a limit."""
        def overdue() -> None:
            logger.warning("%s: %s has held it for longer than it wanted to", disk.name, connection.peer)
            disk.let_go()
            disk.overdue = connection
            self.settle(disk)

        disk.let_go()
        disk.holder = connection
        if limit_s is not None:
            disk.hold_timer = self._env.loop.call_later(limit_s, overdue)

    def unpause(self, call: Call) -> dict[str, Any] | None:
        disk = self._find(call)
        if self._comes_again(disk, self.unpause, call):
            return None
        vbd = disk.vbd
        force = call.params.get("force", False)
        own = disk.holder is call.connection and not force
        if disk.handing_over:
            raise being_handed_over(disk)
        if vbd.fenced and not force:
            raise _fenced(disk)
        if disk.holder is not None and not own and not force:
            raise held(disk)
        if disk.overdue is call.connection and not force:
            disk.overdue = None
            if "chain" not in call.params:
                return {"state": vbd.state}

        def go_on(error: WritelogError | None = None) -> None:
            try:
                if error is not None:
                    raise error
                self._let_go(disk, own, force)
                call.finish({"state": vbd.state})
            except WritelogError as failure:
                call.fail(failure)
                self.settle(disk)

        def replaced(error: WritelogError | None = None) -> None:
            image = disk.image
            if error is None and not force:
                disk.heed_fence()
                error = _fenced(disk) if vbd.fenced else None
            if error is not None or not force:
                go_on(error)
                return
            disk.forcing += 1
            if vbd.fenced:
                self._tell_logs(disk, Log.part, lambda: self._unfence(image, unfenced))
            else:
                self._unfence(image, unfenced)

        def unfenced(error: WritelogError | None) -> None:
            disk.forcing -= 1
            go_on(error)

        if "chain" in call.params and disk.is_busy:
            raise ControlError(f"a job works on the images of disk {disk.name!r}", errno=errno.EBUSY,
                               hint="wait for it (tap-ctl jobs), or end it (tap-ctl cancel)")
        if "chain" in call.params:
            vbd.replace_chain(call.params["chain"], replaced)
        elif force:
            replaced()
        else:
            self._let_go(disk, own, force)
            return {"state": vbd.state}
        return None

    def _let_go(self, disk: Disk, own: bool, force: bool) -> None:
        """End the connection's `own` hold, or else every reason for a pause, and let the disk go on if none is
        left. ControlError if it cannot, with nothing changed."""
        if disk.vbd.state != RUNNING and not (own and disk.pinned):
            disk.vbd.resume()
        disk.let_go()
        if not own:
            disk.pinned = False
        if force:
            disk.vbd.fenced = None

    def settle(self, disk: Disk) -> None:
        """Let a disk go on that nobody wants paused any more."""
        if disk.pinned or disk.handing_over or disk.holder is not None or disk.closing:
            return
        if disk.vbd.state == RUNNING:
            return
        if disk.is_busy and disk.vbd.state == REPLACING:
            return  # the job comes here when it is through with the chain
        try:
            disk.vbd.resume()
        except ControlError as error:
            logger.error("%s: cannot go on: %s", disk.name, error)

    def release(self, connection: Connection) -> None:
        """A connection has ended, and with it what it held."""
        for disk in self._disks.values():
            if disk.overdue is connection:
                disk.overdue = None
            if disk.holder is connection:
                logger.warning("%s: %s, which held it, has gone", disk.name, connection.peer)
                disk.let_go()
                self.settle(disk)
            if disk.throttler is connection:
                disk.throttler = None
                disk.vbd.limit_writes(None)

    def throttle(self, call: Call) -> dict[str, Any]:
        disk = self._find(call)
        rate = call.params["rate"]
        if disk.throttler not in (None, call.connection):
            raise ControlError(f"disk {disk.name!r} is slowed down by {disk.throttler.peer}", errno=errno.EBUSY,
                               hint="wait for it, or end it: the disk is as fast as it can be then")
        if call.connection.ended:
            raise ControlError("the connection that is to slow the disk down has ended", errno=errno.ENOTCONN)
        disk.throttler = call.connection if rate else None
        disk.vbd.limit_writes(rate or None)
        return {"rate": rate}

    # Handing over

    def handover(self, call: Call) -> None:
        disk = self._find(call)
        if disk.is_busy:
            disk.without_job(lambda: _answer(self.handover, call))
            return
        vbd = disk.vbd
        _check_not_overdue(disk, call.connection)
        if disk.handing_over:
            raise being_handed_over(disk)
        if disk.forcing:
            raise ControlError(f"disk {disk.name!r} is being forced to go on here", errno=errno.EBUSY)
        if disk.holder is not call.connection or vbd.state != PAUSED:
            raise ControlError(f"disk {disk.name!r} is not held by this connection", errno=errno.EPERM,
                               hint="pause it with hold first")
        if vbd.fenced:
            raise ControlError(f"disk {disk.name!r} was {vbd.fenced} already", errno=errno.EPERM)
        why, image = f"handed over to {call.params['to']}", disk.image
        disk.handing_over = True

        def recorded(error: WritelogError | None) -> None:
            disk.handing_over = False
            if error is not None:
                call.fail(error)
                self.settle(disk)
                return
            disk.let_go()
            disk.overdue = None
            disk.pinned = True
            vbd.fence(why)
            logger.warning("%s: %s", disk.name, why)
            self._tell_logs(disk, Log.complete, lambda: call.finish({"fenced": why}))

        def write_fence(code: int, state: int = 0) -> None:
            if code:
                logger.error("%s: cannot be flushed: %s; it will need a full copy", disk.name, os.strerror(code))
            self._in_worker(lambda: fence.write(str(image), why, 0 if code else state), recorded)

        state = int(call.params.get("state", "0"), 16)
        log = next((log for log in disk.logs if log.is_complete and log.generations.base == state), None)
        if image is None:
            recorded(None)
        elif log is None:
            write_fence(0)
        else:
            log.flush(lambda code: write_fence(code, state))

    def _unfence(self, image: str | None, done: Callable[[WritelogError | None], None]) -> None:
        if image is None:
            done(None)
        else:
            self._in_worker(lambda: fence.clear(image), done)

    def _tell_logs(self, disk: Disk, tell: Callable[[Log, Resume], None], done: Callable[[], None]) -> None:
        """`tell` each log of the disk, and `done()` when all have it durably, or cannot."""
        left = disk.logs

        def next_one(code: int = 0) -> None:
            if code:
                logger.error("%s: the side-car of a log has a former generation: %s", disk.name, os.strerror(code))
            if left:
                tell(left.pop(), next_one)
            else:
                done()

        next_one()

    def _in_worker(self, action: Callable[[], None], done: Callable[[WritelogError | None], None]) -> None:
        """`action()`, which blocks and may raise WritelogError, in a worker; then `done(error)`."""
        outcome: list[WritelogError | None] = [ControlError("it failed: see the log of the tapdisk")]

        def work() -> None:
            try:
                action()
                outcome[0] = None
            except WritelogError as error:
                outcome[0] = error

        self._env.workers.submit(work, lambda: done(outcome[0]))


def _answer(op: Callable[[Call], dict[str, Any] | None], call: Call) -> None:
    """Do what a call asks for that had to wait."""
    try:
        result = op(call)
        if result is not None:
            call.finish(result)
    except WritelogError as error:
        call.fail(error)


def _check_not_overdue(disk: Disk, connection: Connection) -> None:
    if disk.overdue is connection:
        raise ControlError(f"the hold of disk {disk.name!r} ran out, and the guest has gone on",
                           errno=errno.ETIMEDOUT, hint="unpause it, then begin again")


def _fenced(disk: Disk) -> ControlError:
    return ControlError(f"disk {disk.name!r} was {disk.vbd.fenced}", errno=errno.EPERM,
                        hint="writing to it again parts it from its copy: only by force, "
                             f"with tap-ctl unpause --force {disk.name}")


def being_handed_over(disk: Disk) -> ControlError:
    return ControlError(f"disk {disk.name!r} is being handed over", errno=errno.EBUSY)


def held(disk: Disk) -> ControlError:
    assert disk.holder is not None
    return ControlError(f"disk {disk.name!r} is held by {disk.holder.peer}", errno=errno.EBUSY,
                        hint="wait for it, or end it: the disk goes on then")
