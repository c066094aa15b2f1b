"""The rate cap of a sync, or of the syncs of a group: what they send together holds it."""

from __future__ import annotations

import threading
import time

from tapcore.bucket import Bucket


class Cap:
    """Lets no more than `rate` bytes a second through; None: as much as there is. Each sync has a thread of its
    own."""

    def __init__(self, rate: float | None) -> None:
        self._lock = threading.Lock()
        self._bucket: Bucket | None = None
        self.set_rate(rate)

    def set_rate(self, rate: float | None) -> None:
        now_s = time.monotonic()
        with self._lock:
            if rate is None or self._bucket is None:
                self._bucket = None if rate is None else Bucket(rate, now_s)
            else:
                self._bucket.set_rate(rate, now_s)

    @property
    def waits_s(self) -> float:
        """Until something may be sent; 0 if it may."""
        if self._bucket is None:
            return 0.0
        with self._lock:
            return 0.0 if self._bucket is None else self._bucket.wait_s(time.monotonic())

    def take(self, amount: int) -> None:
        """So much is being sent; a negative amount was not sent after all."""
        if self._bucket is None:
            return
        with self._lock:
            if self._bucket is not None:
                self._bucket.take(amount)
