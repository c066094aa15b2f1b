"""error: requests fail as told, to see what those above do then.

Use: error:|aio:/vm/disk.img                                       every request fails with EIO
     error:op=write,errno=ENOSPC,count=3,after=10|aio:/vm/disk.img
     error:op=read+write,offset=1M-2M,p=0.1,seed=7|ram:1G

Options:
    op=NAME[+NAME…]  which: read, write, flush, discard, zeroes, status; default all but status
    errno=NAME       with what, default EIO
    offset=A-B       only those that touch the bytes from A up to, not including, B
    after=N          the first N that could fail do not
    count=N          no more than N fail
    p=PROBABILITY    each of the others fails with this probability, from 0 to 1, default 1
    seed=N           of the random numbers, default 0

A request that fails changes nothing and never reaches the level below. For several rules, stack levels:
error:…|error:…|aio:…  From Python the attributes with these meanings can be changed at any time; `failed` counts.

Limits: for tests.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

from tapcore import params
from tapcore.driver import Env, Filter, OpenFlag
from tapcore.errors import UsageError
from tapcore.request import DISCARD, FLUSH, OP_NAMES, READ, WRITE, ZEROES, Request, fail


class Error(Filter):
    name = "error"

    def __init__(self, env: Env, params_text: str, flags: OpenFlag) -> None:
        """UsageError for a bad option."""
        super().__init__(env, params_text, flags)
        given = params.options(self.name, params_text, ("op", "errno", "offset", "after", "count", "p", "seed"))
        self.ops = _ops(given["op"]) if "op" in given else frozenset({READ, WRITE, FLUSH, DISCARD, ZEROES})
        self.errno = _errno(given.get("errno", "EIO"))
        self.first_offset = 0
        self.end_offset: int | None = None
        if "offset" in given:
            self.first_offset, self.end_offset = _range(given["offset"])
        self.after = params.whole("after", given.get("after", "0"))
        self.count = params.whole("count", given["count"]) if "count" in given else None
        self.probability = params.decimal("p", given.get("p", "1"))
        if self.probability > 1:
            raise UsageError(f"p {given['p']!r} is more than 1", hint="for example p=0.1")
        self.random = random.Random(params.whole("seed", given.get("seed", "0")))
        self.failed = 0

    def _strikes(self, request: Request) -> bool:
        """Does this one fail?"""
        if request.op not in self.ops or self.count == 0:
            return False
        if self.end_offset is not None and (
                request.offset >= self.end_offset or request.offset + request.length <= self.first_offset):
            return False
        if self.after:
            self.after -= 1
            return False
        if self.probability < 1 and self.random.random() >= self.probability:
            return False
        if self.count is not None:
            self.count -= 1
        self.failed += 1
        return True

    def _pass(self, request: Request, verb: Callable[[Request], bool]) -> bool:
        return fail(request, self.errno) if self._strikes(request) else verb(request)

    def queue_read(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_read)

    def queue_write(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_write)

    def queue_flush(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_flush)

    def queue_discard(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_discard)

    def queue_zeroes(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_zeroes)

    def queue_status(self, request: Request) -> bool:
        return self._pass(request, self.next.queue_status)


def _ops(text: str) -> frozenset[int]:
    names = text.split("+")
    unknown = [name for name in names if name not in OP_NAMES]
    if unknown:
        raise UsageError(f"unknown op {unknown[0]!r}", hint=f"ops: {', '.join(OP_NAMES)}, joined by '+'")
    return frozenset(OP_NAMES.index(name) for name in names)


def _errno(name: str) -> int:
    code = getattr(errno, name, None) if name.startswith("E") else None
    if not isinstance(code, int):
        raise UsageError(f"unknown errno {name!r}", hint="a name such as EIO or ENOSPC")
    return code


def _range(text: str) -> tuple[int, int]:
    first, dash, end = text.partition("-")
    if not dash:
        raise UsageError(f"offset {text!r} is not a range", hint="for example offset=1M-2M")
    first_offset, end_offset = params.size_bytes("offset", first), params.size_bytes("offset", end)
    if first_offset >= end_offset:
        raise UsageError(f"offset {text!r} is an empty range", hint="the second number is the first byte beyond")
    return first_offset, end_offset
