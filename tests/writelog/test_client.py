"""The client library, against a real server and against bad ones."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logrig import TIMEOUT_S, Hollow, Rig, rig_of

from tapcore.driver import Env
from tapcore.errors import LogError
from writelog.client import PIECE_BYTES, LogClient, _Space
from writelog.control import encode_shmp_reply
from writelog.dirtymap import CHUNK_BYTES
from writelog.ring import SLOTS
from writelog.shm import DATA_BYTES, Region, unlink_shared

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def rig(env: Env) -> Iterator[Rig]:
    with rig_of(env, 16 * MIB) as rig:
        yield rig


@pytest.fixture
def client(rig: Rig) -> Iterator[LogClient]:
    with rig.client() as client:
        yield client


def fill_disk(rig: Rig) -> None:
    rig.leaf.data[:] = random.Random(1).randbytes(len(rig.leaf.data))


def test_stat(rig: Rig, client: LogClient) -> None:
    rig.write(BLOCK, b"x" * 2 * BLOCK)
    assert (client.size_bytes, client.granularity_bytes) == (16 * MIB, BLOCK)
    figures = client.stat()
    assert (figures.dirty_blocks, figures.leased_blocks, figures.clients) == (2, 0, 1)


def test_the_round_of_a_copy(rig: Rig, client: LogClient) -> None:
    rig.write(BLOCK, b"a" * 2 * BLOCK)
    rig.write(9 * BLOCK, b"b" * BLOCK)
    assert list(client.peek()) == [(BLOCK, 2 * BLOCK), (9 * BLOCK, BLOCK)]
    taken = client.get()
    assert (taken.extents, taken.next_offset) == ([(BLOCK, 2 * BLOCK), (9 * BLOCK, BLOCK)], None)
    read = [(offset, bytes(data)) for offset, data in client.read_extents(taken.extents)]
    assert read == [(BLOCK, b"a" * 2 * BLOCK), (9 * BLOCK, b"b" * BLOCK)]
    client.commit(taken.lease, BLOCK, 2 * BLOCK)
    assert (rig.dirty(), rig.leased()) == ([], [9])
    client.reclaim(taken.lease, 9 * BLOCK, 1)
    assert (rig.dirty(), rig.leased()) == ([9], [])
    client.commit(taken.lease)
    with pytest.raises(LogError, match="refused clrw") as refused:
        client.commit(taken.lease)
    assert refused.value.errno == errno.ENOENT


def test_ranges_of_the_disk(rig: Rig, client: LogClient) -> None:
    client.fill()
    ranges = [(number * 2 * BLOCK, BLOCK) for number in range(2, 2048, 3)]
    taken = client.get_listed(ranges)
    assert (taken.extents, taken.next_offset) == (ranges, None)
    assert rig.leased() == [offset // BLOCK for offset, _ in ranges]
    assert client.get_listed([(0, 16 * MIB)]).extents[0] == (0, 4 * BLOCK)
    client.commit(taken.lease)
    for wrong in ([(BLOCK, BLOCK), (0, BLOCK)], [(0, BLOCK), (512, BLOCK)], [(16 * MIB, BLOCK)], [(0, 0)]):
        with pytest.raises(LogError, match="refused getw"):
            client.get_listed(wrong)


def test_what_is_written_while_watched(rig: Rig, client: LogClient) -> None:
    rig.write(0, b"early")
    assert client.touched().count() == 0
    rig.write(CHUNK_BYTES - 1, b"two")
    rig.write(16 * MIB - 512, b"last" * 128)
    with rig.client() as other, pytest.raises(LogError, match="holds the log"):
        other.touched()
    bits = client.touched()
    assert len(bits) == 16 * MIB // CHUNK_BYTES
    assert list(bits.search(1)) == [0, 1, len(bits) - 1]
    assert client.touched().count() == 0
    client.close()
    rig.loop_thread.until(lambda: rig.log.figures().clients == 0)
    with rig.client() as other:
        assert other.touched().count() == 0


def test_parts_of_the_disk(rig: Rig, client: LogClient) -> None:
    client.fill()
    assert list(client.peek(BLOCK + 1, BLOCK)) == [(BLOCK, 2 * BLOCK)]
    taken = client.get(0, 2 * BLOCK, BLOCK)
    assert taken.extents == [(2 * BLOCK, BLOCK)]
    assert client.get(taken.lease, 16 * MIB - 1, 1).extents == [(16 * MIB - BLOCK, BLOCK)]
    assert rig.leased() == [2, 4095]
    client.commit(taken.lease, 2 * BLOCK + 1, BLOCK)
    client.commit(taken.lease, 2 * BLOCK, BLOCK - 1)
    assert rig.leased() == [2, 4095]
    client.commit(taken.lease, BLOCK + 1, 2 * BLOCK)
    assert rig.leased() == [4095]
    with pytest.raises(LogError, match="empty range"):
        list(client.peek(BLOCK, -BLOCK))


def test_fill_and_clear(rig: Rig, client: LogClient) -> None:
    client.fill()
    assert list(client.peek()) == [(0, 16 * MIB)]
    assert client.peek_bitmap().all()
    client.clear()
    assert list(client.peek()) == []
    assert not client.peek_bitmap().any()


def test_a_log_larger_than_the_export_area(env: Env) -> None:
    blocks = 9_000_000
    with rig_of(env, blocks * 512, "disk,granularity=512", Hollow(env, blocks * 512)) as rig:
        bits = rig.log._map.dirty.bits
        rig.call(lambda: bits.__setitem__(slice(0, blocks, 17), 1))
        expected = [(block * 512, 512) for block in range(0, blocks, 17)]
        with rig.client() as client:
            assert list(client.peek()) == expected
            assert list(client.peek_bitmap().search(1)) == list(range(0, blocks, 17))
            taken = client.get()
            extents = taken.extents
            while taken.next_offset is not None:
                taken = client.get(taken.lease, taken.next_offset)
                extents += taken.extents
            assert extents == expected
            client.commit(taken.lease)
        assert rig.dirty() == rig.leased() == []


def test_a_log_of_more_than_32_bits_of_sectors(env: Env) -> None:
    size_bytes = 5 << 40
    hollow = Hollow(env, size_bytes)
    with rig_of(env, size_bytes, "disk,granularity=1048576", hollow) as rig, rig.client() as client:
        client.fill()
        assert sum(length for _, length in client.peek(0, size_bytes - MIB)) == size_bytes - MIB
        lease, at = 0, 0
        taken = client.get(0, 0, size_bytes - 2 * MIB)
        while taken.next_offset is not None:
            lease, at = taken.lease, taken.next_offset
            taken = client.get(lease, at, size_bytes - 2 * MIB - at)
        assert rig.dirty() == [size_bytes // MIB - 2, size_bytes // MIB - 1]
        client.commit(lease, MIB // 2, size_bytes)
        assert rig.leased() == [0]


def test_reads_are_in_order_whatever_their_sizes(rig: Rig, client: LogClient) -> None:
    fill_disk(rig)
    randomly = random.Random(2)
    extents = [(randomly.randrange(30_000) * 512, randomly.randrange(1, 2000) * 512) for _ in range(300)]
    extents += [(n * 512, 512) for n in range(500)]
    at = 0
    wanted = [(offset, offset + length) for offset, length in extents]
    expected = b"".join(rig.leaf.data[start:stop] for start, stop in wanted)
    for offset, data in client.read_extents(extents):
        assert len(data) <= PIECE_BYTES
        assert rig.leaf.data[offset : offset + len(data)] == data == expected[at : at + len(data)]
        at += len(data)
    assert at == len(expected)


def test_reads_are_pipelined(rig: Rig, client: LogClient) -> None:
    rig.leaf.early = False
    reads = client.read_extents([(n * BLOCK, BLOCK) for n in range(200)])
    offsets: list[int] = []
    reader = threading.Thread(target=lambda: offsets.extend(offset for offset, _ in reads))
    reader.start()
    rig.loop_thread.until(lambda: len(rig.leaf.pending) == SLOTS, TIMEOUT_S)
    rig.leaf.early = True
    rig.call(rig.leaf.pending.reverse)
    rig.call(rig.leaf.finish)
    reader.join(TIMEOUT_S)
    assert offsets == [n * BLOCK for n in range(200)]


def test_calls_between_reads(rig: Rig, client: LogClient) -> None:
    client.fill()
    taken = client.get()
    for offset, data in client.read_extents([(0, 2 * MIB)]):
        client.commit(taken.lease, offset, len(data))
    assert len(rig.leased()) == (16 - 2) * MIB // BLOCK


def test_reads_given_up_half_way_do_not_disturb_later_ones(rig: Rig, client: LogClient) -> None:
    fill_disk(rig)
    reads = client.read_extents([(0, 16 * MIB)])
    next(reads)
    reads.close()  # type: ignore[attr-defined]
    assert client.open_reads == 0
    [(_, data)] = client.read_extents([(MIB, 512)])
    assert data == rig.leaf.data[MIB : MIB + 512]


def test_a_read_that_fails_names_the_place_and_the_client_lives(rig: Rig, client: LogClient) -> None:
    rig.leaf.errors = [0, errno.EIO]
    with pytest.raises(LogError, match=f"cannot read 512 bytes of the disk .at byte {MIB}"):
        list(client.read_extents([(0, 512), (MIB, 512), (2 * MIB, 512)]))
    assert len(list(client.read_extents([(MIB, 512)]))) == 1


def test_reading_without_waiting(rig: Rig, client: LogClient) -> None:
    fill_disk(rig)
    rig.leaf.early = False
    client.submit_read(MIB, 1024, 512)
    client.submit_read(2 * MIB, 512, 4096)
    client.push()
    rig.loop_thread.until(lambda: len(rig.leaf.pending) == 2, TIMEOUT_S)
    assert client.responses() == []
    assert client.wait(0) is False
    rig.call(lambda: rig.leaf.finish(1))
    assert client.wait(TIMEOUT_S)
    [response] = client.responses()
    assert response == (MIB, 1024, 512, True)
    assert client.data[512 : 512 + 1024] == rig.leaf.data[MIB : MIB + 1024]
    assert (client.open_reads, client.free_slots) == (1, SLOTS - 1)
    rig.leaf.errors = [errno.EIO]
    rig.call(rig.leaf.finish)
    assert client.wait(TIMEOUT_S)
    assert client.responses() == [(2 * MIB, 512, 4096, False)]


def test_a_call_that_reads_a_kick_hides_no_response(rig: Rig, client: LogClient) -> None:
    client.submit_read(0, 512, 0)
    client.push()
    client.stat()
    client.stat()
    assert client.wait(0)
    assert len(client.responses()) == 1


# Servers that are gone, slow, or wrong

def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot connect: No such file"):
        LogClient(tmp_path / "log__x.ctl")


def test_a_server_that_goes_away(env: Env) -> None:
    rig = Rig(env)
    with rig.client() as client:
        rig.close()
        with pytest.raises(LogError, match=r"closed the connection.*dirty again"):
            client.stat()
        with pytest.raises(LogError, match="closed the connection"):
            list(client.read_extents([(0, 512)]))


def test_a_disk_that_hangs(rig: Rig) -> None:
    with LogClient(rig.path, timeout_s=0.1) as client:
        rig.leaf.early = False
        with pytest.raises(LogError, match=r"did not answer in 0\.1 s"):
            list(client.read_extents([(0, 512)]))
    rig.call(rig.leaf.finish)


def test_a_closed_client(rig: Rig) -> None:
    client = rig.client()
    client.close()
    client.close()
    with pytest.raises(LogError):
        client.stat()


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """A server that answers the first message with the given bytes, and then nothing."""
    path = tmp_path / "impostor"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    accepted: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(reply: bytes) -> Path:
        def run() -> None:
            sock, _ = listener.accept()
            accepted.append(sock)
            sock.recv(20)
            sock.sendall(reply)

        threads.append(threading.Thread(target=run))
        threads[0].start()
        return path

    yield serve
    for thread in threads:
        thread.join(TIMEOUT_S)
    for sock in (*accepted, listener):
        sock.close()


@pytest.mark.parametrize(("reply", "message"), [
    (b"x" * 256, "no region"),
    (encode_shmp_reply(""), "no region"),
    (encode_shmp_reply("/log_that_is_not_there"), "cannot open the region"),
    (b"", "did not answer"),
    (b"done", "did not answer"),
])
def test_a_server_that_talks_nonsense(impostor: Callable[[bytes], Path], reply: bytes, message: str) -> None:
    with pytest.raises(LogError, match=message):
        LogClient(impostor(reply), timeout_s=0.2)


def test_a_server_that_answers_unasked(impostor: Callable[[bytes], Path], tmp_path: Path) -> None:
    name = f"/log_test_{tmp_path.name}.wlog"
    region = Region.create(name)
    try:
        with pytest.raises(LogError, match="unexpected"):
            LogClient(impostor(encode_shmp_reply(name) + b"donedone"), timeout_s=5)
    finally:
        unlink_shared(name)
        region.close()


# The data area

@given(st.lists(st.integers(1, PIECE_BYTES // 512) | st.none(), max_size=200))
def test_the_data_area_is_never_given_out_twice(steps: list[int | None]) -> None:
    space = _Space()
    used: list[tuple[int, int]] = []
    for sectors in steps:
        if sectors is None:
            if used:
                space.free()
                used.pop(0)
            continue
        length = sectors * 512
        start = space.allocate(length)
        if start is None:
            assert used, "an empty area always has room"
            continue
        assert start >= 0 and start + length <= DATA_BYTES
        assert all(start + length <= first or last <= start for first, last in used)
        used.append((start, start + length))
