"""info and map: what an image is, and where what of it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tapcore.chain import Chain
from tapcore.driver import Driver, OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.tools import find_tools, format_name
from tapcore.img.layers import DEPTH_SHIFT, mark_depths
from tapcore.img.locate import Image
from tapcore.img.session import Session, Task, ended_well
from tapcore.request import STATUS, STATUS_HOLE, STATUS_ZERO, Request

LOOK = OpenFlag.RDONLY | OpenFlag.QUERY
"""How an image is opened that is described: it may be in use."""
MAX_STATUS_BYTES = 1 << 30


def describe(session: Session, image: Image, *, backing_chain: bool = False) -> list[dict[str, Any]]:
    """One description of the image, or with `backing_chain` of it and all below. Nothing is locked: a running disk
    can be described."""
    chain = session.open(image.chain, LOOK)
    images = mark_depths(chain)
    found = [_describe_one(driver, images[number + 1 :]) for number, driver in enumerate(images)]
    session.close(chain)
    return found if backing_chain else found[:1]


def _describe_one(driver: Driver, below: list[Driver]) -> dict[str, Any]:
    about: dict[str, Any] = {"image": driver.path or f"{driver.name}:{driver.params}",
                             "format": format_name(driver.name), "size_bytes": driver.info.size_bytes}
    if driver.path is not None and Path(driver.path).is_file():
        about["disk_bytes"] = os.stat(driver.path).st_blocks * 512  # noqa: PTH116
    if below:
        about["backing"] = below[0].path or below[0].params
        about["backing_format"] = format_name(below[0].name)
    try:
        tools = find_tools(driver.name)
    except UsageError:
        return about
    if driver.path is not None:
        details = tools.describe(driver.path)
        if details:
            about["details"] = details
    return about


def extents(session: Session, chain: Chain, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """The parts of a disk that have something in common, in order; `depth` counts the images above the one that
    a part is from."""
    images = mark_depths(chain)
    found: list[tuple[int, int]] = []
    offset = start

    def look() -> Task:
        request = Request(STATUS, offset, min(stop - offset, MAX_STATUS_BYTES))
        yield [(chain.head, request)]
        ended_well(request, chain.text)
        found[:] = request.extents

    held: dict[str, Any] | None = None
    while offset < stop:
        session.run([look()])
        for length, state in found:
            part = _extent(offset, length, state, images)
            offset += length
            if held is not None and all(held[key] == part[key] for key in ("depth", "hole", "zero")):
                held["length"] += length
                continue
            if held is not None:
                yield held
            held = part
    if held is not None:
        yield held


def _extent(offset: int, length: int, state: int, images: list[Driver]) -> dict[str, Any]:
    depth = state >> DEPTH_SHIFT
    image = images[depth]
    return {"offset": offset, "length": length, "depth": depth, "hole": bool(state & STATUS_HOLE),
            "zero": bool(state & STATUS_ZERO), "image": image.path or f"{image.name}:{image.params}"}
