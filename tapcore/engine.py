"""The engine of a tapdisk: its disks by name, and the control protocol (tapcore.control) that works on them."""

from __future__ import annotations

import errno
import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import tapcore
from tapcore.chain import parse
from tapcore.control import PROTOCOL
from tapcore.control_server import Call, ControlServer
from tapcore.disk import Disk
from tapcore.driver import Env, OpenFlag
from tapcore.drivers.log import Log
from tapcore.errors import ControlError, UsageError, WritelogError
from tapcore.jobs.control import Jobs
from tapcore.map_reader import MapReader
from tapcore.namelock import lock_name, unlock_name
from tapcore.nbd.address import parse_address
from tapcore.nbd.server import NbdServer
from tapcore.pausing import Pausing, being_handed_over, held
from tapcore.restart import HandedDisk, HandedOn
from tapcore.vbd import Vbd
from writelog.logstore import forget

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_+@-][A-Za-z0-9_.+@-]{0,63}")
NAME_HINT = "1 to 64 letters, digits and _ . + @ - are allowed, and no . in front"
TRY_AGAIN_S: Final = 0.05
"""Between tries to close a disk whose chain is being replaced."""


class Engine:
    """Disks, and the servers through which they are reached. Everything in the loop's thread.

    Call `listen` when the disks that are there from the start are open, and `shutdown` at the end.
    """

    def __init__(
        self,
        env: Env,
        *,
        max_retries: int = 100,
        retry_interval_s: float = 1.0,
        on_down: Callable[[], None] = lambda: None,
        tls: ssl.SSLContext | None = None,
        allow_remote: bool = False,
    ) -> None:
        """The retries of failed requests are as for `Vbd`, `tls` and `allow_remote` as for `NbdServer`;
        `on_down()` is called at the end of a shutdown."""
        self.disks: dict[str, Disk] = {}
        self.is_down = False
        self._env = env
        self._max_retries = max_retries
        self._retry_interval_s = retry_interval_s
        self._exports: dict[str, Vbd] = {}
        self._new_server = partial(NbdServer, env, tls=tls, allow_remote=allow_remote)
        self._shared = self._new_server(self._exports)
        self._pausing = pausing = Pausing(env, self.disks, self._find)
        jobs = Jobs(env, self.disks, self._find, pausing.settle)
        self._control = ControlServer(env, self._handle, pausing.release)
        self._on_down = on_down
        self._shutting_down = False
        self._shutdown_calls: list[Call] = []
        self.handed_on: HandedOn | None = None
        """What the program that follows this one is to serve; None if none follows."""
        self._ops: dict[str, Callable[[Call], dict[str, Any] | None]] = {
            "version": self._version, "list": self._list, "open": self._open, "close": self._close,
            "pause": pausing.pause, "unpause": pausing.unpause, "handover": pausing.handover, "stats": self._stats,
            "info": self._info, "map": self._map, "shutdown": self._shutdown, "throttle": pausing.throttle,
            "restart": self._restart,
            "snapshot": jobs.snapshot, "commit": jobs.commit, "stream": jobs.stream, "jobs": jobs.jobs,
            "cancel": jobs.cancel,
        }

    def listen(self) -> Path:
        """Serve the control protocol; returns the socket. ControlError if that cannot be done."""
        return self._control.listen()

    def share(self, address: str, listener_fd: int | None = None) -> None:
        """Listen on an NBD address that reaches by its name every disk that is opened later without an address of
        its own; `listener_fd` as for `NbdServer.listen`. UsageError or ControlError if it cannot."""
        _listen(self._shared, address, listener_fd)

    # Disks

    def open(
        self, chain: str, name: str | None = None, *, read_only: bool = False, nbd: Sequence[str] = (),
        listener_fds: Mapping[str, int] | None = None,
    ) -> Disk:
        """Open a disk and serve it: at the NBD addresses `nbd`, which reach it alone, or else at the shared ones,
        or if there are none at NAME.nbd in the run directory. `listener_fds` are of sockets that listen at some of
        these already. WritelogError, with nothing left open."""
        if self._shutting_down:
            raise ControlError("this tapdisk is shutting down", errno=errno.ESHUTDOWN)
        name = default_name(chain) if name is None else name
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a disk", hint=NAME_HINT)
        lock_fd = lock_name(self._env.run_dir, name)
        server, exports = self._shared, self._exports
        try:
            if nbd or not self._shared.addresses:
                exports = {}
                server = self._new_server(exports)
                for address in nbd or [f"unix:{self._env.run_dir / name}.nbd"]:
                    _listen(server, address, (listener_fds or {}).get(address))
            vbd = Vbd(self._env, name, max_retries=self._max_retries, retry_interval_s=self._retry_interval_s)
            vbd.open(chain, OpenFlag.RDONLY if read_only else OpenFlag.NONE)
        except BaseException:
            if server is not self._shared:
                server.close()
            unlock_name(self._env.run_dir, name, lock_fd)
            raise
        exports[name] = vbd
        disk = self.disks[name] = Disk(vbd, server, exports, lock_fd)
        disk.heed_fence()
        if vbd.fenced:
            vbd.pause(lambda: None)
            disk.pinned = True
            logger.warning("%s: %s; its requests wait. To write to it all the same: tap-ctl unpause --force %s",
                           name, vbd.fenced, name)
        return disk

    def adopt(self, disk: Disk) -> None:
        """Go on with a disk that was opened elsewhere, under a name that is locked."""
        self.disks[disk.name] = disk

    def uris(self, disk: Disk) -> list[str]:
        """The NBD URIs at which a disk is served."""
        is_secure = disk.server.tls is not None
        return [replace(parse_address(address), export=disk.name, tls=is_secure).uri
                for address in disk.server.addresses]

    def close(self, disk: Disk, done: Callable[[ControlError | None], None], *, forget_logs: bool = False) -> None:
        """Drain a disk, drop its clients, close it, then `done(error)`. With `forget_logs` the bitmaps of its logs
        are removed. ControlError, with nothing done, while its chain is being replaced, or it is handed over."""
        vbd = disk.vbd
        if disk.handing_over:
            raise being_handed_over(disk)

        def drained() -> None:
            # The replies of what just ended are sent at the end of this turn, before the clients are dropped.
            self._env.loop.call_soon(drop)

        def drop() -> None:
            disk.server.drop(vbd)
            if disk.server is not self._shared:
                disk.server.close()
            logs = [(log.log_name, log.sidecar_path) for log in disk.logs] if forget_logs else []
            vbd.close(lambda: closed(logs))

        def closed(logs: list[tuple[str, Path | None]]) -> None:
            failure = None
            try:
                for log_name, sidecar_path in logs:
                    forget(self._env.run_dir, log_name, sidecar_path)
            except (WritelogError, OSError) as error:
                failure = ControlError(f"disk {disk.name!r} is closed, but its logs are still there: {error}")
            unlock_name(self._env.run_dir, disk.name, disk.lock_fd)
            del self.disks[disk.name]
            done(failure)
            self._check_shutdown()

        vbd.pause(drained)
        disk.closing = True
        del disk.exports[disk.name]

    def shutdown(self) -> None:
        """Begin to close every disk and every socket. What is in flight is waited for."""
        self._shutting_down = True
        for disk in list(self.disks.values()):
            self._close_when_possible(disk)
        self._env.loop.call_soon(self._check_shutdown)

    def _close_when_possible(self, disk: Disk) -> None:
        if disk.closing:
            return
        if disk.is_busy:
            disk.without_job(lambda: self._close_when_possible(disk))
            return
        try:
            self.close(disk, lambda _: None)
        except ControlError:
            self._env.loop.call_later(TRY_AGAIN_S, lambda: self._close_when_possible(disk))

    def _check_shutdown(self) -> None:
        if not self._shutting_down or self.disks or self.is_down:
            return
        self.is_down = True
        self._shared.close()
        self._control.stop_listening()
        for call in self._shutdown_calls:
            call.finish({"pid": os.getpid()})
        self._control.close()
        self._on_down()

    # Control

    def _handle(self, call: Call) -> dict[str, Any] | None:
        """The result, or None if `call` will be answered later. WritelogError if it fails at once."""
        return self._ops[call.op](call)

    def _find(self, call: Call) -> Disk:
        name = call.params["disk"]
        disk = self.disks.get(name)
        if disk is None:
            hint = f"there are {', '.join(sorted(self.disks))}" if self.disks else "this tapdisk has none"
            raise ControlError(f"there is no disk {name!r}", errno=errno.ENOENT, hint=hint)
        if disk.closing:
            raise ControlError(f"disk {name!r} is closing", errno=errno.ESHUTDOWN)
        return disk

    def _version(self, call: Call) -> dict[str, Any]:
        return {"version": tapcore.__version__, "protocol": PROTOCOL, "pid": os.getpid()}

    def _list(self, call: Call) -> dict[str, Any]:
        return {"pid": os.getpid(), "disks": [self._summary(disk) for disk in self.disks.values()]}

    def _summary(self, disk: Disk) -> dict[str, Any]:
        vbd = disk.vbd
        return {"name": disk.name, "state": vbd.state, "size": vbd.info.size_bytes, "read_only": vbd.read_only,
                "fenced": vbd.fenced, "clients": disk.server.clients_of(vbd), "chain": vbd.chain.text,
                "uris": self.uris(disk)}

    def _describe(self, disk: Disk) -> dict[str, Any]:
        """All about a disk, ready for JSON."""
        vbd, info = disk.vbd, disk.vbd.info
        return self._summary(disk) | {
            "pid": os.getpid(),
            "sector_bytes": info.sector_bytes,
            "features": [str(feature.name).lower() for feature in info.features],
            "in_flight": vbd.in_flight,
            "waiting": vbd.waiting,
            "pinned": disk.pinned,
            "holder": disk.holder.peer if disk.holder else None,
            "handing_over": disk.handing_over,
            "image": disk.image,
            "job": disk.job.kind if disk.job is not None and disk.is_busy else None,
            "write_limit": vbd.throttle.rate if vbd.throttle is not None else None,
            "nbd": list(disk.server.addresses),
            "logs": [_describe_log(log) for log in disk.logs],
        }

    def _info(self, call: Call) -> dict[str, Any]:
        return self._describe(self._find(call))

    def _stats(self, call: Call) -> dict[str, Any]:
        disks = [self._find(call)] if "disk" in call.params else self.disks.values()
        return {"disks": {disk.name: disk.vbd.stats() for disk in disks}}

    def _open(self, call: Call) -> dict[str, Any]:
        params = call.params
        return self._describe(self.open(params["chain"], params.get("name"), nbd=params.get("nbd", ()),
                                       read_only=params.get("read_only", False)))

    def _close(self, call: Call) -> None:
        disk = self._find(call)
        if disk.holder not in (None, call.connection):
            raise held(disk)

        def closed(error: ControlError | None) -> None:
            if error is None:
                call.finish({"disk": disk.name})
            else:
                call.fail(error)

        def close() -> None:
            try:
                self.close(disk, closed, forget_logs=call.params.get("forget", False))
            except ControlError as error:
                call.fail(error)

        disk.without_job(close)

    def _shutdown(self, call: Call) -> None:
        self._shutdown_calls.append(call)
        self.shutdown()

    def _restart(self, call: Call) -> None:
        """As a shutdown; what is served now is `handed_on` then, with the sockets."""
        if not self.disks:
            raise ControlError("this process serves no disk that could go on", errno=errno.ENOENT)
        for disk in self.disks.values():
            if disk.holder is not None:
                raise held(disk)
            if disk.is_busy or disk.closing or disk.handing_over or disk.forcing:
                raise ControlError(f"disk {disk.name!r} has something under way", errno=errno.EBUSY,
                                   hint="see tap-ctl jobs; wait for its end, or cancel it")
        disks = [HandedDisk(disk.name, disk.vbd.chain.text, disk.vbd.read_only, disk.pinned,
                            disk.server.hand_on() if disk.server is not self._shared else [])
                 for disk in self.disks.values()]
        self.handed_on = HandedOn(self._shared.hand_on(), self._env.reach.named, disks)
        self._shutdown(call)

    # The map

    def _map(self, call: Call) -> dict[str, Any] | None:
        vbd = self._find(call).vbd
        size_bytes = vbd.info.size_bytes
        offset = call.params.get("offset", 0)
        length = call.params.get("length", max(0, size_bytes - offset))
        if offset + length > size_bytes:
            raise ControlError(f"{length} bytes at {offset} are not all on the disk, which has {size_bytes}",
                               errno=errno.EINVAL)
        MapReader(self._env.loop, vbd, call, offset, offset + length).step()
        return None


def _describe_log(log: Log) -> dict[str, Any]:
    """About a log of a disk, ready for JSON; ids are in hexadecimal, and 0 is none."""
    ids = log.generations
    return {"name": log.log_name, "socket": str(log.socket_path),
            "sidecar": str(log.sidecar_path) if log.sidecar_path else None, "current": f"{ids.current:016x}",
            "base": f"{ids.base:016x}", "former": f"{ids.former:016x}",
            "history": [f"{name:016x}" for name in ids.history]}


def default_name(chain: str) -> str:
    """A disk's name from its chain: the last component of the leaf's path, with what a name may not have replaced
    by '_'. ChainError if the chain makes no sense."""
    params = parse(chain)[-1].params
    name = re.sub(r"[^A-Za-z0-9_.+@-]", "_", Path(params).name)[:64]
    return f"_{name[1:]}" if name.startswith(".") else name


def _listen(server: NbdServer, address: str, listener_fd: int | None = None) -> None:
    """UsageError or ControlError if it cannot."""
    try:
        address.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{address!r} cannot be written as a URI", hint="use a path of UTF-8") from None
    server.listen(address, listener_fd)
