"""The log served to clients that speak the protocol well, badly, and not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from logrig import TIMEOUT_S, Hollow, RawClient, Rig, rig_of

from tapcore.driver import Env, OpenFlag
from tapcore.drivers.log import Log
from tapcore.errors import LogError
from tapcore.request import BACKGROUND, READ
from writelog.control import KICK_MESSAGE, ClearOp, Figures, Message, PeekOp
from writelog.dirtymap import WINDOW_BLOCKS
from writelog.generations import Generations
from writelog.logconn import MAX_LEASES, TURN_S
from writelog.logcontext import LogContext, Steps
from writelog.logstore import forget
from writelog.ring import FrontRing
from writelog.server import MAX_CLIENTS
from writelog.shm import DATA_BYTES, EXPORT_BYTES, MAX_RANGES, RESULT, RESULT_OFFSET

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def rig(env: Env) -> Iterator[Rig]:
    with rig_of(env) as rig:
        yield rig


@pytest.fixture
def raw(rig: Rig) -> Iterator[RawClient]:
    client = rig.raw()
    yield client
    client.close()


def result(client: RawClient) -> dict[str, int]:
    assert client.region is not None
    return RESULT.unpack(client.region.memory, RESULT_OFFSET)


def wait_for_reads(rig: Rig, count: int) -> None:
    rig.loop_thread.until(lambda: len(rig.leaf.pending) == count, TIMEOUT_S)


def wait_for_clients(rig: Rig, count: int) -> None:
    rig.loop_thread.until(lambda: rig.log.figures().clients == count, TIMEOUT_S)


def start_reads(client: RawClient, extents: list[tuple[int, int, int]]) -> FrontRing:
    """Attach and ask for (sector, count, offset) through the ring."""
    front = FrontRing(client.attach().page)
    for extent in extents:
        front.put_request(extent)
    front.push()
    client.send(KICK_MESSAGE)
    return front


# The original's messages

def test_a_client_of_the_original_header_works_unchanged(rig: Rig, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "client"
    source = Path(__file__).with_name("original_client.c")
    subprocess.run([compiler, "-O1", "-o", program, source, "-lrt"], check=True, timeout=60)
    written = {3: b"third", 10: b"tenth", 11: b"eleventh", 255: b"last"}
    for block, word in written.items():
        rig.write(block * BLOCK, word.ljust(BLOCK, b"."))
    run = subprocess.run([program, str(rig.path)], capture_output=True, text=True, timeout=60, check=True)
    lines = run.stdout.splitlines()
    extents = [(24, 8), (80, 16), (2040, 8)]
    listed = [f"{sector} {count}" for sector, count in extents]
    assert lines[:2] == ["cookie deadbeef size 8388608", "slots 128"]
    assert lines[2:6] == [f"peek {pair}" for pair in listed] + ["peek end 3"]
    assert lines[6:10] == [f"getw {pair}" for pair in listed] + ["getw end 3"]
    assert sorted(lines[10:13]) == sorted(
        f"data {pair} {checksum(rig.leaf.data[sector * 512 : (sector + count) * 512])}"
        for pair, (sector, count) in zip(listed, extents, strict=True))
    assert lines[13:] == ["left end 0"]
    assert rig.dirty() == []


def checksum(data: bytes | bytearray) -> int:
    total = 0
    for byte in data:
        total = (total * 31 + byte) & 0xFFFFFFFF
    return total


def test_shmp_names_a_region_with_a_cookie(raw: RawClient) -> None:
    region = raw.attach()
    assert region.memory[:4] == bytes.fromhex("efbeadde")
    assert raw.ask(b"peek") == b"done"
    assert raw.ranges() == []


def test_peek_changes_nothing_and_getw_takes(rig: Rig, raw: RawClient) -> None:
    raw.attach()
    rig.write(BLOCK, b"x" * 2 * BLOCK)
    for command, expected in ((b"peek", [(8, 16)]), (b"getw", [(8, 16)]), (b"getw", [])):
        assert raw.ask(command) == b"done"
        assert raw.ranges() == expected
    assert rig.dirty() == rig.leased() == []


def test_clrw_empties_the_log(rig: Rig, raw: RawClient) -> None:
    rig.write(0, b"x" * BLOCK)
    assert raw.ask(b"clrw") == b"done"
    assert rig.dirty() == []


def test_getw_before_shmp_exports_into_the_region_named_later(rig: Rig, raw: RawClient) -> None:
    rig.write(0, b"x" * BLOCK)
    rig.write(8 * BLOCK, b"x" * BLOCK)
    assert raw.ask(b"getw") == b"done"
    raw.attach()
    assert raw.ranges()[1:] == [(64, 8)]


# The faults of the original

def test_fault_1_kick_reads_the_data(rig: Rig, raw: RawClient) -> None:
    rig.leaf.data[BLOCK : 3 * BLOCK] = random.Random(1).randbytes(2 * BLOCK)
    front = start_reads(raw, [(8, 16, 512)])
    assert raw.receive(20) == KICK_MESSAGE
    assert front.take_responses() == [(8, 16, 512)]
    assert raw.region is not None
    assert raw.region.data[512 : 512 + 2 * BLOCK] == rig.leaf.data[BLOCK : 3 * BLOCK]
    assert rig.leaf.log[-1] == (READ, BLOCK, 2 * BLOCK, BACKGROUND)


def test_fault_2_getw_clears_only_what_it_exported(env: Env) -> None:
    blocks = 2 * MAX_RANGES + 100
    with rig_of(env, blocks * 512, "disk,granularity=512", Hollow(env, blocks * 512)) as rig:
        bits = rig.log._map.dirty.bits
        rig.call(lambda: bits.__setitem__(slice(0, blocks, 2), 1))
        client = rig.raw()
        client.attach()
        assert client.ask(b"getw") == b"done"
        assert client.ranges() == [(2 * n, 1) for n in range(MAX_RANGES)]
        assert rig.dirty() == list(range(2 * MAX_RANGES, blocks, 2))
        assert client.ask(b"getw") == b"done"
        assert client.ranges() == [(sector, 1) for sector in range(2 * MAX_RANGES, blocks, 2)]
        assert rig.dirty() == []
        client.close()


def test_fault_3_a_write_in_flight_during_getw_is_dirty_when_it_ends(rig: Rig, raw: RawClient) -> None:
    raw.attach()
    rig.write(0, b"a" * BLOCK)
    rig.leaf.early = False
    rig.write(0, b"b" * BLOCK)
    assert raw.ask(b"getw") == b"done"
    rig.call(rig.leaf.finish)
    rig.leaf.early = True
    assert rig.dirty() == [0]
    assert raw.ask(b"getw") == b"done"
    assert raw.ranges() == [(0, 8)]
    assert rig.dirty() == []


@pytest.mark.parametrize("command", [b"getw", b"clrw"])
def test_fault_4_the_last_word_of_the_bitmap(env: Env, command: bytes) -> None:
    blocks = 67
    with rig_of(env, blocks * BLOCK) as rig:
        rig.call(lambda: rig.log._map.dirty.fill())
        client = rig.raw()
        client.attach()
        assert client.ask(b"peek") == b"done"
        assert client.ranges() == [(0, blocks * 8)]
        assert client.ask(command) == b"done"
        assert rig.dirty() == rig.leased() == []
        client.close()


def test_fault_5_a_scan_of_1_tib_lets_the_guest_in_between(env: Env) -> None:
    size_bytes = 1 << 40
    with rig_of(env, size_bytes, leaf=Hollow(env, size_bytes)) as rig:
        bits = rig.log._map.dirty.bits
        randomly = random.Random(1)

        def scatter() -> None:
            for block in randomly.sample(range(len(bits)), len(bits) // 1000):
                bits[block] = 1

        rig.call(scatter)
        gaps: list[float] = []
        stop = threading.Event()
        last = time.perf_counter()

        def turn() -> None:
            nonlocal last
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
            if not stop.is_set():
                env.loop.call_soon(turn)

        client = rig.raw()
        client.attach()
        env.loop.call_threadsafe(turn)
        assert client.ask(b"peek") == b"done"
        stop.set()
        rig.call(lambda: None)
        assert len(client.ranges()) == min(MAX_RANGES, len(client.ranges())) > 250_000
        long = [gap for gap in gaps[1:] if gap > TURN_S]
        assert len(long) >= 5, "the scan should have been spread over turns"
        assert sorted(long)[len(long) // 2] < 0.02
        client.close()


def test_fault_6_a_client_that_dies_loses_nothing(rig: Rig) -> None:
    rig.write(0, b"x" * BLOCK)
    rig.write(4 * BLOCK, b"x" * BLOCK)
    client = rig.raw()
    client.attach()
    assert client.ask(b"getw", version=1) == b"done"
    assert (result(client)["count"], len(client.ranges())) == (2, 2)
    assert client.ask(b"clrw", version=1, lease=result(client)["lease"], count=8) == b"done"
    assert (rig.dirty(), rig.leased()) == ([], [4])
    client.close()
    wait_for_clients(rig, 0)
    assert (rig.dirty(), rig.leased()) == ([4], [])


def test_fault_7_many_clients_and_messages_in_pieces(rig: Rig) -> None:
    rig.write(0, b"x" * BLOCK)
    clients = [rig.raw() for _ in range(5)]
    regions = [client.attach() for client in clients]
    assert len({region.name for region in regions}) == 5
    for byte in b"peek" + bytes(16):
        for client in clients:
            client.send(bytes([byte]))
    for client in clients:
        assert client.receive(4) == b"done"
        assert client.ranges() == [(0, 8)]
    clients[0].send(2 * (b"peek" + bytes(16)) + (b"clrw" + bytes(16)) + (b"peek" + bytes(16)))
    assert clients[0].receive(16) == 4 * b"done"
    assert clients[0].ranges() == []
    for client in clients:
        client.close()


def test_fault_8_a_request_rewritten_after_the_kick_changes_nothing(rig: Rig, raw: RawClient) -> None:
    rig.leaf.early = False
    front = start_reads(raw, [(0, 1, 0)])
    wait_for_reads(rig, 1)
    assert raw.region is not None
    raw.region.page[64:] = b"\xff" * (4096 - 64)
    assert rig.leaf.pending[0].length == 512
    rig.call(rig.leaf.finish)
    assert raw.receive(20) == KICK_MESSAGE
    assert front.take_responses() == [(0, 1, 0)]


def test_fault_9_nobody_else_may_read_the_disk(env: Env) -> None:
    with rig_of(env) as rig:
        assert stat.S_IMODE(rig.path.stat().st_mode) == 0o600
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        env.run_dir = Path(folder)
        log = Log(env, "disk", OpenFlag.NONE)
        log.attach(Hollow(env, MIB))
        log.open()
        log.socket_path.chmod(0o777)
        child = os.fork()
        if child == 0:
            os._exit(_outcome_for_nobody(str(log.socket_path)))
        pidfd = os.pidfd_open(child)
        ended = threading.Event()
        env.loop.add_reader(pidfd, ended.set)
        env.loop.run_until(ended.is_set, TIMEOUT_S)
        env.loop.remove(pidfd)
        os.close(pidfd)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        log.close()
        forget(env.run_dir, "disk")


def _outcome_for_nobody(path: str) -> int:
    """In a child process: 0 if the server turns user 65534 away without a byte."""
    try:
        os.setgid(65534)
        os.setuid(65534)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        try:
            sock.sendall(b"shmp" + bytes(16))
            return 0 if sock.recv(300) == b"" else 1
        except ConnectionError:
            return 0
    except BaseException:
        return 2


# Version 1

@pytest.mark.parametrize("first", [(b"getw", 0), (b"clrw", ClearOp.FILL)])
def test_one_client_holds_the_log_and_others_only_look(rig: Rig, raw: RawClient, first: tuple[bytes, int]) -> None:
    rig.write(0, b"x" * 3 * BLOCK)
    raw.attach()
    other = rig.raw()
    other.attach()
    command, op = first
    assert raw.ask(command, version=1, op=op) == b"done"
    seen = (rig.dirty(), rig.leased())
    for command in (b"getw", b"clrw"):
        assert other.ask(command) == b"fail"
        assert other.ask(command, version=1) == b"fail"
        assert result(other)["error"] == errno.EBUSY
    assert (rig.dirty(), rig.leased()) == seen
    assert other.ask(b"peek") == b"done"
    assert other.ranges()[0][0] == 0
    raw.close()
    wait_for_clients(rig, 1)
    assert other.ask(b"getw") == b"done"
    assert other.ranges()[0][0] == 0
    assert other.ask(b"clrw") == b"done"
    assert (rig.dirty(), rig.leased()) == ([], [])
    other.close()


def test_the_original_messages_hold_nothing(rig: Rig, raw: RawClient) -> None:
    raw.attach()
    assert raw.ask(b"getw") == b"done"
    other = rig.raw()
    other.attach()
    assert other.ask(b"getw", version=1) == b"done"
    other.close()


@pytest.mark.parametrize("command", [b"getw", b"clrw"])
def test_nobody_becomes_the_holder_while_the_original_clears(
    env: Env, monkeypatch: pytest.MonkeyPatch, command: bytes
) -> None:
    """A sync that adopted meanwhile would not hear of what was cleared, and hand over without it."""
    rename = LogContext.rename

    def rename_late(context: LogContext, ids: Generations, *, all_dirty: bool = False) -> Steps:
        for _ in range(0 if all_dirty else 3):
            yield None  # as long as a side-car takes
        yield from rename(context, ids, all_dirty=all_dirty)

    monkeypatch.setattr(LogContext, "rename", rename_late)
    monkeypatch.setattr("writelog.logconn.TURN_S", -1.0)
    with rig_of(env) as rig:
        with rig.client() as sync:
            base = sync.fill()
            sync.commit(sync.get().lease)
        wait_for_clients(rig, 0)
        rig.write(0, b"x" * BLOCK)
        first, second = rig.raw(), rig.raw()
        for client in (first, second):
            client.attach()
        adopt = Message(b"clrw", version=1, op=ClearOp.ADOPT, sector=base).encode()

        def send_both() -> None:
            first.send(Message(command).encode())
            second.send(adopt)

        rig.call(send_both)
        assert (first.receive(4), second.receive(4)) == (b"done", b"fail")
        assert result(second)["error"] == errno.EBUSY
        assert second.ask(b"clrw", version=1, op=ClearOp.ADOPT, sector=base) == b"fail"
        assert result(second)["error"] == errno.ESTALE
        for client in (first, second):
            client.close()


def test_a_lease_is_settled_in_parts(rig: Rig, raw: RawClient) -> None:
    rig.write(0, b"x" * 3 * BLOCK)
    raw.attach()
    assert raw.ask(b"getw", version=1) == b"done"
    lease = result(raw)["lease"]
    assert raw.ask(b"clrw", version=1, op=ClearOp.RECLAIM, lease=lease, sector=9, count=1) == b"done"
    assert (rig.dirty(), rig.leased()) == ([1], [0, 2])
    assert raw.ask(b"clrw", version=1, op=ClearOp.COMMIT, lease=lease, sector=1, count=22) == b"done"
    assert (rig.dirty(), rig.leased()) == ([1], [0, 2]), "neither block 0 nor 2 lies inside entirely"
    assert raw.ask(b"clrw", version=1, op=ClearOp.COMMIT, lease=lease) == b"done"
    assert (rig.dirty(), rig.leased()) == ([1], [])
    assert raw.ask(b"clrw", version=1, op=ClearOp.COMMIT, lease=lease) == b"fail"


def test_ranges_and_cursors(rig: Rig, raw: RawClient) -> None:
    for block in (1, 3, 5):
        rig.write(block * BLOCK, b"x")
    raw.attach()
    assert raw.ask(b"peek", version=1, sector=17, count=20) == b"done"
    assert raw.ranges() == [(24, 8)]
    assert raw.ask(b"getw", version=1, sector=40) == b"done"
    assert raw.ranges() == [(40, 8)]
    first = result(raw)
    assert raw.ask(b"getw", version=1, lease=first["lease"], sector=8, count=1) == b"done"
    assert raw.ranges() == [(8, 8)]
    assert result(raw) == first
    assert (rig.dirty(), rig.leased()) == ([3], [1, 5])


def test_a_cursor_through_a_log_larger_than_the_export_area(env: Env) -> None:
    blocks = 2 * MAX_RANGES + 100
    with rig_of(env, blocks * 512, "disk,granularity=512", Hollow(env, blocks * 512)) as rig:
        bits = rig.log._map.dirty.bits
        rig.call(lambda: bits.__setitem__(slice(0, blocks, 2), 1))
        client = rig.raw()
        client.attach()
        for command in (b"peek", b"getw"):
            assert client.ask(command, version=1) == b"done"
            first = result(client)
            assert first["count"] == MAX_RANGES
            assert client.ask(command, version=1, lease=first["lease"], sector=first["next_sector"]) == b"done"
            assert (result(client)["count"], result(client)["next_sector"]) == (50, 0)
            assert client.ranges() == [(sector, 1) for sector in range(2 * MAX_RANGES, blocks, 2)]
        assert rig.call(lambda: rig.log.figures()).leased_blocks == MAX_RANGES + 50
        client.close()


def test_a_dense_bitmap_and_its_cursor(env: Env) -> None:
    blocks = 8 * EXPORT_BYTES + 20
    with rig_of(env, blocks * 512, "disk,granularity=512", Hollow(env, blocks * 512)) as rig:
        for block in (3, WINDOW_BLOCKS, blocks - 1):
            rig.write(block * 512, b"x")
        client = rig.raw()
        region = client.attach()
        assert client.ask(b"peek", version=1, op=PeekOp.BITMAP) == b"done"
        first = result(client)
        assert (first["count"], first["next_sector"]) == (8 * EXPORT_BYTES, 8 * EXPORT_BYTES)
        assert region.export[0] == 1 << 3
        assert region.export[WINDOW_BLOCKS // 8] == 1
        assert region.export.tobytes().count(b"\0") == EXPORT_BYTES - 2
        assert client.ask(b"peek", version=1, op=PeekOp.BITMAP, sector=first["next_sector"]) == b"done"
        assert (result(client)["count"], result(client)["next_sector"]) == (20, 0)
        assert region.export[:3] == bytes([0, 0, 1 << 3])
        assert client.ask(b"peek", version=1, op=PeekOp.BITMAP, sector=4) == b"fail"
        assert result(client)["error"] == errno.EINVAL
        client.close()


def test_fill_and_figures(rig: Rig, raw: RawClient) -> None:
    region = raw.attach()
    rig.leaf.early = False
    rig.write(0, b"x")
    assert raw.ask(b"clrw", version=1, op=ClearOp.FILL) == b"done"
    assert raw.ask(b"getw", version=1, sector=8, count=16) == b"done"
    assert raw.ask(b"peek", version=1, op=PeekOp.FIGURES) == b"done"
    figures = Figures.decode(region.export)
    assert figures == Figures(4096, 2048, figures.generation, 254, 2, 1, 1, 1, figures.current, figures.base, 0)
    assert figures.current and figures.base
    rig.call(rig.leaf.finish)


@pytest.mark.parametrize(("command", "fields", "code"), [
    (b"peek", {"version": 2}, errno.EPROTONOSUPPORT),
    (b"shmp", {"version": 1}, errno.EINVAL),
    (b"kick", {"version": 1}, errno.EINVAL),
    (b"peek", {"version": 1, "op": 9}, errno.EINVAL),
    (b"getw", {"version": 1, "op": 1}, errno.EINVAL),
    (b"peek", {"version": 1, "sector": 2048}, errno.EINVAL),
    (b"peek", {"version": 1, "sector": (1 << 64) - 1, "count": 0xFFFFFFFF}, errno.EINVAL),
    (b"getw", {"version": 1, "lease": 7}, errno.ENOENT),
    (b"clrw", {"version": 1, "lease": 0}, errno.ENOENT),
])
def test_a_refused_message_says_so_and_the_connection_lives(
    rig: Rig, raw: RawClient, command: bytes, fields: dict[str, int], code: int
) -> None:
    raw.attach()
    rig.write(0, b"x")
    assert raw.ask(command, **fields) == b"fail"
    assert result(raw)["error"] == code
    assert raw.ask(b"peek") == b"done"
    assert raw.ranges() == [(0, 8)]


def test_settling_far_outside_the_disk_is_harmless(rig: Rig, raw: RawClient) -> None:
    raw.attach()
    rig.write(0, b"x")
    assert raw.ask(b"getw", version=1) == b"done"
    lease = result(raw)["lease"]
    for op in (ClearOp.COMMIT, ClearOp.RECLAIM):
        assert raw.ask(b"clrw", version=1, op=op, lease=lease, sector=(1 << 64) - 1, count=1) == b"done"
    assert rig.leased() == [0]


def test_leases_have_a_limit(rig: Rig, raw: RawClient) -> None:
    raw.attach()
    for _ in range(MAX_LEASES):
        assert raw.ask(b"getw", version=1) == b"done"
    assert raw.ask(b"getw", version=1) == b"fail"
    assert result(raw)["error"] == errno.ENOSPC


# Reads through the ring

def test_requests_that_are_refused_do_not_disturb_the_others(rig: Rig, raw: RawClient) -> None:
    wrong = [(2048, 1, 0), (0, 0, 0), (0, 1, DATA_BYTES - 100), (1 << 63, 0xFFFFFFFF, 0), (2047, 2, 0)]
    front = start_reads(raw, [*wrong, (2047, 1, 0)])
    assert raw.receive(20) == KICK_MESSAGE
    responses = front.take_responses()
    assert sorted(responses) == sorted([*((sector, 0, offset) for sector, _, offset in wrong), (2047, 1, 0)])
    assert rig.leaf.submits == 1


def test_a_read_that_fails_has_a_count_of_0(rig: Rig, raw: RawClient) -> None:
    rig.leaf.errors = [errno.EIO]
    front = start_reads(raw, [(0, 8, 0), (8, 8, BLOCK)])
    assert raw.receive(20) == KICK_MESSAGE
    assert sorted(front.take_responses()) == [(0, 0, 0), (8, 8, BLOCK)]


def test_responses_of_one_turn_share_a_kick(rig: Rig, raw: RawClient) -> None:
    rig.leaf.early = False
    front = start_reads(raw, [(n, 1, n * 512) for n in range(128)])
    wait_for_reads(rig, 128)
    rig.call(rig.leaf.finish)
    assert raw.receive(20) == KICK_MESSAGE
    assert len(front.take_responses()) == 128
    assert raw.ask(b"peek") == b"done"


def test_a_kick_that_was_sent_does_not_stand_for_later_responses(rig: Rig, raw: RawClient) -> None:
    """With a reply stuck behind it: the client may have looked at the ring before they were there."""
    rig.leaf.early = False
    front = start_reads(raw, [(0, 8, 0), (8, 8, BLOCK)])
    wait_for_reads(rig, 2)
    assert rig.log._server is not None
    (connection,) = rig.log._server._context.connections
    narrow = Narrow(connection._sock)
    connection._sock = cast(socket.socket, narrow)
    rig.call(lambda: rig.leaf.finish(1))

    def stuck_behind_the_kick() -> None:
        connection._unsent += b"done"
        narrow.room_bytes = len(KICK_MESSAGE) + 2
        connection._send()

    rig.call(stuck_behind_the_kick)
    assert raw.receive(len(KICK_MESSAGE) + 2) == KICK_MESSAGE + b"do"
    assert front.take_responses() == [(0, 8, 0)]
    rig.call(lambda: rig.leaf.finish(1))
    narrow.room_bytes = 1 << 20
    assert raw.receive(2 + len(KICK_MESSAGE)) == b"ne" + KICK_MESSAGE
    assert front.take_responses() == [(8, 8, BLOCK)]


class Narrow:
    """A socket that takes `room_bytes` more."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.room_bytes = 0

    def send(self, data: bytearray) -> int:
        if not self.room_bytes:
            raise BlockingIOError
        count = self.sock.send(bytes(data[: self.room_bytes]))
        self.room_bytes -= count
        return count

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)


