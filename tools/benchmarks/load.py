"""A guest that writes at a given rate, over NBD, and keeps the time of every request. Run as a process of its own.

    python -m tools.benchmarks.load SOCKET LOAD --trace FILE

The places are made before it begins, so that it costs little meanwhile. Like a guest it has a limited queue: what
is due while the queue is full is not written later, but lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import signal
import time
from array import array
from pathlib import Path
from typing import Final

from tapcore.nbd import wire
from tapcore.nbd.address import NbdAddress
from tapcore.nbd.client import NbdClient
from writelog.simulate import BLOCK_BYTES, Scattered
from writelog.sync_simulate import LOADS

DEPTH: Final = 256
CATCH_UP_S: Final = 0.05
"""What was due longer ago is lost."""
TICK_S: Final = 0.001
DRAIN_S: Final = 2.0
NOISE_BYTES: Final = 64 << 20
"""As much as this before anything is written a second time: else it could be compressed."""
MAX_WRITE_BYTES: Final = 64 << 10
LIGHT: Final = "light"
"""2,000 requests a second all over the disk, half of them reads."""
LIGHT_RATE: Final = 2000 * BLOCK_BYTES


class Trace:
    """When requests ended (time.monotonic()), and how long each took, in the order in which they ended."""

    def __init__(self) -> None:
        self.ends_s = array("d")
        self.latencies_s = array("d")
        self.changed_blocks = 0

    def iops(self, start_s: float, stop_s: float) -> float:
        return len(self._latencies(start_s, stop_s)) / (stop_s - start_s)

    def percentile_s(self, percent: float, start_s: float, stop_s: float) -> float:
        latencies = sorted(self._latencies(start_s, stop_s))
        return latencies[min(int(len(latencies) * percent / 100), len(latencies) - 1)] if latencies else 0.0

    def _latencies(self, start_s: float, stop_s: float) -> list[float]:
        pairs = zip(self.ends_s, self.latencies_s, strict=True)
        return [latency_s for end_s, latency_s in pairs if start_s <= end_s < stop_s]

    def store(self, path: Path) -> None:
        with path.open("wb") as file:
            for part in (self.ends_s, self.latencies_s):
                part.tofile(file)

    @classmethod
    def load(cls, path: Path, changed_blocks: int) -> Trace:
        trace = cls()
        data = path.read_bytes()
        trace.ends_s.frombytes(data[: len(data) // 2])
        trace.latencies_s.frombytes(data[len(data) // 2 :])
        trace.changed_blocks = changed_blocks
        return trace


class Guest:
    """`places` are (offset, length) in bytes, one after the other, `rate` of them a second, over and over."""

    def __init__(self, client: NbdClient, places: list[tuple[int, int]], rate: float, reads: float) -> None:
        self.trace = Trace()
        self.stopping = False
        self._places = places
        self._rate = rate
        self._socket = client.sock
        self._socket.setblocking(False)
        self._noise = memoryview(os.urandom(NOISE_BYTES))
        self._random = random.Random(1)
        self._reads = reads
        self._next = self._noise_at = 0
        self._out = bytearray()
        self._in = bytearray()
        self._free = list(range(DEPTH))
        self._sent_s = [0.0] * DEPTH
        self._read_bytes = [0] * DEPTH

    def run(self) -> None:
        """Until `stopping`; then for DRAIN_S at most until all is answered."""
        last_s = time.monotonic()
        due = 0.0
        while not self.stopping:
            now_s = time.monotonic()
            due = min(due + (now_s - last_s) * self._rate, max(self._rate * CATCH_UP_S, 1.0))
            last_s = now_s
            count = min(int(due), len(self._free))
            if count:
                self._submit(count, now_s)
                due -= count
            self._exchange(TICK_S)
        deadline_s = time.monotonic() + DRAIN_S
        while len(self._free) < DEPTH and time.monotonic() < deadline_s:
            self._exchange(0.01)

    def changed_blocks(self) -> int:
        return len(set(self._places[: self._next]))

    def _submit(self, count: int, now_s: float) -> None:
        pack = wire.REQUEST.struct.pack
        out, places, noise, number, at = self._out, self._places, self._noise, self._next, self._noise_at
        for _ in range(count):
            offset, length = places[number % len(places)]
            number += 1
            slot = self._free.pop()
            self._sent_s[slot] = now_s
            is_read = self._reads and self._random.random() < self._reads
            self._read_bytes[slot] = length if is_read else 0
            command = wire.NBD_CMD_READ if is_read else wire.NBD_CMD_WRITE
            out += pack(wire.NBD_REQUEST_MAGIC, 0, command, slot, offset, length)
            if not is_read:
                out += noise[at : at + length]
                at = (at + length) % (NOISE_BYTES - MAX_WRITE_BYTES)
        self._next, self._noise_at = number, at

    def _exchange(self, wait_s: float) -> None:
        readable, writable, _ = select.select([self._socket], [self._socket] if self._out else [], [], wait_s)
        if writable:
            with contextlib.suppress(BlockingIOError):
                del self._out[: self._socket.send(self._out)]
        if readable:
            data = self._socket.recv(1 << 20)
            if not data:
                raise SystemExit("the server hung up")
            self._in += data
            self._take_replies(time.monotonic())

    def _take_replies(self, now_s: float) -> None:
        unpack = wire.SIMPLE_REPLY.struct.unpack_from
        data, at = self._in, 0
        while len(data) - at >= wire.SIMPLE_REPLY.size:
            _, error, slot = unpack(data, at)
            if error:
                raise SystemExit(f"a request failed with {error}")
            end = at + wire.SIMPLE_REPLY.size + self._read_bytes[slot]
            if end > len(data):
                break
            at = end
            self._free.append(slot)
            self.trace.ends_s.append(now_s)
            self.trace.latencies_s.append(now_s - self._sent_s[slot])
        del data[:at]


def make_places(name: str, blocks: int, link: float, seconds: float) -> list[tuple[int, int]]:
    """(offset, length) of what a load writes in `seconds`."""
    load = Scattered(blocks, LIGHT_RATE, 1) if name == LIGHT else LOADS[name](blocks, 1.0, link, 1)
    places: list[tuple[int, int]] = []
    for second in range(int(seconds)):
        places += [(block * BLOCK_BYTES, count * BLOCK_BYTES) for block, count in load.writes(second, second + 1)]
    return places


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.load", description=__doc__)
    parser.add_argument("socket", type=Path)
    parser.add_argument("load", choices=[LIGHT, *LOADS])
    parser.add_argument("--export", default="bench")
    parser.add_argument("--link", type=float, default=0.0, help="bytes a second, for loads that go by it")
    parser.add_argument("--seconds", type=int, default=60, help="then the same places again")
    parser.add_argument("--trace", type=Path, required=True, help="where to write the times")
    options = parser.parse_args()
    client = NbdClient(NbdAddress(path=str(options.socket), export=options.export), structured_replies=False)
    places = make_places(options.load, client.size_bytes // BLOCK_BYTES, options.link, options.seconds)
    guest = Guest(client, places, len(places) / options.seconds, 0.5 if options.load == LIGHT else 0.0)
    signal.signal(signal.SIGTERM, lambda *_: setattr(guest, "stopping", True))
    print("ready", flush=True)
    guest.run()
    print("stopped", flush=True)
    guest.trace.store(options.trace)
    print(json.dumps({"changed_blocks": guest.changed_blocks()}), flush=True)


if __name__ == "__main__":
    main()
