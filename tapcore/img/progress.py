"""How far a command is, how fast, and how long it will take: a bar, lines, or JSON events, on standard error.

What is counted is data that has to be read; holes and zeroes take no time, so they are no progress.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

from tapcore.text import size_text
from writelog.plan import Meter

INTERVAL_S: Final = {"json": 0.5, "tty": 0.1, "lines": 2.0, "off": 1e9}
WINDOW_S: Final = 5.0
"""The rate is a mean over this time."""


def progress_style(*, wanted: bool, as_json: bool) -> str:
    """A key of INTERVAL_S."""
    if not wanted:
        return "off"
    return "json" if as_json else "tty" if sys.stderr.isatty() else "lines"


class Progress:
    """`with Progress(style, "convert") as progress`; `start(total)` before the first `advance`."""

    def __init__(self, style: str = "off", name: str = "") -> None:
        self.style = style
        self.done_bytes = 0
        self._name = name
        self._total_bytes = 0
        self._meter = Meter(WINDOW_S)
        self._told_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def is_on(self) -> bool:
        return self.style != "off"

    def start(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._meter.feed(time.monotonic(), 0)
        if self.style == "tty":
            self._start_bar()

    def advance(self, length: int) -> None:
        self.done_bytes += length
        now_s = time.monotonic()
        if now_s - self._told_s >= INTERVAL_S[self.style]:
            self._told_s = now_s
            self._meter.feed(now_s, self.done_bytes)
            self._tell()

    def end(self) -> None:
        """All is done."""
        self.done_bytes = self._total_bytes
        if self.is_on:
            self._tell()

    @property
    def eta_s(self) -> float | None:
        """None while it is not known."""
        rate = self._meter.rate
        return (self._total_bytes - self.done_bytes) / rate if rate else None

    def _tell(self) -> None:
        rate, eta_s = self._meter.rate, self.eta_s
        if self.style == "json":
            event = {"event": "progress", "command": self._name, "done_bytes": self.done_bytes,
                     "total_bytes": self._total_bytes, "rate": rate, "eta_s": eta_s}
            print(json.dumps(event), file=sys.stderr, flush=True)
        elif self.style == "lines":
            text = f"{self._name}: {size_text(self.done_bytes)} of {size_text(self._total_bytes)}"
            if rate is not None and eta_s is not None:
                text += f" at {size_text(rate)}/s, {eta_s:.0f} s left"
            print(text, file=sys.stderr, flush=True)
        elif self._bar is not None:
            speed = f"{size_text(rate)}/s" if rate else ""
            left = f"{eta_s:.0f} s left" if eta_s is not None else ""
            self._bar.update(self._task, completed=self.done_bytes, speed=speed, left=left)

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                        DownloadColumn(binary_units=True), TextColumn("{task.fields[speed]}"),
                        TextColumn("{task.fields[left]}"), console=Console(stderr=True), auto_refresh=True)
        self._task = self._bar.add_task(self._name, total=self._total_bytes or 1, speed="", left="")
        self._bar.start()
