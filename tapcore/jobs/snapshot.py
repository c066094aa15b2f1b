"""snapshot: a new, empty overlay on top of the image of a disk that runs.

    1 in a worker, before the pause     make the overlay, see whether it opens
    2 pause, drain, flush, quiesce      nothing is changed yet
    3 close the image, open the overlay, with the image read-only below it
    4 let the filters stand on the overlay, go on

If a step fails the image is opened as before, the overlay's file is removed, and the disk goes on. What a crash
leaves of it: up to step 4 an overlay that nothing was written to, so from the moment that it is whole it shows the
disk as it is. One that is not whole (td-img check) was never used: the disk is the image, and the file in the way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from tapcore.chain import Level, close_image, open_image
from tapcore.disk import Disk
from tapcore.driver import DiskInfo, Driver, Env, OpenFlag
from tapcore.durablefile import sync_folder
from tapcore.errors import ControlError, UsageError, WritelogError
from tapcore.formats.probe import FORMATS
from tapcore.formats.tools import Backing, find_tools
from tapcore.jobs.job import Job, Settle
from tapcore.jobs.steps import Steps, in_worker
from tapcore.jobs.switch import Switch

SAME_FORMAT = {"sync": "aio", "vhdsync": "vhd"}
"""Drivers that read a format which another driver reads too."""


class Snapshot(Job):
    kind = "snapshot"

    def __init__(
        self, env: Env, disk: Disk, settle: Settle, path: str, image_format: str, options: Mapping[str, str]
    ) -> None:
        """UsageError for a path or format that cannot be."""
        super().__init__(env, disk, settle)
        if not path.startswith("/"):
            raise UsageError(f"the overlay's path {path!r} is not absolute",
                             hint="the tapdisk has its own working directory")
        self._path = path
        self._tools = find_tools(image_format)
        self._options = options

    def steps(self) -> Steps[None]:
        former = self.chain.leaf
        self._former_info, self._former_path = former.info, former.path
        self._overlay = Level(self._tools.name, self._path)
        backing = backing_for(self._path, former)
        self.phase = "making the overlay"
        yield in_worker(self.env, lambda: self._make(backing))
        self.phase = "switching"
        switch = Switch(self)
        try:
            yield switch.begin
        except WritelogError:
            yield in_worker(self.env, self._remove)
            raise
        opened: list[Driver] = []
        try:
            close_image(former)
            yield in_worker(self.env, lambda: opened.append(self._open(OpenFlag.NONE)))
        except (WritelogError, OSError) as error:
            yield in_worker(self.env, self._remove)
            yield from open_again(self, switch, Level(former.name, former.params), error)
            raise
        switch.end(opened[0])
        self.result = {"chain": self.chain.text, "overlay": self._path}

    def _make(self, backing: Backing) -> None:
        self._tools.create(self._path, self._former_info.size_bytes, backing=backing, options=self._options)
        try:
            give_access_of(self._former_path, self._path)
            sync_folder(Path(self._path).parent)
            close_image(self._open(OpenFlag.RDONLY | OpenFlag.QUERY))
        except BaseException:
            self._remove()
            raise

    def _open(self, flags: OpenFlag) -> Driver:
        """The overlay, if it can take the former image's place."""
        top = open_image(self.env, self._overlay, flags)
        try:
            self._check(top.info)
        except ControlError:
            close_image(top)
            raise
        return top

    def _check(self, info: DiskInfo) -> None:
        missing = self._former_info.features & ~info.features
        if info.size_bytes != self._former_info.size_bytes:
            raise ControlError(f"the overlay has {info.size_bytes} bytes, the disk {self._former_info.size_bytes}",
                               errno=errno.EINVAL, hint="choose another format")
        if missing:
            raise ControlError(f"an overlay of the format {self._tools.name} lacks {missing!r}, which the guest "
                               "was told that there is", errno=errno.EOPNOTSUPP, hint="choose another format")

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            Path(self._path).unlink()


def give_access_of(image: str | None, path: str) -> None:
    """Let the new image at `path` be accessible to who can access `image`, as far as this process may do that."""
    status = Path(image).stat() if image is not None else None
    if status is None or not stat.S_ISREG(status.st_mode):
        Path(path).chmod(0o600)
        return
    Path(path).chmod(status.st_mode & 0o777)
    with contextlib.suppress(PermissionError):
        os.chown(path, status.st_uid, status.st_gid)


def open_again(job: Job, switch: Switch, image: Level, failure: Exception) -> Steps[None]:
    """End a switch in which `failure` has come between with `image` opened anew. If that fails too, ControlError,
    and the disk is left paused without a chain."""
    opened: list[Driver] = []
    try:
        yield in_worker(job.env, lambda: opened.append(open_image(job.env, image)))
    except WritelogError as error:
        switch.end_without_chain()
        raise ControlError(f"{failure}; and the former image does not open again: {error}", errno=error.errno,
                           hint="the disk waits: tap-ctl unpause --chain lets it go on") from error
    switch.end(opened[0])


def backing_for(path: str, parent: Driver) -> Backing:
    """How the image at `path` names `parent`: relative to its folder if both are in one, or absolute. ControlError
    if it cannot be a parent."""
    driver = SAME_FORMAT.get(parent.name, parent.name)
    if parent.path is None or driver not in FORMATS.values():
        raise ControlError(f"{parent.name}:{parent.params} cannot be the parent of an image",
                           errno=errno.EOPNOTSUPP, hint="a parent is the file of an image, or a block device")
    absolute = Path(parent.path).absolute()
    if absolute.parent.resolve() != Path(path).parent.resolve():
        return Backing(str(absolute), driver)
    # In front of a name with a colon QEMU would see a protocol.
    name = f"./{absolute.name}" if ":" in absolute.name else absolute.name
    return Backing(name, driver)
