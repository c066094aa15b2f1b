"""A guest that writes all the while, and knows what its disk must hold."""

from __future__ import annotations

import random
import threading

from tapcore.nbd.client import NbdClient

SECTOR = 512
CHOICES = ("write", "write", "write", "zeroes", "trim", "read", "flush")


def check_disk(uri: str, disk: bytes | bytearray) -> None:
    """The export holds `disk`."""
    with NbdClient(uri) as client:
        assert client.size_bytes == len(disk)
        step = 1 << 20
        for at in range(0, len(disk), step):
            assert client.read(at, min(step, len(disk) - at)) == disk[at : at + step], at


class LiveWriter:
    """Changes random ranges of the disk at `uri`, whose content is `disk` when it begins, in a thread, until
    `stop`. No request may fail, and every read must show the last write."""

    def __init__(self, uri: str, disk: bytes, seed: int = 1, *, trims: bool = True) -> None:
        self.uri = uri
        self.client = NbdClient(uri, timeout_s=60)
        self.disk = bytearray(disk)
        self.flushed = bytes(disk)
        """What was there at the last flush."""
        self.since: list[tuple[int, bytes]] = []
        """(offset, data) of what was to be written since then."""
        self.requests = 0
        self.failure: Exception | None = None
        self._rng = random.Random(seed)
        self._choices = [kind for kind in CHOICES if trims or kind != "trim"]
        self._stopping = threading.Event()
        self._enough = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._one()
                with self._enough:
                    self.requests += 1
                    self._enough.notify_all()
        except Exception as error:
            self.failure = error
            with self._enough:
                self._enough.notify_all()

    def _one(self) -> None:
        rng, client, disk = self._rng, self.client, self.disk
        offset = rng.randrange(len(disk) // 512) * 512
        length = min(rng.choice((512, 4096, 65536, 70144)), len(disk) - offset)
        kind = rng.choice(self._choices)
        data = rng.randbytes(length) if kind == "write" else bytes(length)
        if kind in ("write", "zeroes", "trim"):
            self.since.append((offset, data))
        if kind == "write":
            client.write(offset, data, fua=rng.random() < 0.1)
            disk[offset : offset + length] = data
        elif kind == "zeroes":
            client.zeroes(offset, length)
            disk[offset : offset + length] = bytes(length)
        elif kind == "trim":
            client.trim(offset, length)
            disk[offset : offset + length] = client.read(offset, length)
        elif kind == "read":
            assert client.read(offset, length) == disk[offset : offset + length], f"{length} bytes at {offset}"
        else:
            client.flush()
            self.flushed, self.since = bytes(disk), []

    def wait(self, requests: int, timeout_s: float = 60) -> None:
        """Until so many more requests are done."""
        with self._enough:
            wanted = self.requests + requests
            assert self._enough.wait_for(lambda: self.failure or self.requests >= wanted, timeout_s)
        assert self.failure is None, repr(self.failure)

    def stop(self) -> bytes:
        """End it; what the disk holds. AssertionError if anything has failed, or the disk holds something else."""
        self._stopping.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure
        self.client.disconnect()
        check_disk(self.uri, self.disk)
        return bytes(self.disk)

    def abandon(self) -> None:
        """The server is dead, or soon will be."""
        self._thread.join(60)
        assert not self._thread.is_alive() and self.failure is not None
        self.client.close()

    def may_hold(self, disk: bytes) -> bool:
        """May the disk hold that after a crash: what was flushed, or what was written later?"""
        for at in range(0, len(disk), SECTOR):
            found = disk[at : at + SECTOR]
            if found != self.flushed[at : at + SECTOR] and not any(
                    found == data[at - offset : at - offset + SECTOR] for offset, data in self.since
                    if offset <= at < offset + len(data)):
                return False
        return True
