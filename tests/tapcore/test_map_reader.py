"""The map of a disk whose chain is on loan."""

from __future__ import annotations

from typing import Any, cast

import pytest
from support import Manual

from tapcore.control_server import Call
from tapcore.driver import Env
from tapcore.errors import ControlError
from tapcore.map_reader import MapReader
from tapcore.vbd import Vbd

SIZE = 1 << 16
TIMEOUT_S = 20


class Answer:
    """A call whose answer is kept."""

    def __init__(self) -> None:
        self.result: dict[str, Any] | None = None
        self.error: ControlError | None = None

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result

    def fail(self, error: ControlError) -> None:
        self.error = error


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_map_waits_for_a_chain_that_is_on_loan(env: Env, is_closed: bool) -> None:
    vbd = Vbd(env, "disk")
    vbd.open(f"manual:{SIZE}")
    Manual.opened[-1].early = True
    vbd.pause(lambda: None)
    vbd.lend_chain(lambda: None)
    answer = Answer()
    MapReader(env.loop, vbd, cast(Call, answer), 0, SIZE).step()
    for _ in range(3):
        env.loop.turn(0.02)
    assert answer.result is None and answer.error is None
    vbd.chain_returned()
    if is_closed:
        vbd.close(lambda: None)
    env.loop.run_until(lambda: answer.result is not None or answer.error is not None, TIMEOUT_S)
    if is_closed:
        assert answer.error is not None and "no block status" in answer.error.message
    else:
        assert answer.result == {"extents": [(0, SIZE, 0)], "next": None}
        vbd.close(lambda: None)
