"""The tools of blktap under their names, with their option letters, over what td-img does.

    qcow-create, img2qcow, qcow2raw
    tapdisk-stream, tapdisk-diff
    vhd-util                            in vhd_util.py

They end with 0, 1 for an error and 2 for wrong usage; sizes are in MiB and counts in sectors, as there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tapcore.driver import SECTOR_BYTES, OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.tools import Backing, find_tools
from tapcore.img import convert, ranges
from tapcore.img.cli import run
from tapcore.img.commands import EXIT_ERROR, EXIT_OK
from tapcore.img.compare import NOWHERE, Comparison
from tapcore.img.copy import Disk
from tapcore.img.locate import Image, file_image, locate
from tapcore.img.progress import Progress
from tapcore.img.session import Session

MIB: Final = 1 << 20

Arguments = Sequence[str] | None


def parser_of(program: str, text: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=program, description=text, epilog=f"example:\n  {program} {example}",
                                   formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def named_from(image: str, path: str, driver: str) -> Backing:
    """A backing that was named relative to the working folder, as `image` names it: relative to its own."""
    if Path(path).is_absolute():
        return Backing(path, driver)
    return Backing(os.path.relpath(Path(path).absolute(), Path(image).absolute().parent), driver)


# qcow

def qcow_create(arguments: Arguments = None) -> int:
    parser = parser_of("qcow-create", "Make an empty qcow image.", "10240 disk.qcow base.img")
    parser.add_argument("size", type=int, metavar="SIZE(MB)")
    parser.add_argument("path", metavar="FILENAME")
    parser.add_argument("backing", nargs="?", metavar="BACKING_FILENAME")
    options = parser.parse_args(arguments)

    def command() -> int:
        backing = None
        if options.backing is not None:
            backing = named_from(options.path, options.backing, locate(options.backing, follows=True).driver)
        find_tools("qcow").create(options.path, options.size * MIB, backing=backing)
        return EXIT_OK

    return run("qcow-create", command)


def img2qcow(arguments: Arguments = None) -> int:
    parser = parser_of("img2qcow", "Copy a raw disk into a new qcow image.", "disk.qcow disk.img")
    parser.add_argument("target", metavar="QCOW")
    parser.add_argument("source", metavar="SOURCE")
    options = parser.parse_args(arguments)

    def command() -> int:
        with Session() as session:
            convert.convert_to_new(session, file_image(options.source, "aio"), options.target, find_tools("qcow"),
                                   Progress(), options={})
        return EXIT_OK

    return run("img2qcow", command)


def qcow2raw(arguments: Arguments = None) -> int:
    parser = parser_of("qcow2raw", "Copy a qcow image, or one of any format, into a raw disk.",
                       "disk.img disk.qcow")
    parser.add_argument("target", metavar="TARGET", help="a block device, or a new file")
    parser.add_argument("source", metavar="SOURCE")
    options = parser.parse_args(arguments)

    def command() -> int:
        with Session() as session:
            source = locate(options.source, follows=True)
            if convert.is_block_device(options.target):
                convert.convert_into(session, source, file_image(options.target, "aio"), Progress())
            else:
                convert.convert_to_new(session, source, options.target, find_tools("raw"), Progress(), options={})
        return EXIT_OK

    return run("qcow2raw", command)


# tapdisk-stream, tapdisk-diff

def _opened(session: Session, text: str) -> Disk:
    image: Image = locate(text, follows=True)
    return Disk(session.open(image.chain, OpenFlag.RDONLY).head, str(image))


def tapdisk_stream(arguments: Arguments = None) -> int:
    parser = parser_of("tapdisk-stream", "Write a disk's content to standard output.",
                       "-n vhd:/vm/disk.vhd | md5sum")
    parser.add_argument("-n", dest="name", required=True, metavar="TYPE:PATH", help="a chain, or an image")
    parser.add_argument("-c", dest="count", type=int, metavar="SECTORS", help="so many (default: all)")
    parser.add_argument("-s", dest="skip", type=int, default=0, metavar="SECTORS", help="from there on")
    options = parser.parse_args(arguments)

    def command() -> int:
        with Session() as session:
            disk = _opened(session, options.name)
            start = options.skip * SECTOR_BYTES
            length = None if options.count is None else options.count * SECTOR_BYTES
            length = ranges.check_range(disk, start, length)
            ranges.read_range(session, disk, start, length, sys.stdout.fileno(), Progress())
        return EXIT_OK

    return run("tapdisk-stream", command)


def tapdisk_diff(arguments: Arguments = None) -> int:
    parser = parser_of("tapdisk-diff", "Tell whether two disks have the same content: exit code 0 if they have, 1 "
                       "if not.", "-n vhd:/vm/a.vhd -m vhd:/vm/b.vhd")
    parser.add_argument("-n", dest="one", required=True, metavar="TYPE:PATH")
    parser.add_argument("-m", dest="other", required=True, metavar="TYPE:PATH")
    options = parser.parse_args(arguments)

    def command() -> int:
        with Session() as session:
            one, other = _opened(session, options.one), _opened(session, options.other)
            sizes = [disk.driver.info.size_bytes for disk in (one, other)]
            if sizes[0] != sizes[1]:
                raise ImageError(f"the sizes differ: {sizes[0]} and {sizes[1]} bytes")
            offset = Comparison(session, one, other, Progress()).run()
        if offset != NOWHERE:
            print(f"mismatch at sector {offset // SECTOR_BYTES}", file=sys.stderr)
            return EXIT_ERROR
        return EXIT_OK

    return run("tapdisk-diff", command)
