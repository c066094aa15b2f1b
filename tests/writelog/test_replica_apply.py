"""The applier: overlapping extents in order, all others at once."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Manual

from tapcore.driver import Env, Feature, OpenFlag
from tapcore.request import WRITE
from writelog.replica_apply import Applier


def open_manual(env: Env, size_bytes: int) -> Manual:
    driver = Manual(env, str(size_bytes), OpenFlag.NONE)
    driver.open()
    driver.data[:] = b"\xee" * size_bytes
    return driver


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 6), st.booleans()), max_size=30),
       st.randoms(use_true_random=False))
def test_applier_equals_one_extent_after_the_other(
    env: Env, extents: list[tuple[int, int, bool]], random: Random
) -> None:
    driver = open_manual(env, 32 * 512)
    applier = Applier(driver, env.workers)
    expected = bytearray(driver.data)
    ended: list[int] = []
    for number, (block, blocks, is_zero) in enumerate(extents):
        start, length = block * 512, blocks * 512
        payload = bytes(length) if is_zero else bytes([number + 1]) * length
        expected[start : start + length] = payload
        if is_zero:
            applier.zero(start, length, ended.append)
        else:
            applier.write(start, memoryview(payload), ended.append)
    applier.start()
    while driver.pending:
        random.shuffle(driver.pending)
        driver.finish(1)
    assert applier.is_idle
    assert applier.queued_bytes == 0
    assert ended == [0] * len(extents)
    assert driver.data == expected


def test_zeroes_are_written_where_a_chain_has_no_operation_for_them(env: Env) -> None:
    driver = open_manual(env, 4 << 20)
    driver.early = True
    driver.info = driver.info.with_changes(features=Feature.FLUSH)
    applier = Applier(driver, env.workers)
    ended: list[int] = []
    length = (3 << 20) + 512
    applier.zero(512, length, ended.append)
    applier.start()
    assert ended == [0]
    assert [request[:3] for request in driver.log] == [(WRITE, 512, length)]
    assert driver.data == b"\xee" * 512 + bytes(length) + b"\xee" * ((1 << 20) - 1024)
