"""The few words of QMP that a mirror job needs.

Specification: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from tools.benchmarks.processes import RunFailed


class Qmp:
    """A connection to the monitor at `path`. Nothing waits beyond `deadline_s` of time.monotonic()."""

    def __init__(self, path: Path, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._receive()
        self.call("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def call(self, command: str, /, **arguments: Any) -> Any:
        """What a command returns; RunFailed if it fails."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._receive()
            if "error" in message:
                raise RunFailed(f"QEMU: {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def wait(self, *names: str) -> dict[str, Any]:
        """The next event of one of these names; those before it are dropped."""
        while True:
            message = self._events.pop(0) if self._events else self._receive()
            if message.get("event") in names:
                return message

    def _receive(self) -> dict[str, Any]:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise RunFailed("not done in time")
        self._socket.settimeout(left_s)
        try:
            line = self._file.readline()
        except TimeoutError:
            raise RunFailed("not done in time") from None
        if not line:
            raise RunFailed("QEMU ended")
        message: dict[str, Any] = json.loads(line)
        return message
