"""What an operator has run before and after a switch-over."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tapcore.errors import ReplicationError

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 60.0


@dataclass
class Hooks:
    """Executables, called with the name of each disk and the address of its replica. One that fails before the
    switch stops the sync; one that fails after it is told, and changes nothing. What was done before it is undone
    if the guest goes on here."""

    before_switch: str | None = None
    after_switch: str | None = None
    undo_switch: str | None = None
    is_undone: bool = True


    def before(self, disks: Mapping[str, str]) -> None:
        if self.before_switch is not None and (failure := _run(self.before_switch, disks)):
            raise ReplicationError(f"the hook before the switch-over {failure}", path=self.before_switch,
                                   hint="the guest goes on here")
        self.is_undone = False

    def undo(self, disks: Mapping[str, str]) -> None:
        if self.is_undone:
            return
        self.is_undone = True
        if self.undo_switch is not None and (failure := _run(self.undo_switch, disks)):
            logger.error("%s: the hook for a guest that goes on here %s", self.undo_switch, failure)

    def after(self, disks: Mapping[str, str]) -> None:
        self.is_undone = True
        if self.after_switch is not None and (failure := _run(self.after_switch, disks)):
            logger.error("%s: the hook after the switch-over %s", self.after_switch, failure)


def _run(hook: str, disks: Mapping[str, str]) -> str | None:
    """What went wrong, if anything did."""
    words = [word for pair in disks.items() for word in pair]
    told = {"WRITELOG_DISK": " ".join(disks), "WRITELOG_REPLICA": " ".join(disks.values())}
    try:
        code = subprocess.run([hook, *words], stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False,
                              env=os.environ | told).returncode
    except OSError as error:
        return f"cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_S:g} s"
    return f"ended with {code}" if code else None
