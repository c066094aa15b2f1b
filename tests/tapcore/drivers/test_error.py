"""error: which requests fail, and that those change nothing."""

from __future__ import annotations

import errno

import pytest
from contract.runner import Runner

from tapcore.driver import Env
from tapcore.drivers.error import Error
from tapcore.errors import ChainError
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, ZEROES, Request


def run(disk: Runner, op: int, offset: int = 0, length: int = 512) -> int:
    iov = [memoryview(bytearray(b"w" * length))] if op in (READ, WRITE) else []
    return disk.run(Request(op, offset, length if op != FLUSH else 0, iov))[0]


def test_everything_fails_but_status(env: Env) -> None:
    disk = Runner(env, "error:|ram:1M")
    assert [run(disk, op) for op in (READ, WRITE, FLUSH, DISCARD, ZEROES, STATUS)] == [errno.EIO] * 5 + [0]
    disk.close()


def test_count_after_op_and_errno(env: Env) -> None:
    disk = Runner(env, "error:op=write+zeroes,errno=ENOSPC,count=2,after=1|ram:1M")
    codes = [run(disk, op, i * 512) for i, op in enumerate((WRITE, READ, WRITE, FLUSH, ZEROES, WRITE))]
    assert codes == [0, 0, errno.ENOSPC, 0, errno.ENOSPC, 0]
    assert disk.read(0, 3072) == b"w" * 512 + bytes(2048) + b"w" * 512, "what failed changed nothing"
    assert disk.chain.find("error")[0].failed == 2  # type: ignore[attr-defined]
    disk.close()


def test_offset_range(env: Env) -> None:
    disk = Runner(env, "error:offset=1K-2K|ram:1M")
    cases = {(0, 1024): 0, (0, 1025): errno.EIO, (1024, 1): errno.EIO, (2047, 5): errno.EIO, (2048, 1): 0}
    assert {place: run(disk, READ, *place) for place in cases} == cases
    assert run(disk, FLUSH) == 0, "a flush is nowhere"
    disk.close()


def test_probability_is_seeded(env: Env) -> None:
    def pattern(seed: int) -> list[int]:
        disk = Runner(env, f"error:p=0.3,seed={seed}|ram:1M")
        codes = [run(disk, READ) for _ in range(200)]
        disk.close()
        return codes

    assert pattern(1) == pattern(1) != pattern(2)
    assert 30 < pattern(1).count(errno.EIO) < 90


def test_levels_stack_and_attributes_change_at_any_time(env: Env) -> None:
    disk = Runner(env, "error:op=read,errno=ENOMEM|error:op=write,errno=EDQUOT,count=0|ram:1M")
    first, second = disk.chain.find("error")
    assert isinstance(first, Error) and isinstance(second, Error)
    assert (run(disk, READ), run(disk, WRITE)) == (errno.ENOMEM, 0)
    first.count, second.count = 0, 1
    assert [run(disk, READ), run(disk, WRITE), run(disk, WRITE)] == [0, errno.EDQUOT, 0]
    second.count, second.errno, second.ops = None, errno.ETIMEDOUT, frozenset({FLUSH})
    assert [run(disk, WRITE), run(disk, FLUSH), run(disk, FLUSH)] == [0, errno.ETIMEDOUT, errno.ETIMEDOUT]
    disk.close()


@pytest.mark.parametrize("params, message", [
    ("op=reed", "unknown op 'reed'; ops: read, write, flush, discard, zeroes, status, joined by '+'"),
    ("errno=EWHAT", "unknown errno 'EWHAT'; a name such as EIO"),
    ("errno=errorcode", "unknown errno 'errorcode'"),
    ("offset=5", "offset '5' is not a range; for example offset=1M-2M"),
    ("offset=2M-1M", "offset '2M-1M' is an empty range"),
    ("count=many", "count 'many' is not a whole number"),
    ("p=half", "p 'half' is not a number"),
    ("p=1.5", "p '1.5' is more than 1"),
    ("sometimes", "unknown option 'sometimes'; options of error: op, errno, offset, after, count, p, seed"),
])
def test_bad_options(env: Env, params: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        Runner(env, f"error:{params}|ram:1M")
    assert f"error: {message}" in str(caught.value)
