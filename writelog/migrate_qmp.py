"""A QEMU's monitor: commands that wait for their answer, and events. The protocol is the library's, `qemu.qmp`.

Protocol: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.util import get_or_create_event_loop

from tapcore.errors import ReplicationError, UsageError

T = TypeVar("T")

ANSWER_S: Final = 10.0
"""Longest wait for an answer. QEMU gives it at once, unless it waits for a disk."""
CLOSE_S: Final = 1.0
MIN_WAIT_S: Final = 0.0005
"""The library takes events in while it is waited for, no matter how long."""
ADDRESS_HINT: Final = "write it like unix:/run/vm.qmp or tcp:127.0.0.1:4444"


class MonitorError(ReplicationError):
    """QEMU refused a command, or its monitor is gone."""


class Refusal(MonitorError):
    """QEMU answered a command with an error."""


class Silence(MonitorError):
    """QEMU has not answered a command, and may yet: it waits for a disk maybe, or for a link."""


def parse_monitor(text: str) -> str | tuple[str, int]:
    """Where `text`, an option of the command line, says that the monitor is: a path, or (host, port)."""
    kind, _, place = text.partition(":")
    host, _, port = place.rpartition(":")
    if kind == "unix" and place:
        return place
    if kind == "tcp" and host and port.isdecimal() and int(port) < 1 << 16:
        return host.strip("[]"), int(port)
    raise UsageError(f"{text!r} is no address of a monitor", hint=ADDRESS_HINT)


class Monitor:
    """Connects at once. MonitorError, from every method, if the monitor cannot be reached or does not answer. Used
    by one thread."""

    def __init__(self, text: str) -> None:
        self.name = text
        self.answer_s = ANSWER_S
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it knows is in the exceptions, too
        self._loop = get_or_create_event_loop()
        self._connect()

    def _connect(self) -> None:
        self._client = QMPClient()
        self._events = EventListener()
        self._client.register_listener(self._events)
        try:
            self._wait(self._client.connect(parse_monitor(self.name)), ANSWER_S)
        except (QMPError, OSError, EOFError) as error:
            cause = getattr(error, "exc", error)
            raise self._error(f"cannot connect to the monitor: {getattr(cause, 'strerror', None) or cause}",
                              "is QEMU running, with -qmp, and does no other program use this monitor?") from None
        except TimeoutError:
            raise self._error(f"no greeting came within {ANSWER_S:g} s",
                              "QEMU serves one client at a time; and it says nothing while it waits for a disk: "
                              "at a waiting replica give the device a geometry (cyls=,heads=,secs=)") from None

    def close(self) -> None:
        with contextlib.suppress(Exception):  # of a connection that is of no use any more
            self._wait(self._client.disconnect(), CLOSE_S)

    def reconnect(self) -> None:
        """Give the connection up for a new one: what happened in between is told by no event."""
        self.close()
        self._connect()

    def call(self, command: str, **arguments: object) -> Any:
        """The answer to a command. Refusal if it is an error."""
        try:
            return self._wait(self._client.execute(command, arguments), self.answer_s)
        except ExecuteError as error:
            raise Refusal(f"{self.name}: QEMU refused {command}: {error}") from None
        except TimeoutError:
            raise Silence(f"{self.name}: QEMU did not answer {command} within {self.answer_s:g} s") from None
        except (QMPError, OSError, EOFError):
            raise self._gone() from None

    def yank(self) -> None:
        """Break the connection of QEMU's migration off. It is heard even if QEMU waits for a link that carries
        nothing, and answers to nothing else. MonitorError if not, as by a QEMU older than 6.0."""
        try:
            self._wait(self._client.execute("yank", {"instances": [{"type": "migration"}]}, oob=True),
                       self.answer_s)
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise self._error(f"QEMU's migration cannot be broken off: {error}") from None

    def events(self, wait_s: float) -> list[tuple[str, dict[str, Any]]]:
        """(name, data) of what has happened since the last call; waits for something, but no longer than this."""
        found = []
        with contextlib.suppress(TimeoutError):
            found.append(self._wait(self._events.get(), max(wait_s, MIN_WAIT_S)))
        found += self._events.clear()
        if not found and self._client.runstate is not Runstate.RUNNING:
            raise self._gone()
        return [(str(event["event"]), data if isinstance(data := event.get("data"), dict) else {})
                for event in found]

    def _gone(self) -> MonitorError:
        return self._error("the monitor is gone: QEMU has ended, or its connection has")

    def _error(self, message: str, hint: str | None = None) -> MonitorError:
        return MonitorError(f"{self.name}: {message}", hint=hint)

    def _wait(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        """What `work` returns. TimeoutError if that takes longer."""
        task = self._loop.create_task(work)
        timer = self._loop.call_later(limit_s, task.cancel)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            if task.done() and task.cancelled():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
