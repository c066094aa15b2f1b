"""An engine in this process, so that a test can make a step of a job fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import LoopThread

from tapcore.chain import Level, open_image
from tapcore.control import ControlClient
from tapcore.driver import Driver, Env, OpenFlag
from tapcore.engine import Engine
from tapcore.errors import ImageError
from tapcore.nbd.client import NbdClient


class Rig:
    """One disk, `vm`, of the chain `chain`."""

    def __init__(self, env: Env, chain: str, *, read_only: bool = False) -> None:
        self.engine = Engine(env)
        path = self.engine.listen()
        self.engine.open(chain, "vm", read_only=read_only)
        self.loop = LoopThread(env)
        self.control = ControlClient(path, 60)
        self.uri = str(self.control.call("info", disk="vm")["uris"][0])

    def client(self) -> NbdClient:
        return NbdClient(self.uri)

    @property
    def chain(self) -> str:
        return str(self.control.call("info", disk="vm")["chain"])

    def run(self, op: str, **params: Any) -> dict[str, Any]:
        """Begin a commit or stream, and wait for its end."""
        self.control.call(op, disk="vm", **params)
        return self.end_of_job()

    def end_of_job(self) -> dict[str, Any]:
        job = self.engine.disks["vm"].job
        assert job is not None
        self.loop.until(lambda: job.is_over, 60)
        (news,) = self.control.call("jobs", disk="vm")["jobs"]
        return dict(news)

    def close(self) -> None:
        self.control.close()
        self.loop.call(self.engine.shutdown)
        self.loop.until(lambda: self.engine.is_down, 60)
        self.loop.stop()


def failing(path: Path) -> Callable[..., Driver]:
    """`open_image`, which fails for `path` unless that is only to be looked at."""
    def open_or_fail(env: Env, image: Level, flags: OpenFlag = OpenFlag.NONE) -> Driver:
        if str(path) in image.params and not flags & OpenFlag.QUERY:
            raise ImageError("the test says no", path=str(path))
        return open_image(env, image, flags)

    return open_or_fail
