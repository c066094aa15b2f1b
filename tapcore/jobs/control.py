"""The ops of the control protocol that begin jobs, tell of them and end them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from tapcore.control_server import Call
from tapcore.disk import Disk
from tapcore.driver import Env
from tapcore.errors import ControlError, UsageError
from tapcore.jobs.commit import Commit
from tapcore.jobs.job import Job, Settle
from tapcore.jobs.snapshot import Snapshot
from tapcore.jobs.stream import Stream


class Jobs:
    """`disks` are the engine's, `find` gives the one that a call names or raises ControlError."""

    def __init__(self, env: Env, disks: dict[str, Disk], find: Callable[[Call], Disk], settle: Settle) -> None:
        self._env = env
        self._disks = disks
        self._find = find
        self._settle = settle

    def snapshot(self, call: Call) -> None:
        disk = self._free(call)
        options: dict[str, str] = {}
        for option in call.params.get("options", ()):
            key, equals, value = option.partition("=")
            if not equals:
                raise UsageError(f"option {option!r} has no '='", hint="an option is key=value")
            options[key] = value
        job = Snapshot(self._env, disk, self._settle, call.params["path"], call.params.get("format", "qcow2"),
                       options)
        self._begin(job)

        def over() -> None:
            if job.error is None:
                call.finish(job.as_dict())
            else:
                call.fail(job.error)

        job.when_over(over)

    def commit(self, call: Call) -> dict[str, Any]:
        return self._begin(Commit(self._env, self._free(call), self._settle, call.params.get("rate")))

    def stream(self, call: Call) -> dict[str, Any]:
        return self._begin(Stream(self._env, self._free(call), self._settle, call.params.get("rate"),
                                  call.params.get("base")))

    def jobs(self, call: Call) -> dict[str, Any]:
        disks = [self._find(call)] if "disk" in call.params else list(self._disks.values())
        return {"jobs": [disk.job.as_dict() for disk in disks if disk.job is not None]}

    def cancel(self, call: Call) -> None:
        job = self._find(call).job
        if job is None or job.is_over:
            raise ControlError(f"disk {call.params['disk']!r} has no job", errno=errno.ESRCH)
        job.cancel()
        job.when_over(lambda: call.finish({"job": job.as_dict()}))

    def _free(self, call: Call) -> Disk:
        """The disk of a call that begins a job. ControlError if it cannot have one now."""
        disk = self._find(call)
        if disk.job is not None and not disk.job.is_over:
            raise ControlError(f"disk {disk.name!r} has a job already: {disk.job.kind}", errno=errno.EBUSY,
                               hint="wait for it (tap-ctl jobs), or end it (tap-ctl cancel)")
        if disk.vbd.read_only:
            raise ControlError(f"disk {disk.name!r} is read-only", errno=errno.EROFS)
        if disk.vbd.fenced or disk.handing_over:
            raise ControlError(f"disk {disk.name!r} was {disk.vbd.fenced or 'handed over'}", errno=errno.EPERM,
                               hint="its images are not changed any more")
        if not disk.vbd.chain.drivers:
            raise ControlError(f"disk {disk.name!r} has no open chain", errno=errno.ENODEV)
        return disk

    def _begin(self, job: Job) -> dict[str, Any]:
        """Its first news. WritelogError, with nothing changed, if it cannot begin."""
        before, job.disk.job = job.disk.job, job
        job.start()
        if job.error is not None:
            job.disk.job = before
            raise job.error
        return {"job": job.as_dict()}
