"""info and map: what an image is, and where what of it lies."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tapcore.chain import MAX_PARENT_DEPTH, Chain
from tapcore.driver import Driver, OpenFlag, ParentId, find_driver
from tapcore.errors import ImageError, UsageError, WritelogError
from tapcore.formats.tools import find_tools, format_name
from tapcore.img.layers import DEPTH_SHIFT, mark_depths, same_file
from tapcore.img.locate import Image
from tapcore.img.session import Session, Task, ended_well
from tapcore.request import STATUS, STATUS_HOLE, STATUS_ZERO, Request

LOOK = OpenFlag.RDONLY | OpenFlag.QUERY
"""How an image is opened that is described: it may be in use."""
MAX_STATUS_BYTES = 1 << 30


def describe(session: Session, image: Image, *, backing_chain: bool = False) -> list[dict[str, Any]]:
    """One description of the image, or with `backing_chain` of it and all below. Nothing is locked: a running disk
    can be described; and each is opened alone: a backing file that is missing hides nothing else. ImageError, of
    a chain also if it is a loop."""
    if image.path is None:
        chain = session.open(image.chain, LOOK)
        about = _describe_one(chain.leaf)
        session.close(chain)
        return [about]
    level: ParentId | None = ParentId(image.driver, image.path)
    found: list[dict[str, Any]] = []
    while level is not None and len(found) <= MAX_PARENT_DEPTH:
        driver = find_driver(level.driver)(session.env, level.params, LOOK)
        driver.open()
        try:
            about = _describe_one(driver)
            try:
                level = driver.get_parent_id()
            except WritelogError as error:
                level = None
                about["backing_error"] = str(error)
        finally:
            driver.close()
        if level is not None:
            about |= {"backing": level.params, "backing_format": format_name(level.driver)}
        found.append(about)
        if not backing_chain:
            break
        if level is not None and any(same_file(level.params, one["image"]) for one in found):
            raise ImageError(f"its chain of parents is a loop: {about['image']} leads back to {level.params}",
                             errno=errno.ELOOP, path=image.path, hint="give it another backing: td-img rebase -u")
    return found


def _describe_one(driver: Driver) -> dict[str, Any]:
    about: dict[str, Any] = {"image": driver.path or f"{driver.name}:{driver.params}",
                             "format": format_name(driver.name), "size_bytes": driver.info.size_bytes}
    if driver.path is None:
        return about
    if Path(driver.path).is_file():
        about["disk_bytes"] = Path(driver.path).stat().st_blocks * 512
    try:
        details = find_tools(driver.name).describe(driver.path)
    except UsageError:
        return about
    return about | {"details": details} if details else about


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
