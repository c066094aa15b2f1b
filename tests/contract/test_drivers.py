"""The driver contract: every driver, and every filter above one, through the same cases."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_servers import Server, nbdkit, qemu_nbd

from tapcore.driver import Env, Feature, OpenFlag
from tapcore.formats.qcow.create import create as create_qcow
from tapcore.formats.qcow2.create import create as create_qcow2
from tapcore.formats.vhd.create import create as create_vhd
from tapcore.formats.vmdk.create import create as create_vmdk
from tapcore.request import (
    BACKGROUND,
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    IS_ZERO,
    NO_HOLE,
    READ,
    STATUS,
    WRITE,
    ZEROES,
    Request,
    show_zeroes,
)
from writelog.logstore import forget

SIZE = (1 << 20) + 4096

CHAINS = {
    "aio": "aio:{disk}",
    "aio-tmpfs": "aio:{memory}",
    "aio-direct": "aio:direct,{disk}",
    "aio-direct-tmpfs": "aio:direct,{memory}",
    "sync": "sync:{disk}",
    "ram": f"ram:{SIZE}",
    "nbd-nbdkit": "nbd:connections=2,unix:{server}",
    "nbd-blocks": "nbd:unix:{server}",
    "nbd-qemu": "nbd:unix:{server}",
    "error": "error:count=0|aio:{disk}",
    "delay": "delay:jitter=0.2|aio:{disk}",
    "log": "log:contract|aio:{disk}",
    "bc": "bc:size=256K,block=16K|aio:{disk}",
    "bc-file": "bc:size=256K,block=4K,file={cache}|aio:{disk}",
    "verify": "verify:|aio:{disk}",
    "qcow2": "qcow2:{disk}",
    "qcow2-subclusters": "qcow2:{disk}",
    "qcow2-data-file": "qcow2:{disk}",
    "vmdk": "vmdk:{disk}",
    "vmdk-split": "vmdk:{disk}",
    "vmdk-flat": "vmdk:{disk}",
    "qcow": "qcow:{disk}",
    "vhd": "vhd:{disk}",
    "vhd-fixed": "vhd:{disk}",
    "vhdsync": "vhdsync:{disk}",
    "stack": "verify:block=4096|delay:write=0.1|verify:|error:op=status,count=0|ram:" + str(SIZE),
}
FORMATS: dict[str, Callable[[Path], None]] = {
    "qcow2": lambda path: create_qcow2(str(path), SIZE),
    "qcow2-subclusters": lambda path: create_qcow2(str(path), SIZE, extended_l2=True),
    "qcow2-data-file": lambda path: create_qcow2(str(path), SIZE, data_file="a.data", data_file_raw=True),
    "vmdk": lambda path: create_vmdk(str(path), SIZE),
    "vmdk-split": lambda path: create_vmdk(str(path), SIZE, subformat="twoGbMaxExtentSparse", split_bytes=1 << 19),
    "vmdk-flat": lambda path: create_vmdk(str(path), SIZE, subformat="twoGbMaxExtentFlat", split_bytes=1 << 19),
    "qcow": lambda path: create_qcow(str(path), SIZE),
    "vhd": lambda path: create_vhd(str(path), SIZE, block_bytes=65536),
    "vhd-fixed": lambda path: create_vhd(str(path), SIZE, variant="fixed"),
    "vhdsync": lambda path: create_vhd(str(path), SIZE),
}
"""How the image of a leaf that is not raw is made."""
LEAVES = ("aio", "aio-tmpfs", "aio-direct", "aio-direct-tmpfs", "sync", "ram", "nbd-nbdkit", "nbd-blocks",
          "nbd-qemu", *FORMATS)
PERSISTENT = [name for name in CHAINS if "ram" not in CHAINS[name]]

Op = tuple[int, int, int, int, int]
"""op, offset, length, flags, seed (of the data and of where it is cut)."""


@dataclass
class Place:
    """Where a chain's raw image is, and its server, if it has one; `open` opens the chain, and what is left open
    is closed after the test."""

    env: Env
    text: str
    image: Path | None = None
    server: Server | None = None
    opened: list[Runner] = field(default_factory=list)

    def open(self, flags: OpenFlag = OpenFlag.NONE) -> Runner:
        self.opened.append(Runner(self.env, self.text, flags))
        return self.opened[-1]

    def close(self, runner: Runner) -> None:
        self.opened.remove(runner)
        runner.close()


def serve(name: str, image: Path) -> Server:
    """The server of the image that an `nbd:` chain has at its other end."""
    if name == "nbd-qemu":
        return qemu_nbd(image)
    if name == "nbd-nbdkit":
        return nbdkit("file", str(image))
    return nbdkit("--filter=blocksize-policy", "file", str(image), "blocksize-minimum=4096",
                  "blocksize-maximum=64K", "blocksize-error-policy=error")


def make_place(env: Env, name: str, disk: Path, memory: Path) -> Place:
    image = (memory if "{memory}" in CHAINS[name] else disk) / "disk, one: a.img"
    if "{" not in CHAINS[name]:
        return Place(env, CHAINS[name])
    if name in FORMATS:
        FORMATS[name](image)
        return Place(env, CHAINS[name].format(disk=image))
    with image.open("wb") as file:
        file.truncate(SIZE)
    if "{server}" in CHAINS[name]:
        server = serve(name, image)
        return Place(env, CHAINS[name].format(server=server.path), image, server)
    return Place(env, CHAINS[name].format(disk=image, memory=image, cache=disk / "cache"), image)


@pytest.fixture
def memory() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def place(request: pytest.FixtureRequest, env: Env, tmp_path: Path, memory: Path) -> Iterator[Place]:
    place = make_place(env, request.param, tmp_path, memory)
    yield place
    for runner in list(place.opened):
        place.close(runner)
    if place.server is not None:
        place.server.stop()
    forget(env.run_dir, "contract")


every_chain = pytest.mark.parametrize("place", CHAINS, indirect=True)


def random_bytes(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@st.composite
def operations(draw: st.DrawFn) -> Op:
    op = draw(st.sampled_from((READ, WRITE, WRITE, FLUSH, DISCARD, ZEROES, STATUS)))
    unit = draw(st.sampled_from((1, 512, 4096)))
    offset = draw(st.integers(0, (SIZE - 1) // unit)) * unit
    length = min(draw(st.integers(1, 40)) * unit, SIZE - offset)
    allowed = {READ: [0, BACKGROUND], STATUS: [0, BACKGROUND], FLUSH: [0], WRITE: [0, FUA, BACKGROUND],
               DISCARD: [0, FUA], ZEROES: [0, FUA, NO_HOLE, FAST, NO_HOLE | FAST, NO_HOLE | FUA]}[op]
    return op, offset, length, draw(st.sampled_from(allowed)), draw(st.integers(0, 255))


class Oracle:
    """What the disk must hold, and the check of one batch of requests that do not overlap."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        assert runner.zeroes(0, SIZE) == 0
        self.data = bytearray(SIZE)

    def make(self, op: Op) -> Request:
        kind, offset, length, flags, seed = op
        data = bytearray(random_bytes(seed, length) if kind == WRITE else length)
        third = max(1, seed * length // 256)
        views = [memoryview(data)[:third], memoryview(data)[third:]] if kind in (READ, WRITE) else []
        request = Request(kind, offset, length if kind != FLUSH else 0, views, flags)
        request.takes_zero = bool(seed & 1)
        return request

    def run(self, batch: list[Op]) -> None:
        requests = [self.make(op) for op in batch]
        for request, code in zip(requests, self.runner.run(*requests), strict=True):
            start, end = request.offset, request.offset + request.length
            if request.op == ZEROES and request.flags & FAST and code == errno.ENOTSUP:
                continue
            assert code == 0
            if request.op == READ:
                assert request.takes_zero or not request.flags & IS_ZERO
                show_zeroes(request)
                assert b"".join(request.iov) == self.data[start:end]
            elif request.op == WRITE:
                self.data[start:end] = b"".join(request.iov)
            elif request.op == ZEROES:
                self.data[start:end] = bytes(end - start)
            elif request.op == DISCARD:
                now = self.runner.read(start, end - start)
                assert all(new in (0, old) for new, old in zip(now, self.data[start:end], strict=True))
                self.data[start:end] = now
            elif request.op == STATUS:
                assert 0 < sum(length for length, _ in request.extents) <= request.length

    def check(self) -> None:
        self.runner.status(0, SIZE)
        assert self.runner.read(0, SIZE) == self.data


def without_overlap(ops: list[Op]) -> Iterator[list[Op]]:
    """`ops` in batches, none of which has two requests in flight of which one changes what the other touches."""
    batch: list[Op] = []
    for op in ops:
        kind, offset, length = op[:3]
        if any(offset < other[1] + other[2] and other[1] < offset + length
               and not {kind, other[0]} <= {READ, STATUS, FLUSH} for other in batch):
            yield batch
            batch = []
        batch.append(op)
    yield batch


@every_chain
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=st.lists(operations(), min_size=5, max_size=30))
def test_any_sequence_does_to_the_disk_what_it_does_to_bytes(place: Place, ops: list[Op]) -> None:
    runner = place.open()
    try:
        oracle = Oracle(runner)
        for batch in without_overlap(ops):
            oracle.run(batch)
        oracle.check()
    finally:
        place.close(runner)


