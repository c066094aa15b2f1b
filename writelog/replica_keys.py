"""The keys of a replica that runs: looked at anew again and again, so that none has to be restarted for them.

A peer that is not known any more loses its connection; this host's new key, after `writelog pair rotate --finish`,
is that of the connections to come, as soon as there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tapcore.driver import Env
from tapcore.errors import WritelogError
from tapcore.loop import Timer
from writelog.keyring import Keys

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.5


@dataclass(frozen=True)
class KeySource:
    """`own()` is this host's pair; `knows(public key)` whether a peer is let in. Both read files."""

    own: Callable[[], Keys]
    knows: Callable[[bytes], bool]


class KeyWatch:
    """`client` is the public key of the sync that is connected, if one is. `use(keys)` has new connections made
    with them, or returns False if it is not the time; `drop()` ends the connection of the sync."""

    def __init__(self, env: Env, keys: Keys, source: KeySource, use: Callable[[Keys], bool],
                 drop: Callable[[], None]) -> None:
        self.client = b""
        self.source = source
        self._env = env
        self._keys = keys
        self._use = use
        self._drop = drop
        self._has_failed = False
        self._timer: Timer | None = None

    def start(self) -> None:
        self._timer = self._env.loop.call_later(LOOK_S, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        client = self.client
        seen: list[tuple[Keys, bool]] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                seen.append((self.source.own(), not client or self.source.knows(client)))
            except (WritelogError, OSError) as error:
                failed.append(error)

        def done() -> None:
            if self._timer is None:
                return
            if failed and not self._has_failed:
                logger.error("the keys cannot be looked at, and stay as they are: %s", failed[0])
            self._has_failed = bool(failed)
            for keys, is_known in seen:
                if not is_known and client == self.client:
                    self._drop()
                if keys != self._keys and self._use(keys):
                    self._keys = keys
            self.start()

        self._env.workers.submit(work, done)
