"""td-img's commands: from parsed options to what is printed, and the exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tapcore.driver import OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.probe import look
from tapcore.formats.qcow2 import snapshots
from tapcore.formats.tools import Backing, ImageTools, format_name
from tapcore.imagelock import refuse_readers
from tapcore.img import compare as comparing
from tapcore.img import convert as converting
from tapcore.img import describe as describing
from tapcore.img import layers, ranges
from tapcore.img.copy import Disk
from tapcore.img.locate import Image, file_image, format_of, is_chain, locate
from tapcore.img.progress import Progress, progress_style
from tapcore.img.session import Session
from tapcore.params import options as parse_options
from tapcore.params import size_bytes
from tapcore.text import size_text

EXIT_OK: Final = 0
EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_DIFFERENT: Final = 1
EXIT_TROUBLE: Final = 2
EXIT_DAMAGED: Final = 2
EXIT_LEAKS: Final = 3

STDIO: Final = "-"


def say(options: argparse.Namespace, about: Any, *lines: str) -> None:
    """What a command has to tell: as JSON if that is wanted, else the lines."""
    if options.json:
        print(json.dumps(about))
    elif not getattr(options, "quiet", False):
        for line in lines:
            print(line)


def progress_of(options: argparse.Namespace, name: str) -> Progress:
    return Progress(progress_style(wanted=options.progress, as_json=options.json), name)


def create_options(tools: type[ImageTools], texts: list[str]) -> dict[str, str]:
    """-o as often as it was given. UsageError for an option that the format has not."""
    return parse_options(format_name(tools.name), ",".join(texts), tuple(tools.options))


def backing_of(image: str, text: str, chosen: str | None) -> tuple[Image, Backing]:
    """The backing that an image at `image` names as `text`: absolute, or relative to the image's folder.
    UsageError if its format has to be said."""
    path = str(Path(image).parent / text)
    if not Path(path).exists():
        hint = f"a relative path counts from the folder of {image}"
        raise UsageError(f"there is no backing file {path}", hint=hint)
    if chosen is None and look(path).leads_on:
        raise UsageError(f"{path} looks like an image that leads to other files, or is a raw disk whose guest "
                         "wrote that", hint="say its format with -F")
    found = locate(path if path.startswith("/") else f"./{path}", chosen)
    # In front of a colon others see a protocol, and this program would refuse the name.
    name = f"./{text}" if ":" in text.partition("/")[0] else text
    return found, Backing(name, found.driver)


def create(options: argparse.Namespace) -> int:
    tools = format_of(options.path, options.format)
    chosen = create_options(tools, options.option)
    size = None if options.size is None else size_bytes("size", options.size)
    backing = None
    if options.backing is not None:
        found, backing = backing_of(options.path, options.backing, options.backing_format)
        with Session() as session:
            # Opened as the new image will open it; what cannot be is refused before there is an image.
            base_bytes = session.open(found.chain, layers.BELOW).info.size_bytes
        size = base_bytes if size is None else size
    elif options.backing_format is not None:
        raise UsageError("-F says the format of a backing file, and there is none", hint="name it with -b")
    if size is None:
        raise UsageError("the size is missing", hint="for example: td-img create disk.qcow2 10G")
    tools.create(options.path, size, backing=backing, options=chosen)
    about = {"image": options.path, "format": format_name(tools.name), "size_bytes": size,
             "backing": backing.path if backing else None}
    over = f" over {backing.path}" if backing else ""
    say(options, about, f"{options.path}: {format_name(tools.name)}, {size_text(size)}{over}")
    return EXIT_OK


def info(options: argparse.Namespace) -> int:
    with Session() as session:
        image = locate(options.image, options.format)
        found = describing.describe(session, image, backing_chain=options.backing_chain)
    if options.json:
        print(json.dumps(found if options.backing_chain else found[0]))
        return EXIT_OK
    for number, about in enumerate(found):
        if number:
            print()
        for line in _info_lines(about):
            print(line)
    return EXIT_OK


def _info_lines(about: dict[str, Any]) -> Iterator[str]:
    yield f"image    {about['image']}"
    yield f"format   {about['format']}"
    yield f"size     {size_text(about['size_bytes'])} ({about['size_bytes']} bytes)"
    if "disk_bytes" in about:
        yield f"on disk  {size_text(about['disk_bytes'])}"
    if "backing" in about:
        yield f"backing  {about['backing']} ({about['backing_format']})"
    if "backing_error" in about:
        yield f"backing  {about['backing_error']}"
    for name, value in about.get("details", {}).items():
        if isinstance(value, list | dict):
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = ("no", "yes")[value] if isinstance(value, bool) else value
        yield f"  {name.replace('_', ' ')}: {text}"


def check(options: argparse.Namespace) -> int:
    image = locate(options.image, options.format)
    if options.repair:
        refuse_readers(image.file)
    report = image.tools.check(image.file, repair=options.repair)
    units = f"{report.errors} errors, {report.leaks} leaks"
    repaired = f", {report.repaired} repaired" if options.repair else ""
    verdict = "no errors" if not report.errors and not report.leaks else units
    say(options, {"image": str(image), "format": format_name(image.driver), **asdict(report)},
        *report.messages, f"{image}: {verdict}{repaired}")
    return EXIT_DAMAGED if report.errors else EXIT_LEAKS if report.leaks else EXIT_OK


def show_map(options: argparse.Namespace) -> int:
    with Session() as session:
        image = locate(options.image, options.format)
        chain = session.open(image.chain, OpenFlag.RDONLY)
        length = ranges.check_range(Disk(chain.head, str(image)), options.offset, options.length)
        found = describing.extents(session, chain, options.offset, options.offset + length)
        if options.json:
            print(json.dumps({"image": str(image), "extents": list(found)}))
            return EXIT_OK
        print(f"{'OFFSET':>16} {'LENGTH':>16}  {'STATE':<10}  IMAGE")
        for extent in found:
            names = ", ".join(name for name in ("hole", "zero") if extent[name]) or "data"
            print(f"{extent['offset']:16} {extent['length']:16}  {names:<10}  {extent['image']}")
    return EXIT_OK


def convert(options: argparse.Namespace) -> int:
    with Session() as session, progress_of(options, "convert") as progress:
        source = locate(options.source, options.format, follows=True)
        result = _convert(session, source, options, progress)
    rate = result.data_bytes / result.elapsed_s if result.elapsed_s else 0
    read = f", {size_text(result.data_bytes)} of data at {size_text(rate)}/s" if result.data_bytes else ""
    say(options, asdict(result), f"{result.target}: {size_text(result.size_bytes)}{read}")
    return EXIT_OK


def _convert(
    session: Session, source: Image, options: argparse.Namespace, progress: Progress
) -> converting.Result:
    path = options.target
    if options.existing or is_chain(path) or converting.is_block_device(path):
        if options.option or options.compress or options.force:
            raise UsageError(f"{path} is written as it is", hint="-o, -c and --force are for a new file")
        if converting.is_block_device(path) and options.target_format is None:
            target = file_image(path, "aio")
        else:
            target = locate(path, options.target_format)
        return converting.convert_into(session, source, target, progress)
    tools = format_of(path, options.target_format)
    chosen = create_options(tools, options.option)
    return converting.convert_to_new(session, source, path, tools, progress, options=chosen,
                                     compress=options.compress, replace=options.force)


def compare(options: argparse.Namespace) -> int:
    with Session() as session, progress_of(options, "compare") as progress:
        images = [locate(options.one, options.format, follows=True),
                  locate(options.other, options.other_format, follows=True)]
        disks = [Disk(session.open(image.chain, OpenFlag.RDONLY).head, str(image)) for image in images]
        sizes = [disk.driver.info.size_bytes for disk in disks]
        comparison = comparing.Comparison(session, disks[0], disks[1], progress)
        if progress.is_on:
            progress.start(sum(converting.count_data(session, walk) for walk in comparison.walks()))
        offset = None if options.strict and sizes[0] != sizes[1] else comparison.run()
    if offset is None:
        about: dict[str, Any] = {"equal": False, "offset": None}
        text = f"the sizes differ: {sizes[0]} and {sizes[1]} bytes"
    elif offset == comparing.NOWHERE:
        about = {"equal": True, "offset": None}
        text = "equal" if sizes[0] == sizes[1] else "equal, but for zeroes at the end of the longer one"
    else:
        about = {"equal": False, "offset": offset}
        text = f"they differ, first at byte {offset}"
    say(options, about | {"size_bytes": sizes}, text)
    return EXIT_OK if about["equal"] else EXIT_DIFFERENT


def commit(options: argparse.Namespace) -> int:
    with Session() as session, progress_of(options, "commit") as progress:
        image = locate(options.image, options.format)
        done = layers.commit(session, image, progress)
    if options.delete:
        Path(image.file).unlink()
    rest = "" if options.delete else f"; {image} can be removed if nothing lies on it"
    say(options, asdict(done), f"{image} is committed to {done.backing}{rest}")
    return EXIT_OK


def rebase(options: argparse.Namespace) -> int:
    image = locate(options.image, options.format)
    found = backing = None
    if options.backing and options.unsafe and options.backing_format is not None:
        # Nothing is looked at: the backing may not be there yet.
        backing = Backing(options.backing, format_of("", options.backing_format).name)
    elif options.backing:
        found, backing = backing_of(image.file, options.backing, options.backing_format)
    if options.unsafe:
        refuse_readers(image.file)
        image.tools.set_backing(image.file, backing)
        done = layers.Rebased(str(image), backing.path if backing else None, 0)
    else:
        with Session() as session, progress_of(options, "rebase") as progress:
            done = layers.rebase(session, image, backing, found, progress)
    copied = f", {size_text(done.copied_bytes)} copied" if done.copied_bytes else ""
    say(options, asdict(done), f"{image}: backing {done.backing or 'none'}{copied}")
    return EXIT_OK


def resize(options: argparse.Namespace) -> int:
    image = locate(options.image, options.format)
    text = options.size.strip()
    size = size_bytes("size", text.lstrip("+-"))
    if text[:1] in "+-":
        with Session() as session:
            now_bytes = session.open(image.chain, describing.LOOK).info.size_bytes
        size = now_bytes + size if text[0] == "+" else now_bytes - size
        if size < 0:
            raise UsageError(f"{image} has {now_bytes} bytes: so much cannot be taken away")
    refuse_readers(image.file)
    image.tools.resize(image.file, size, shrink=options.shrink)
    say(options, {"image": str(image), "size_bytes": size}, f"{image}: {size_text(size)}")
    return EXIT_OK


def snapshot(options: argparse.Namespace) -> int:
    image = locate(options.image, options.format)
    path = image.file
    if image.driver != "qcow2":
        raise UsageError(f"an image of the format {format_name(image.driver)} has no internal snapshots",
                         hint="td-img create -b makes an overlay, which is a snapshot in a file of its own")
    if options.create is not None or options.apply is not None or options.delete is not None:
        refuse_readers(path)
    if options.create is not None:
        taken = snapshots.create_snapshot(path, options.create)
        say(options, asdict(taken), f"snapshot {taken.id}, {taken.name}")
    elif options.apply is not None:
        snapshots.apply_snapshot(path, options.apply)
        say(options, {"applied": options.apply}, f"{image} is as it was in {options.apply}")
    elif options.delete is not None:
        snapshots.delete_snapshot(path, options.delete)
        say(options, {"deleted": options.delete}, f"snapshot {options.delete} is deleted")
    else:
        found = snapshots.list_snapshots(path)
        lines = [f"{one.id:>4}  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.date_s))}  "
                 f"{size_text(one.disk_bytes):>10}  {one.name}" for one in found]
        say(options, [asdict(one) for one in found], f"{'ID':>4}  {'TAKEN':<19}  {'SIZE':>10}  NAME", *lines)
    return EXIT_OK


@contextmanager
def _descriptor(path: str, flags: int) -> Iterator[int]:
    """Of a file, or of standard input or output for "-"."""
    if path == STDIO:
        yield (sys.stdout if flags & os.O_WRONLY else sys.stdin).fileno()
        return
    is_new = not os.path.lexists(path)
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    except BaseException:
        if is_new:
            Path(path).unlink()
        raise
    finally:
        os.close(fd)


def read(options: argparse.Namespace) -> int:
    with Session() as session, progress_of(options, "read") as progress:
        image = locate(options.image, options.format, follows=True)
        disk = Disk(session.open(image.chain, OpenFlag.RDONLY).head, str(image))
        length = ranges.check_range(disk, options.offset, options.length)
        if options.file == STDIO and sys.stdout.isatty():
            raise UsageError("a disk's bytes would go to the terminal", hint="name a file with --file, or a pipe")
        with _descriptor(options.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            ranges.read_range(session, disk, options.offset, length, fd, progress)
    if options.file != STDIO:
        say(options, {"offset": options.offset, "length": length}, f"{size_text(length)} read")
    return EXIT_OK


def write(options: argparse.Namespace) -> int:
    with Session() as session, progress_of(options, "write") as progress:
        image = locate(options.image, options.format)
        chain = session.open(image.chain)
        disk = Disk(chain.head, str(image))
        with _descriptor(options.file, os.O_RDONLY) as fd:
            done = ranges.write_range(session, disk, options.offset, options.length, fd, progress)
        session.close(chain)
    say(options, {"offset": options.offset, "length": done}, f"{size_text(done)} written")
    return EXIT_OK
