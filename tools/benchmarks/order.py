"""What the order by heat saves: a guest that writes by Zipf's law, and a capped sync, by turns in the order
by heat and in address order. Run as `python -m tools.benchmarks.order`; it takes a minute a pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

from tapcore.nbd.client import NbdClient, NbdError
from tapcore.nbd.wire import NBD_CMD_WRITE
from writelog.simulate import BLOCK_BYTES, Scattered

MIB = 1 << 20
SIZE_BYTES = 1024 * MIB
LINK_RATE, WRITE_RATE = 56 * MIB, 20 * MIB
TICK_S = 0.01
DEPTH = 64
HEAT = "from writelog.sync import main; import sys; sys.exit(main())"
ADDRESS = "from writelog.backlog import Backlog; Backlog.__init__.__defaults__ = (False,); " + HEAT


class Guest(threading.Thread):
    """Keeps to the rate as well as it can, until the disk does not answer any more."""

    def __init__(self, uri: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.writes = 0
        self.stopping = False
        self._uri = uri
        self._load = Scattered(SIZE_BYTES // BLOCK_BYTES, WRITE_RATE, seed, 0.99)

    def run(self) -> None:
        data = Random(1).randbytes(BLOCK_BYTES)
        start_s = now_s = time.monotonic()
        with NbdClient(self._uri, timeout_s=120) as client:
            try:
                while not self.stopping:
                    until_s = time.monotonic()
                    for block, _ in self._load.writes(now_s - start_s, until_s - start_s):
                        while client.in_flight >= DEPTH:
                            client.wait()
                        client.submit(NBD_CMD_WRITE, block * BLOCK_BYTES, BLOCK_BYTES, data)
                        self.writes += 1
                    while client.in_flight:
                        client.wait()
                    now_s = until_s
                    time.sleep(TICK_S)
            except NbdError:
                return  # the disk was handed over


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


def measure(folder: Path, program: str, seed: int) -> dict[str, float]:
    """One whole replication; the sync's report, and the guest's writes."""
    image, copy, run_dir = folder / "disk.img", folder / "copy.img", folder / "run"
    run_dir.mkdir(mode=0o700, exist_ok=True)
    with image.open("wb") as file:
        noise = os.urandom(64 * MIB)
        for _ in range(SIZE_BYTES // len(noise)):
            file.write(noise)
    copy.unlink(missing_ok=True)
    copy.touch()
    os.truncate(copy, SIZE_BYTES)
    for name in (f"{image}.fenced", f"{copy}.replica", f"{copy}.writelog"):
        Path(name).unlink(missing_ok=True)
    python, options = [sys.executable, "-m"], {"stdout": subprocess.PIPE, "text": True}
    tapdisk = subprocess.Popen([*python, "tapcore.tapdisk", "--run-dir", str(run_dir), "--name", "vm1",
                                f"log:|aio:{image}"], **options)  # type: ignore[call-overload]
    replica = subprocess.Popen([*python, "writelog.replica", "--insecure-loopback-only",
                                "--run-dir", str(folder / "there"),
                                "--listen", "tcp://127.0.0.1:0", f"aio:{copy}"],
                               **options)  # type: ignore[call-overload]
    try:
        guest = Guest(line_of(tapdisk), seed)
        endpoint = line_of(replica)
        guest.start()
        arguments = ["--insecure-loopback-only", "--run-dir", str(run_dir), "--json", "--compress", "off",
                     "--rate", str(LINK_RATE),
                     "--throttle-floor", "off", "vm1", endpoint]
        sync = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True,
                              check=True)
        guest.stopping = True
    finally:
        for process in (tapdisk, replica):
            process.terminate()
            process.wait(30)
    guest.join(30)
    assert subprocess.run(["cmp", str(image), str(copy)], check=False).returncode == 0, "it does not count"
    report: dict[str, float] = json.loads(sync.stdout.splitlines()[-1])
    return report | {"writes": guest.writes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.order", description=__doc__)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where images are (default tmpfs)")
    options = parser.parse_args()
    print("| order | time, s | extra data | pause, ms | guest's writes a second |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="writelog-bench-", dir=options.folder) as folder:
        for seed in range(options.repeat):
            for order, program in (("heat", HEAT), ("address", ADDRESS)):
                report = measure(Path(folder), program, seed)
                extra, took_s = report["extra_bytes"] / SIZE_BYTES, report["elapsed_s"]
                print(f"| {order} | {took_s:.1f} | {100 * extra:.1f} % | {report['pause_s'] * 1000:.0f} | "
                      f"{report['writes'] / took_s:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