@every_chain
def test_info_says_what_there_is(place: Place) -> None:
    info = place.open().chain.info
    assert info.size_bytes == SIZE and not info.read_only
    assert Feature.FLUSH | Feature.DISCARD | Feature.ZEROES in info.features
    assert Feature.FAST_ZEROES in info.features or place.server is not None
    assert info.min_block_bytes & (info.min_block_bytes - 1) == 0 and SIZE % info.min_block_bytes == 0


@every_chain
def test_the_first_byte_the_last_and_all_of_them(place: Place) -> None:
    runner = place.open()
    data = random_bytes(1, SIZE)
    assert runner.write(0, data) == 0
    assert runner.read(0, SIZE) == data
    assert runner.write(SIZE - 1, b"z") == 0 and runner.write(0, b"a") == 0
    assert runner.read(SIZE - 513, 513) == data[SIZE - 513 : -1] + b"z"
    assert runner.read(0, 1) == b"a"
    assert runner.zeroes(SIZE - 700, 700) == 0
    assert runner.read(SIZE - 701, 701) == data[SIZE - 701 : SIZE - 700] + bytes(700)
    if place.image is not None:
        assert place.image.stat().st_size == SIZE


@every_chain
def test_buffers_in_more_pieces_than_one_call_takes(place: Place) -> None:
    runner = place.open()
    data = random_bytes(2, 3000)
    assert runner.write(100, data, cuts=range(3000)) == 0
    assert runner.read(100, 3000, cuts=range(0, 3000, 2)) == data