def test_a_client_that_leaves_with_reads_in_flight(rig: Rig) -> None:
    client = rig.raw()
    rig.leaf.early = False
    start_reads(client, [(0, 8, 0), (8, 8, BLOCK)])
    wait_for_reads(rig, 2)
    assert client.region is not None
    name = client.region.name
    client.close()
    rig.loop_thread.until(lambda: not Path(f"/dev/shm{name}").exists(), TIMEOUT_S)
    assert rig.clients() == 1, "it counts until its reads have ended"
    rig.call(rig.leaf.finish)
    wait_for_clients(rig, 0)


def test_a_ring_index_gone_wild_drops_the_client_and_nobody_else(rig: Rig, raw: RawClient) -> None:
    other = rig.raw()
    region = raw.attach()
    region.page[0:4] = (129).to_bytes(4, "little")
    raw.send(KICK_MESSAGE)
    assert raw.is_closed()
    assert other.ask(b"peek") == b"done"
    other.close()


def test_a_ring_rewritten_at_random_while_it_is_served(rig: Rig) -> None:
    randomly = random.Random(1)
    for _ in range(20):
        client = rig.raw()
        region = client.attach()
        try:
            for _ in range(20):
                region.page[16:] = randomly.randbytes(4080)
                producer = randomly.randrange(randomly.choice([200, 1 << 32]))
                region.page[0:4] = producer.to_bytes(4, "little")
                client.send(KICK_MESSAGE)
        except (BrokenPipeError, ConnectionResetError):
            pass
        client.close()
    wait_for_clients(rig, 0)
    assert rig.dirty() == []


