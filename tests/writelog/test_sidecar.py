"""The side-car: as bytes, as a file, and what a log makes of one that it finds."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logrig import TIMEOUT_S
from processes import Tapdisk, forget_logs
from support import LoopThread

from tapcore.chain import Chain, open_chain
from tapcore.control import find_disk
from tapcore.driver import Env, OpenFlag
from tapcore.drivers.log import Log
from tapcore.errors import ChainError, LogError
from tapcore.nbd.client import NbdClient
from tapcore.request import DISCARD, WRITE, Request
from writelog.client import LogClient
from writelog.generations import MAX_HISTORY, Generations
from writelog.logstore import forget
from writelog.sidecar import Sidecar
from writelog.sidecar_layout import (
    EXTENT_BYTES,
    MAX_HOT,
    SECTOR,
    SECTOR_BITS,
    SECTORS_OFFSET,
    SLOT_BYTES,
    Flag,
    Record,
    decode_sector,
    encode_sector,
    is_of_another_kind,
    newest,
)

SIZE_BYTES = 64 << 20
BLOCK_BYTES = 4096
BLOCKS = SIZE_BYTES // BLOCK_BYTES
RECORD = Record(BLOCK_BYTES, SIZE_BYTES, 7, 99, Flag.OPEN, 5, 6, Generations(1, 2, (3, 4)), (1, 15))

words = st.integers(0, (1 << 64) - 1)


# Bytes


@given(words, words, st.lists(st.integers(1, (1 << 64) - 1), max_size=MAX_HISTORY),
       st.lists(st.integers(0, (1 << 32) - 1), max_size=50))
def test_a_record_there_and_back(sequence: int, epoch: int, history: list[int], hot: list[int]) -> None:
    record = replace(RECORD, sequence=sequence, epoch=epoch, generations=Generations(1, 0, tuple(history)),
                     hot=tuple(hot))
    data = record.encode()
    assert len(data) % 512 == 0 and len(data) <= SLOT_BYTES
    assert Record.decode(data.ljust(SLOT_BYTES, b"\xee")) == record


def test_the_largest_record_fits() -> None:
    assert len(replace(RECORD, hot=tuple(range(MAX_HOT))).encode()) == SLOT_BYTES


@given(st.data())
def test_a_record_that_is_not_whole(data: st.DataObject) -> None:
    encoded = bytearray(RECORD.encode())
    encoded[data.draw(st.integers(0, 263))] ^= data.draw(st.integers(1, 255))
    assert Record.decode(bytes(encoded).ljust(SLOT_BYTES, b"\0")) in (None, RECORD)


def test_the_newest_whole_record_counts() -> None:
    empty = bytes(SLOT_BYTES)
    old, new = (replace(RECORD, sequence=n).encode().ljust(SLOT_BYTES, b"\0") for n in (7, 8))
    damaged = new[:100] + b"x" + new[101:]
    for slots, sequence in (([old, new], 8), ([new, old], 8), ([old, damaged], 7), ([empty, old], 7)):
        found = newest(slots)
        assert found is not None and found.sequence == sequence
    assert newest([empty, empty]) is None and newest([damaged, empty]) is None


def test_other_files_are_told_apart() -> None:
    empty = bytes(SLOT_BYTES)
    damaged = (bytes(8) + RECORD.encode()[8:]).ljust(SLOT_BYTES, b"\0")
    assert is_of_another_kind([b"QFI\xfb".ljust(SLOT_BYTES, b"\0"), empty])
    assert not is_of_another_kind([empty, empty]) and not is_of_another_kind([damaged, empty])


def test_a_sector_counts_in_its_place_and_epoch_alone() -> None:
    data = encode_sector(3, 99, b"\x05")
    assert decode_sector(3, data, RECORD) == b"\x05".ljust(SECTOR_BITS // 8, b"\0")
    assert decode_sector(4, data, RECORD) is None
    assert decode_sector(3, data, replace(RECORD, epoch=98)) is None
    assert decode_sector(3, data[:200] + b"x" + data[201:], RECORD) is None
    assert decode_sector(3, bytes(512), RECORD) is None
    assert decode_sector(3, bytes(512), replace(RECORD, flags=Flag.EMPTY)) == bytes(SECTOR_BITS // 8)


# Beside an image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
    return path


@pytest.fixture
def chains(env: Env, image: Path) -> Iterator[Chains]:
    chains = Chains(env, image)
    yield chains
    chains.close()


class Chains:
    """`log:…|aio:IMAGE` opened again and again."""

    def __init__(self, env: Env, image: Path) -> None:
        self.env = env
        self.image = image
        self.chain: Chain | None = None

    def open(self, params: str = "", image: Path | None = None, flags: OpenFlag = OpenFlag.NONE) -> Log:
        self.close()
        self.chain = open_chain(self.env, f"log:{params}|aio:{image or self.image}", flags)
        assert isinstance(self.chain.head, Log)
        return self.chain.head

    def close(self) -> None:
        if self.chain is not None:
            self.chain.close()
            self.chain = None

    def reboot(self) -> None:
        forget_logs(self.env.run_dir)

    def change(self, op: int, offset: int, length: int) -> int:
        """Through the open log, until it has ended; its errno."""
        assert self.chain is not None
        ended: list[int] = []
        iov = [memoryview(bytearray(length))] if op == WRITE else []
        request = Request(op, offset, length, iov, done=lambda request: ended.append(request.error))
        verb = self.chain.head.queue_write if op == WRITE else self.chain.head.queue_discard
        if verb(request):
            return request.error
        self.chain.head.submit()
        self.env.loop.run_until(lambda: bool(ended), TIMEOUT_S)
        return ended[0]


def dirty(log: Log) -> list[int]:
    return list(log._map.dirty.bits.search(1))


def test_marks_outlive_the_host(chains: Chains, image: Path) -> None:
    log = chains.open()
    assert log.sidecar_path == image.with_name("disk.img.writelog")
    assert log.sidecar_path.stat().st_mode & 0o777 == 0o600
    assert log.sidecar_path.stat().st_size == SECTORS_OFFSET + -(-BLOCKS // SECTOR_BITS) * SECTOR.size
    assert chains.change(WRITE, 0, 512) == 0
    assert chains.change(WRITE, EXTENT_BYTES - 512, 1024) == 0
    generation = log._store.generation  # type: ignore[union-attr]
    for reboots in (True, False, True):
        chains.close()
        if reboots:
            chains.reboot()
        log = chains.open()
        assert dirty(log) == [0, 1023, 1024]
        assert log._store.generation == generation  # type: ignore[union-attr]


def test_a_discard_of_everything_is_marked_before_it_goes_down(chains: Chains) -> None:
    """It is wide: its bits are in the side-car, and no extent becomes hot."""
    log = chains.open(",hot=16")
    assert chains.change(DISCARD, 0, SIZE_BYTES) == 0
    assert not log._hot and len(dirty(log)) == BLOCKS
    sidecar = log.sidecar_path
    assert sidecar is not None
    record = newest([sidecar.read_bytes()[:SLOT_BYTES], sidecar.read_bytes()[SLOT_BYTES:SECTORS_OFFSET]])
    assert record is not None
    data = sidecar.read_bytes()[SECTORS_OFFSET : SECTORS_OFFSET + SECTOR.size]
    assert decode_sector(0, data, record) == b"\xff" * (SECTOR_BITS // 8)


def test_a_log_with_a_name_has_its_side_car_under_it(chains: Chains, image: Path) -> None:
    assert chains.open("vm1").sidecar_path == image.with_name("vm1.writelog")
    assert chains.open(f"vm2,sidecar={image.parent}/elsewhere").sidecar_path == image.with_name("elsewhere")


def test_read_only_there_is_none(chains: Chains, image: Path) -> None:
    assert chains.open(flags=OpenFlag.RDONLY).sidecar_path is None
    assert not image.with_name("disk.img.writelog").exists()


def test_doing_without(chains: Chains, image: Path) -> None:
    assert chains.open(",sidecar=none").sidecar_path is None
    chains.open()
    chains.close()
    with pytest.raises(ChainError, match=r"would be missing from it; leave out sidecar=none"):
        chains.open(",sidecar=none")


@pytest.mark.parametrize(("params", "message"), [
    ("sidecar=none", "without a name it is log:,sidecar=none"),
    (",hot=15", "from 16 to 8128"), (",hot=9000", "from 16 to 8128"), (",hot=x", "hot 'x' is no number"),
    (",sidecar=", "unknown option"), (",sidecar=/nix/da", "No such file or directory; name a place for it"),
])
def test_options_that_make_no_sense(chains: Chains, params: str, message: str) -> None:
    with pytest.raises(ChainError, match=message):
        chains.open(params)


def test_a_file_that_is_something_else_is_left_alone(chains: Chains, image: Path) -> None:
    other = image.with_name("disk.img.writelog")
    other.write_bytes(b"precious" * 10_000)
    with pytest.raises(ChainError, match="is no side-car of a log"):
        chains.open()
    with pytest.raises(LogError, match="is no side-car of a log"):
        forget(chains.env.run_dir, "disk.img", other)
    assert other.read_bytes() == b"precious" * 10_000


@pytest.mark.parametrize("how", ["damaged", "cut short", "resized", "granularity"])
def test_a_side_car_that_cannot_be_used_makes_every_block_dirty(chains: Chains, image: Path, how: str) -> None:
    chains.open()
    chains.close()
    chains.reboot()
    sidecar = image.with_name("disk.img.writelog")
    if how == "damaged":
        data = bytearray(sidecar.read_bytes())
        data[100] ^= 1
        data[SLOT_BYTES + 100] ^= 1
        sidecar.write_bytes(data)
    elif how == "cut short":
        sidecar.write_bytes(sidecar.read_bytes()[:-512])
    elif how == "resized":
        with image.open("r+b") as file:
            file.truncate(2 * SIZE_BYTES)
    log = chains.open(",granularity=65536" if how == "granularity" else "")
    assert len(dirty(log)) == log._map.blocks
    chains.close()
    chains.reboot()
    assert len(dirty(chains.open(",granularity=65536" if how == "granularity" else ""))) == log_blocks(how)


def log_blocks(how: str) -> int:
    return {"damaged": BLOCKS, "cut short": BLOCKS, "resized": 2 * BLOCKS, "granularity": BLOCKS // 16}[how]


def test_one_log_has_a_side_car_at_a_time(env: Env, chains: Chains, tmp_path: Path) -> None:
    log = chains.open()
    assert log.sidecar_path is not None
    with pytest.raises(LogError, match="in use"):
        Sidecar.open(log.sidecar_path)


def test_a_side_car_that_cannot_be_written_fails_cold_writes_alone(
    chains: Chains, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains.open()
    assert chains.change(WRITE, 0, 512) == 0
    monkeypatch.setattr(Sidecar, "write", lambda *_: errno.ENOSPC)
    assert chains.change(WRITE, 4096, 512) == 0
    assert chains.change(WRITE, EXTENT_BYTES, 512) == errno.ENOSPC
    monkeypatch.undo()
    assert chains.change(WRITE, EXTENT_BYTES, 512) == 0


# Whose marks they are


def test_who_may_clear_what_a_copy_lacks(env: Env, chains: Chains) -> None:
    """The base stays as long as only those clear bits who speak for it."""
    log = chains.open()
    thread = LoopThread(env)
    path = log.socket_path

    def clear(adopt: int = 0) -> int:
        """A client takes and commits what is dirty; the base before that, which it knows, and is none after it if
        it does not speak for it."""
        with LogClient(path, TIMEOUT_S) as client:
            base = 0
            if adopt:
                base = client.adopt(adopt)
                assert base not in (0, adopt) and client.stat().base == base and client.stat().former == adopt
                client.commit(client.get(0, SIZE_BYTES - 4096, 4096).lease)
            client.commit(client.get().lease)
            assert (client.stat().base, client.stat().former) == (base, 0)
            return base

    try:
        with LogClient(path, TIMEOUT_S) as client:
            assert client.stat().base == 0 and client.stat().current != 0
            base = client.fill()
            assert base and client.stat().base == base
            client.commit(client.get().lease)
            assert client.stat().base == base
            client.fill()
            base = client.stat().base
        former, base = base, clear(base)
        assert former in log.generations.history
        with LogClient(path, TIMEOUT_S) as client:
            with pytest.raises(LogError):
                client.adopt(former)
            client.commit(client.get().lease)  # of nothing
            assert client.stat().base == base
            client.fill()
        clear()
        with LogClient(path, TIMEOUT_S) as client:
            for wrong in (0, former, base, 12):
                with pytest.raises(LogError) as caught:
                    client.adopt(wrong)
                assert caught.value.errno == errno.ESTALE
            client.fill()
        with LogClient(path, TIMEOUT_S) as client:
            client.clear()
            assert client.stat().base == 0
    finally:
        thread.loop.call_threadsafe(thread.loop.stop)
        thread.stop()


@pytest.mark.parametrize("host_dies", [False, True])
def test_killed_with_a_copy_under_way(tmp_path: Path, image: Path, host_dies: bool) -> None:
    """What was committed stays so or is sent again; the rest is dirty, and the base is known."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    tapdisk = Tapdisk(run_dir, f"log:|aio:{image}")
    with LogClient(run_dir / "log__disk.img.ctl", TIMEOUT_S) as client:
        base = client.fill()
        client.commit(client.get(0, 0, SIZE_BYTES // 2).lease)
        with NbdClient(tapdisk.uri) as guest:
            guest.write(8192, b"again")
        client.get(0, SIZE_BYTES // 2, EXTENT_BYTES)
        tapdisk.kill()
    if host_dies:
        forget_logs(run_dir)
    again = Tapdisk(run_dir, f"log:|aio:{image}")
    with LogClient(run_dir / "log__disk.img.ctl", TIMEOUT_S) as client:
        client.adopt(base)
        found = list(client.peek())
        if host_dies:
            assert found[-1][0] + found[-1][1] == SIZE_BYTES and found[0] == (0, SIZE_BYTES)
        else:
            assert found == [(8192, 4096), (SIZE_BYTES // 2, SIZE_BYTES // 2)]
    with find_disk(run_dir, "disk.img") as control:
        control.call("close", disk="disk.img", forget=True)
    assert not image.with_name("disk.img.writelog").exists()
    again.stop()
    forget_logs(run_dir)
