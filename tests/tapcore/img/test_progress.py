"""What is told of how far a command is: figures that are true, on standard error."""

from __future__ import annotations

import json

import pytest

from tapcore.img import progress as module
from tapcore.img.progress import Progress, progress_style

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_rate_and_time_left_are_those_of_the_last_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("json", "convert") as progress:
        progress.start(100 * MIB)
        assert progress.eta_s is None
        for _ in range(10):
            clock.now_s += 1
            progress.advance(2 * MIB)
        for _ in range(10):
            clock.now_s += 1
            progress.advance(4 * MIB)
        progress.end()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["done_bytes"] for event in events] == [*range(2 * MIB, 22 * MIB, 2 * MIB),
                                                         *range(24 * MIB, 64 * MIB, 4 * MIB), 100 * MIB]
    assert events[9]["rate"] == 2 * MIB and events[9]["eta_s"] == 40
    assert events[19]["rate"] == 4 * MIB and events[19]["eta_s"] == 10


def test_it_is_told_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("lines", "commit") as progress:
        progress.start(10 * MIB)
        for _ in range(100):
            clock.now_s += 0.0625
            progress.advance(MIB // 16)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("commit: 2 MiB of 10 MiB at 1 MiB/s, 8 s left")


@pytest.mark.parametrize("style", ["off", "tty"])
def test_styles(clock: Clock, capsys: pytest.CaptureFixture[str], style: str) -> None:
    with Progress(style, "rebase") as progress:
        progress.start(MIB)
        clock.now_s += 10
        progress.advance(MIB // 2)
        progress.end()
    said = capsys.readouterr()
    assert said.out == "" and ("rebase" in said.err) == (style == "tty")


def test_the_style_follows_from_what_is_asked_for() -> None:
    assert progress_style(wanted=False, as_json=True) == "off"
    assert progress_style(wanted=True, as_json=True) == "json"
    assert progress_style(wanted=True, as_json=False) in ("lines", "tty")