# Bad clients

@pytest.mark.parametrize("garbage", [b"\0" * 20, b"GET / HTTP/1.1\r\n\r\n\r\n", os.urandom(10_000) + b"\0" * 20])
def test_garbage_closes_its_connection_and_nothing_else(rig: Rig, raw: RawClient, garbage: bytes) -> None:
    other = rig.raw()
    raw.send(garbage)
    assert raw.is_closed()
    assert other.ask(b"peek") == b"done"
    other.close()


def test_a_truncated_message(rig: Rig, raw: RawClient) -> None:
    raw.send(b"getw" + bytes(15))
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.is_closed()
    wait_for_clients(rig, 0)


def test_a_client_that_does_not_read_costs_no_memory(rig: Rig, raw: RawClient) -> None:
    raw.sock.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 64 * MIB:
            sent += raw.sock.send((b"peek" + bytes(16)) * 100)
            rig.call(lambda: None)
    [connection] = rig.call(lambda: list(rig.log._server._context.connections))  # type: ignore[union-attr]
    assert len(connection._unsent) < 8192
    assert len(connection._messages) < 512
    raw.sock.settimeout(TIMEOUT_S)
    assert raw.receive(4 * (sent // 20)) == b"done" * (sent // 20)


def test_too_many_clients(rig: Rig) -> None:
    clients = [rig.raw() for _ in range(MAX_CLIENTS)]
    wait_for_clients(rig, MAX_CLIENTS)
    assert rig.raw().is_closed()
    clients.pop().close()
    wait_for_clients(rig, MAX_CLIENTS - 1)
    late = rig.raw()
    assert late.ask(b"peek") == b"done"
    for client in (*clients, late):
        client.close()


def test_clients_come_and_go(rig: Rig) -> None:
    randomly = random.Random(3)
    for _ in range(60):
        client = rig.raw()
        client.send(b"shmp" + bytes(16) + b"getw\1" + bytes(randomly.randrange(16)))
        client.close()
    wait_for_clients(rig, 0)
    assert not [path for path in Path("/dev/shm").iterdir() if path.name.endswith(f"_disk_{os.getpid()}_1.wlog")]


# Life and death

def test_a_stale_socket_is_replaced(env: Env) -> None:
    path = env.run_dir / "log__disk.ctl"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
    with rig_of(env) as rig:
        client = rig.raw()
        assert client.ask(b"peek") == b"done"
        client.close()
    assert not path.exists()


def test_a_live_socket_is_refused(env: Env) -> None:
    path = env.run_dir / "log__disk.ctl"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(LogError, match=r"cannot serve the log: another process listens there.*log:NAME"):
            Rig(env)
        assert path.exists()
    forget(env.run_dir, "disk")


def test_a_file_in_the_way_is_not_touched(env: Env) -> None:
    path = env.run_dir / "log__disk.ctl"
    path.write_text("precious")
    with pytest.raises(LogError, match="cannot serve the log"):
        Rig(env)
    assert path.read_text() == "precious"
    forget(env.run_dir, "disk")


def test_a_path_that_is_too_long(env: Env) -> None:
    env.run_dir = env.run_dir / ("x" * 100)
    env.run_dir.mkdir()
    with pytest.raises(LogError, match="too long"):
        Rig(env)
    forget(env.run_dir, "disk")


def test_quiesce_waits_for_the_reads_and_starts_no_more(rig: Rig, raw: RawClient) -> None:
    rig.leaf.early = False
    front = start_reads(raw, [(0, 8, 0)])
    wait_for_reads(rig, 1)
    done = threading.Event()
    also_done = threading.Event()
    rig.call(lambda: rig.log.quiesce(done.set))
    rig.call(lambda: rig.log.quiesce(also_done.set))
    assert not done.is_set()
    front.put_request((8, 8, 0))
    front.push()
    raw.send(KICK_MESSAGE)
    assert raw.ask(b"peek") == b"done"
    assert len(rig.leaf.pending) == 1
    rig.call(rig.leaf.finish)
    assert done.wait(TIMEOUT_S) and also_done.wait(TIMEOUT_S)


def test_quiesce_of_an_idle_log_is_done_at_once(rig: Rig) -> None:
    done = threading.Event()
    rig.call(lambda: rig.log.quiesce(done.set))
    assert done.is_set()


def test_close_waits_for_reads_in_flight(rig: Rig, raw: RawClient) -> None:
    rig.leaf.early = False
    start_reads(raw, [(0, 8, 0)])
    wait_for_reads(rig, 1)

    def close_while_the_disk_is_busy() -> int:
        def finish() -> None:
            rig.leaf.finish()

        rig.env.loop.call_later(0.02, finish)
        rig.log.close()
        return len(rig.leaf.pending)

    assert rig.call(close_while_the_disk_is_busy) == 0
    assert raw.is_closed()
    rig.call(rig.log.open)


def test_close_ends_clients_and_returns_their_leases(env: Env) -> None:
    rig = Rig(env)
    rig.write(0, b"x")
    client = rig.raw()
    client.attach()
    assert client.ask(b"getw", version=1) == b"done"
    rig.call(rig.log.close)
    assert client.is_closed()
    client.close()
    assert not rig.path.exists()
    rig.call(rig.log.open)
    assert (rig.dirty(), rig.leased()) == ([0], [])
    rig.close()
