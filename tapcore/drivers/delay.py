"""delay: requests take longer, to see what happens while they are on their way.

Use: delay:all=10|aio:/vm/disk.img
     delay:read=5,write=20,jitter=3,seed=7|aio:/vm/disk.img

Options:
    read=MS, write=MS, flush=MS, discard=MS, zeroes=MS, status=MS
                how many milliseconds such a request waits, default as `all`
    all=MS      how many those wait that are not named, default 0
    jitter=MS   up to this many more, at random, default 0
    seed=N      of the random numbers, default 0

A request waits here first and goes down then: a write that is delayed has not happened until it has, and what was
queued later can overtake it. One whose op has neither delay nor jitter goes straight down. From Python
`delays_s[op]` and `jitter_s` can be changed at any time.

Limits: for tests. Every request costs a timer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from tapcore import params
from tapcore.driver import Env, Filter, OpenFlag
from tapcore.request import OP_NAMES, Request


class Delay(Filter):
    name = "delay"

    def __init__(self, env: Env, params_text: str, flags: OpenFlag) -> None:
        """UsageError for a bad option."""
        super().__init__(env, params_text, flags)
        given = params.options(self.name, params_text, (*OP_NAMES, "all", "jitter", "seed"))
        common_ms = params.decimal("all", given.get("all", "0"))
        self.delays_s = [(params.decimal(name, given[name]) if name in given else common_ms) / 1000
                         for name in OP_NAMES]
        self.jitter_s = params.decimal("jitter", given.get("jitter", "0")) / 1000
        self.random = random.Random(params.whole("seed", given.get("seed", "0")))

    def _wait(self, request: Request, verb: Callable[[Request], bool]) -> bool:
        delay_s = self.delays_s[request.op]
        if self.jitter_s:
            delay_s += self.random.uniform(0, self.jitter_s)
        if not delay_s:
            return verb(request)
        self.env.loop.call_later(delay_s, partial(self._go_on, request, verb))
        return False

    def _go_on(self, request: Request, verb: Callable[[Request], bool]) -> None:
        if verb(request):
            request.done(request)
        else:
            self.next.submit()

    def queue_read(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_read)

    def queue_write(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_write)

    def queue_flush(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_flush)

    def queue_discard(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_discard)

    def queue_zeroes(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_zeroes)

    def queue_status(self, request: Request) -> bool:
        return self._wait(request, self.next.queue_status)
