"""What a convert leaves of the target, and when it is durable."""

from __future__ import annotations

import pytest

from tapcore.drivers.ram import Ram
from tapcore.img.convert import convert_into
from tapcore.img.locate import Image
from tapcore.img.progress import Progress
from tapcore.img.session import Session
from tapcore.request import FLUSH, ZEROES, Request


def test_the_zeroes_behind_the_source_are_flushed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    flush, zeroes = Ram.queue_flush, Ram.queue_zeroes

    def record_flush(driver: Ram, request: Request) -> bool:
        seen.append((FLUSH, 0))
        return flush(driver, request)

    def record_zeroes(driver: Ram, request: Request) -> bool:
        seen.append((ZEROES, request.offset))
        return zeroes(driver, request)

    monkeypatch.setattr(Ram, "queue_flush", record_flush)
    monkeypatch.setattr(Ram, "queue_zeroes", record_zeroes)
    with Session() as session:
        convert_into(session, Image("ram:1M"), Image("ram:2M"), Progress())
    assert (ZEROES, 1 << 20) in seen and seen[-1] == (FLUSH, 0)
