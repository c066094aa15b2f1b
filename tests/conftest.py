"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from processes import Tapdisk, forget_logs
from support import Manual

from tapcore.driver import Env
from tapcore.loop import Loop
from tapcore.workers import Workers

# A busy machine is no failure: no test is held to a time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def default_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a process has its sockets that is not told otherwise: no other test's."""
    run_dir = tmp_path / "run-default"
    monkeypatch.setenv("TAPDISK_RUN_DIR", str(run_dir))
    yield
    if run_dir.exists():
        forget_logs(run_dir)


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Env]:
    """A loop, its workers and a run directory of the test's own."""
    loop = Loop()
    workers = Workers(loop, 8)
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    Manual.opened.clear()
    yield Env(loop, workers, run_dir)
    workers.close()
    loop.close()
    forget_logs(run_dir)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Tapdisk]]:
    """`serve(chain, *options)`: a running tapdisk, as `Tapdisk`; all are ended after the test."""
    run_dir = tmp_path / "run-serve"
    run_dir.mkdir(mode=0o700)
    started: list[Tapdisk] = []

    def start(chain: str, *arguments: str, **options: Any) -> Tapdisk:
        started.append(Tapdisk(run_dir, chain, *arguments, **options))
        return started[-1]

    yield start
    for tapdisk in started:
        tapdisk.stop()
    forget_logs(run_dir)
