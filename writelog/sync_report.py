"""What a sync tells while it runs and when it is done: one changing line, some lines, or JSON events."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TextIO

from tapcore.text import size_text

JSON_INTERVAL_S: Final = 0.5
LINE_INTERVAL_S: Final = 2.0
TTY_INTERVAL_S: Final = 0.2

CONNECTING, SYNCING, STALLED, CONVERGING = "connecting", "syncing", "stalled", "converging"
SWITCHING, DONE, FAILED = "switching", "done", "failed"
IN_SYNC, PAUSED, VERIFYING = "in sync", "paused", "verifying"


@dataclass
class Progress:
    """Where a sync is. Rates in bytes a second; None for what is not known."""

    elapsed_s: float
    sent_bytes: int
    zero_bytes: int
    remaining_bytes: int
    rate: float | None
    dirty_rate: float
    pause_s: float
    """What the switch-over would take now."""
    eta_s: float | None
    equal_bytes: int = 0
    """That the replica had already."""
    best_pause_s: float | None = None
    """What it is predicted to come down to."""
    rate_cap: float | None = None
    write_limit: float | None = None
    """What the guest may write, if it is slowed down."""

    def __str__(self) -> str:
        text = f"sent {size_text(self.sent_bytes)}"
        if self.equal_bytes:
            text = f"equal {size_text(self.equal_bytes)}, {text}"
        if self.rate is not None:
            text += f" at {size_text(self.rate)}/s"
        text += f", remaining {size_text(self.remaining_bytes)}"
        if self.dirty_rate:
            text += f", the guest dirties {size_text(self.dirty_rate)}/s"
        if self.write_limit is not None:
            text += f" (slowed down to {size_text(self.write_limit)}/s)"
        if self.rate is None:
            return text
        return text + (", which is more than is sent" if self.eta_s is None else f", {self.eta_s:.0f} s left")


@dataclass
class Report:
    """What a finished sync has done. `pause_parts_s` are the parts of the guest's pause, in their order."""

    disk: str
    replica: str
    size_bytes: int
    session: str = ""
    base: str = ""
    """The name of the copy."""
    handed_over: bool = False
    export: str = ""
    verified: bool = False
    digest: str = ""
    """Of the last connection's extents, equal at both ends."""
    elapsed_s: float = 0.0
    sent_bytes: int = 0
    zero_bytes: int = 0
    equal_bytes: int = 0
    """Not sent, because the replica had them already."""
    wire_bytes: int = 0
    """What was sent, as compression has left it, and digests of what was compared."""
    extra_bytes: int = 0
    """Sent after the first pass over the disk, because the guest wrote."""
    connections: int = 0
    resumed: bool = False
    """The replica had a former state of this disk: only what had changed was sent."""
    epoch: int = 0
    """The last instant of the disk that the replica was asked to keep a copy of, by its count; 0: none."""
    pause_s: float = 0.0
    pause_parts_s: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        first_bytes = self.sent_bytes - self.extra_bytes
        extra_percent = 100 * self.extra_bytes / first_bytes if first_bytes else 0.0
        parts = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in self.pause_parts_s.items())
        rate = self.sent_bytes / self.elapsed_s if self.elapsed_s else 0
        outcome = "handed over" if self.handed_over else "the replica has a consistent copy; the disk stays here"
        packed = f", compressed to {size_text(self.wire_bytes)}" if self.wire_bytes < self.sent_bytes else ""
        export = f", its export is at {self.export}" if self.export else ""
        equal = f", {size_text(self.equal_bytes)} found equal at the replica" if self.equal_bytes else ""
        return [
            f"{self.disk} -> {self.replica}: {outcome}{export}",
            f"  disk   {size_text(self.size_bytes)}, of which {size_text(self.zero_bytes)} holes and zeroes"
            + equal,
            f"  sent   {size_text(self.sent_bytes)} in {self.elapsed_s:.1f} s, {size_text(rate)}/s{packed}",
            f"  extra  {size_text(self.extra_bytes)} sent again (+{extra_percent:.1f} %)",
            f"  pause  {self.pause_s * 1000:.1f} ms: {parts}",
            f"  digest {self.digest}" + (", whole disks compared: equal" if self.verified else ""),
        ]


class Reporter:
    """`style` is "json", "tty" or "plain"; events go to `out` (standard output). `program` is who tells."""

    def __init__(self, style: str, out: TextIO | None = None, program: str = "writelog-sync") -> None:
        self._program = program
        self._style = style
        self._out = out or sys.stdout
        self._silent = False
        self._state = ""
        self._told_s = 0.0
        self._interval_s = {"json": JSON_INTERVAL_S, "tty": TTY_INTERVAL_S}.get(style, LINE_INTERVAL_S)
        self._live: Any = None

    @property
    def current(self) -> str:
        """The state that was entered last."""
        return self._state

    def state(self, state: str, detail: str = "") -> None:
        """Enter a state; told at once if it is another one."""
        if state == self._state and not detail:
            return
        self._state = state
        if self._style == "json":
            self._event(detail=detail) if detail else self._event()
        elif self._style == "plain" or detail:
            self._line(f"{state}: {detail}" if detail else state)

    def progress(self, progress: Progress) -> None:
        """Tell where the sync is, if it is time."""
        self.tell(lambda: asdict(progress), lambda: str(progress))

    def tell(self, figures: Callable[[], dict[str, Any]], text: Callable[[], str]) -> None:
        """Tell figures, to a program or to people, if it is time."""
        now_s = time.monotonic()
        if now_s - self._told_s < self._interval_s:
            return
        self._told_s = now_s
        if self._style == "json":
            self._event(**figures())
        elif self._style == "tty":
            self._update(f"{self._state}: {text()}")
        else:
            self._line(f"{self._state}: {text()}")

    def end(self, figures: dict[str, Any], lines: list[str]) -> None:
        """It is done: tell the figures, or the lines for people."""
        self._state = DONE
        self.close()
        if self._style == "json":
            self._event(**figures)
        else:
            for line in lines:
                self._line(line)

    def failed(self, error: str) -> None:
        """The caller prints the error; this ends the event stream."""
        self._state = FAILED
        self.close()
        if self._style == "json":
            self._event(error=error)

    def close(self) -> None:
        """Leave the terminal as it was."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def _event(self, **figures: Any) -> None:
        self._line(json.dumps({"state": self._state, "time": round(time.time(), 3), **figures}))

    def _line(self, text: str) -> None:
        if self._silent:
            return
        try:
            print(text, file=self._out, flush=True)
        except OSError as error:
            self._silent = True
            with contextlib.suppress(OSError):
                self._fall_silent(error)

    def _fall_silent(self, error: OSError) -> None:
        """Nobody reads any more, or there is no room: that must not end a sync, least of all a hand-over."""
        if self._out is sys.stdout:
            # What is stuck in its buffer goes nowhere, instead of failing once more when the program ends.
            null_fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_fd, sys.stdout.fileno())
            os.close(null_fd)
        print(f"{self._program}: cannot report any more, but goes on: {error.strerror}", file=sys.stderr)

    def _update(self, text: str) -> None:
        if self._silent:
            return
        try:
            self._show(text)
        except OSError as error:
            self._silent = True
            self.close()
            with contextlib.suppress(OSError):
                self._fall_silent(error)

    def _show(self, text: str) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._out, highlight=False, markup=False)
            self._live = Live(console=console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(text, refresh=True)
