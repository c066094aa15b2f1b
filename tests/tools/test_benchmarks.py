"""The parts of the benchmarks that decide what is shown."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import Tapdisk, forget_logs
from support import need

from tools.benchmarks import (
    chart,
    crowd,
    disks,
    growth,
    logscan,
    memory,
    report,
    runs,
    start,
)
from tools.benchmarks.copiers import Mirror, Nbdcopy, Writelog
from tools.benchmarks.load import LIGHT, Trace
from tools.benchmarks.outcome import OURS, Outcome
from tools.benchmarks.processes import RunFailed


def outcome(unit: str, ours: float, *peers: float) -> Outcome:
    made = Outcome("row", unit)
    made.add(OURS, ours)
    for number, figure in enumerate(peers):
        made.add(f"peer {number}", figure)
    return made


def test_a_ratio_above_one_is_ahead_of_the_best_peer() -> None:
    assert outcome("MB/s", 300, 100, 200).ratio() == 1.5
    assert outcome("s/GiB", 1, 2, 3).ratio() == 2
    assert outcome("ms", 1).ratio() is None


def test_what_failed_has_no_ratio() -> None:
    failed = Outcome("row: failed", "runs")
    failed.fail(OURS, "not done in time")
    failed.fail("peer", "not done in time")
    failed.fail("peer", "not done in time")
    assert failed.ratio() is None
    assert failed.median("peer") == 2
    only_peer = Outcome("row", "ms")
    only_peer.add("peer", 3)
    assert only_peer.ratio() is None
    report.show([failed, only_peer])


def test_a_chart_is_svg_with_a_bar_for_each_ratio(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    chart.write(path, [outcome("ms", 1, 2), outcome("ms", 1000, 1), outcome("ms", 1), outcome("%", 1, 1)])
    bars = ElementTree.parse(path).getroot().findall(".//{*}rect[@fill!='white']")
    assert len(bars) == 3
    assert all(float(bar.get("width", "-1")) >= 0 for bar in bars)


def test_curves_are_svg_with_a_line_for_each_server(tmp_path: Path) -> None:
    row, *others = [row for row in growth.ROWS if row.of == growth.LAYERS]
    outcomes = []
    for point in (row, others[-1]):
        outcomes.append(Outcome(point.name, point.unit, {OURS: [100.0 * point.at], "peer": [50]}))
    (series, points), = growth.curves(outcomes).items()
    assert points == {OURS: [(1, 100), (10, 1000)], "peer": [(1, 50), (10, 50)]}
    path = tmp_path / "curves.svg"
    chart.write_curves(path, series, points)
    assert len(ElementTree.parse(path).getroot().findall(".//{*}polyline")) == 2


def short(**others: float) -> argparse.Namespace:
    return argparse.Namespace(**{"repeat": 1, "seconds": 0.1, "size_mib": 8, "scale": 0.01} | others)


@pytest.mark.parametrize("row", start.ROWS, ids=lambda row: row.name)
def test_a_start_is_measured(row: start.Row, tmp_path: Path) -> None:
    need("qemu-nbd", "nbdkit", "qemu-storage-daemon")
    outcome, = start.measure([row], short(), tmp_path)
    assert len(outcome.figures) >= 2 and all(outcome.median(name) > 0 for name in outcome.figures)


def test_memory_of_disks_is_measured(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    row = memory.Row("small", ((1, 1 << 20), (3, 1 << 20)), logged=True)
    outcome, = memory.measure([row], short(), tmp_path)
    assert all(outcome.median(name) < 64 for name in outcome.figures)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of", [growth.SIZE, growth.COPIED, growth.MANY, growth.LAYERS])
def test_growth_is_measured(of: str, tmp_path: Path) -> None:
    need("fio", "qemu-storage-daemon", "qemu-nbd")
    row = next(row for row in growth.ROWS if row.of == of)
    outcome, = growth.measure([row], short(), tmp_path)
    assert len(outcome.figures) == 2 and all(outcome.median(name) > 0 for name in outcome.figures)
    assert not list(tmp_path.iterdir())


def test_many_disks_are_copied_at_once(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    names = {outcome.row.partition(": ")[2] for outcome in crowd.measure([crowd.Row(2)], short(), tmp_path)}
    assert "speed" in names and "failed" not in names
    assert not list(tmp_path.iterdir())


def test_the_log_is_scanned_beside_the_original(tmp_path: Path) -> None:
    peek, take, clear, longest = logscan.measure([logscan.Row(10_000, size_bytes=16 << 30)], short(), tmp_path)
    assert all(outcome.median(logscan.ORIGINAL) > 0 for outcome in (peek, take, clear))
    assert longest.median(OURS) <= peek.median(OURS) + take.median(OURS)


def test_disks_are_made_as_they_are_called(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    assert disks.make(path, 20 << 20, "full") == 20 << 20
    assert disks.make(path, 20 << 20, "30 % allocated") == 6 << 20
    assert path.stat().st_blocks * 512 >> 20 == 6
    assert disks.make(path, 20 << 20, "50 % zero") == 10 << 20
    assert path.stat().st_blocks * 512 >> 20 == 20


def test_a_copy_that_differs_does_not_count(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    disks.make(one, 2 << 20, "full")
    other.write_bytes(one.read_bytes())
    disks.must_be_equal(one, other)
    with other.open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(RunFailed, match="differs"):
        disks.must_be_equal(one, other)


def test_holes_are_as_good_as_zeroes_and_a_size_counts(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(3 << 20))
    disks.make_empty(other, 3 << 20)
    disks.must_be_equal(one, other)
    disks.make_empty(other, 4 << 20)
    with pytest.raises(RunFailed, match="differs"):
        disks.must_be_equal(one, other)


def test_a_trace_counts_what_ended_in_a_time(tmp_path: Path) -> None:
    trace = Trace()
    trace.ends_s.extend([1, 2, 3, 4])
    trace.latencies_s.extend([0.1, 0.4, 0.2, 0.3])
    trace.store(tmp_path / "trace")
    again = Trace.load(tmp_path / "trace", 4)
    assert again.iops(2, 4) == 1
    assert again.percentile_s(50, 0, 5) == 0.3
    assert again.percentile_s(99.9, 0, 5) == 0.4


@pytest.mark.parametrize("kind", [Writelog, Mirror, Nbdcopy])
def test_a_disk_is_copied(kind: type[Writelog | Mirror | Nbdcopy], tmp_path: Path) -> None:
    need("qemu-storage-daemon", "nbdkit", "nbdcopy")
    source = tmp_path / "disk"
    disks.make(source, 8 << 20, "50 % zero")
    copied = runs.run(kind, source, 60, encrypted=True)
    assert copied.copy.end_s > copied.copy.start_s
    assert copied.copy.peak_bytes > 1 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_the_load_writes_at_its_rate_until_it_is_stopped(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disks.make_empty(disk, 8 << 20)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tapdisk = Tapdisk(run_dir, f"aio:{disk}", "--name", "bench", "--nbd", f"unix:{tmp_path}/guest")
    command = [sys.executable, "-m", "tools.benchmarks.load", f"{tmp_path}/guest", LIGHT, "--seconds", "1",
               "--trace", str(tmp_path / "trace")]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            assert load.stdout is not None
            assert load.stdout.readline() == "ready\n"
            load.terminate()
            assert load.stdout.readline() == "stopped\n"
            assert "changed_blocks" in load.stdout.readline()
        assert load.returncode == 0
    finally:
        tapdisk.stop()
        forget_logs(run_dir)
