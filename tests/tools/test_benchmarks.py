"""The parts of the benchmarks that decide what is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import Tapdisk, forget_logs
from support import need

from tools.benchmarks import chart, disks, report, runs
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