@every_chain
def test_a_write_without_holes_and_one_that_must_be_fast(place: Place) -> None:
    runner = place.open()
    data = random_bytes(3, 65536)
    assert runner.write(0, data) == 0
    assert runner.zeroes(4096, 8192, NO_HOLE) == 0
    assert runner.read(0, 65536) == data[:4096] + bytes(8192) + data[12288:]
    code = runner.zeroes(32768, 4096, FAST)
    assert code in (0, errno.ENOTSUP)
    assert runner.read(32768, 4096) == (data[32768:36864] if code else bytes(4096))


@every_chain
def test_a_large_batch_of_requests_in_flight_together(place: Place) -> None:
    runner = place.open()
    data = random_bytes(4, 256 * 4096)
    flags = (0, FUA, BACKGROUND)
    writes = [Request(WRITE, i * 4096, 4096, [memoryview(data)[i * 4096 :][:4096]], flags[i % 3 if i < 30 else 0])
              for i in range(256)]
    assert set(runner.run(*writes, *[Request(FLUSH) for _ in range(5)])) == {0}
    targets = [bytearray(4096) for _ in range(256)]
    reads = [Request(READ, i * 4096, 4096, [memoryview(targets[i])], BACKGROUND if i % 5 == 0 else 0)
             for i in range(256)]
    assert set(runner.run(*reads)) == {0}
    assert b"".join(targets) == data
    assert runner.early + runner.late == 256 + 5 + 256


@every_chain
def test_partial_blocks_next_to_each_other_do_not_undo_each_other(place: Place) -> None:
    """Many small changes of the same blocks in flight at once."""
    runner = place.open()
    assert runner.write(0, b"\xff" * 16384) == 0
    expected = bytearray(b"\xff" * 16384)
    batch = []
    for i in range(160):
        start = i * 100
        if i % 4 == 3:
            batch.append(Request(ZEROES, start, 100))
            expected[start : start + 100] = bytes(100)
        elif i % 4 != 2:
            piece = random_bytes(i, 100)
            batch.append(Request(WRITE, start, 100, [memoryview(piece)]))
            expected[start : start + 100] = piece
    assert set(runner.run(*batch)) == {0}
    assert runner.read(0, 16384) == expected


@pytest.mark.parametrize("place", PERSISTENT, indirect=True)
def test_what_was_flushed_is_there_when_opened_again(place: Place) -> None:
    runner = place.open()
    data = random_bytes(5, 10000)
    assert runner.write(5000, data) == 0 and runner.flush() == 0
    place.close(runner)
    again = place.open(OpenFlag.RDONLY)
    assert again.read(5000, 10000) == data
    assert again.chain.info.read_only
    assert again.flush() == 0
    if place.image is not None:
        assert place.image.read_bytes()[5000:15000] == data


@pytest.mark.parametrize("place", LEAVES, indirect=True)
def test_a_leaf_opened_read_only_changes_nothing(place: Place) -> None:
    runner = place.open(OpenFlag.RDONLY)
    assert runner.write(0, b"x" * 512) == errno.EROFS
    assert runner.write(0, b"x" * 512, flags=FUA) == errno.EROFS
    assert runner.zeroes(0, 512) == errno.EROFS
    assert runner.discard(0, 512) == errno.EROFS
    assert runner.read(0, 4096) == bytes(4096)
    runner.status(0, SIZE)


@pytest.mark.parametrize("place", [name for name in PERSISTENT if name != "error"], indirect=True)
def test_holes_are_told_from_data(place: Place) -> None:
    runner = place.open()
    assert runner.write(65536, b"d" * 65536) == 0 and runner.flush() == 0
    assert runner.status(0, SIZE) == [(65536, 3), (65536, 0), (SIZE - 131072, 3)]
    assert runner.status(70000, 1000, BACKGROUND) == [(1000, 0)]
    assert runner.status(1000, 1000) == [(1000, 3)]
    assert runner.discard(65536, 65536) == 0
    assert runner.status(0, SIZE) == [(SIZE, 3)]
