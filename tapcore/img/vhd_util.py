"""`vhd-util`: the tool of blktap for VHDs, with its option letters, over what td-img does.

    vhd-util create | snapshot | query | check | coalesce | resize | scan

What it prints for programs is as there. It ends with 0, 1 for an error and 2 for wrong usage; sizes are in MiB.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tapcore.errors import ImageError, UsageError, WritelogError
from tapcore.formats.tools import find_tools
from tapcore.formats.vhd.layout import MAX_DISK_BYTES
from tapcore.formats.vhd.tools import VhdTools
from tapcore.imagelock import refuse_readers
from tapcore.img import describe, layers
from tapcore.img.cli import run
from tapcore.img.commands import EXIT_ERROR, EXIT_OK, EXIT_USAGE
from tapcore.img.legacy import MIB, Arguments, named_from, parser_of
from tapcore.img.locate import file_image
from tapcore.img.progress import Progress, progress_style
from tapcore.img.session import Session

INDENT: Final = 3
"""Spaces by which scan -p sets a child in."""
NO_EFFECT: Final = "without effect"


def main(arguments: Arguments = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = ", ".join(VHD_COMMANDS)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: vhd-util COMMAND [-h | OPTIONS]\n\ncommands: {names}")
        return EXIT_OK if words else EXIT_USAGE
    if words[0] not in VHD_COMMANDS:
        print(f"vhd-util: unknown command {words[0]!r}; commands: {names}", file=sys.stderr)
        return EXIT_USAGE
    command, make_parser = VHD_COMMANDS[words[0]]
    options = make_parser(f"vhd-util {words[0]}").parse_args(words[1:])
    return run("vhd-util", lambda: command(options))


def _named(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("-n", dest="name", required=True, metavar="NAME", help="the image")
    return parser


def _create_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Make an empty VHD.", "-n disk.vhd -s 10240"))
    parser.add_argument("-s", dest="size", type=int, required=True, metavar="MB", help="its size")
    parser.add_argument("-r", dest="reserve", action="store_true", help="a fixed VHD")
    parser.add_argument("-S", dest="room", type=int, metavar="MB", help=f"{NO_EFFECT}: any size is possible")
    return parser


def _create(options: argparse.Namespace) -> int:
    VhdTools.create(options.name, options.size * MIB, options={"variant": "fixed"} if options.reserve else {})
    return EXIT_OK


def _snapshot_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Make an empty VHD over another.", "-n new.vhd -p disk.vhd"))
    parser.add_argument("-p", dest="parent", required=True, metavar="PARENT")
    parser.add_argument("-m", dest="raw", action="store_true", help="the parent is raw")
    parser.add_argument("-l", dest="limit", type=int, metavar="DEPTH", help="refuse to make a deeper chain")
    parser.add_argument("-e", dest="empty_too", action="store_true",
                        help="lie on PARENT itself even if it is empty, not on the first below that is not")
    parser.add_argument("-S", dest="room", type=int, metavar="MB", help=f"{NO_EFFECT}: any size is possible")
    return parser


def _snapshot(options: argparse.Namespace) -> int:
    driver = "aio" if options.raw else "vhd"
    with Session() as session:
        chain = describe.describe(session, file_image(options.parent, driver), backing_chain=True)
    while not options.raw and not options.empty_too and len(chain) > 1 and (
            chain[0]["details"]["blocks_allocated"] == 0):
        chain.pop(0)
    if options.limit is not None and len(chain) >= options.limit:
        raise UsageError(f"the chain would be {len(chain) + 1} images deep, more than {options.limit}")
    top = chain[0]
    parent = options.parent if len(chain) == 1 and options.raw else top["image"]
    VhdTools.create(options.name, top["size_bytes"],
                    backing=named_from(options.name, parent, find_tools(top["format"]).name))
    return EXIT_OK


def _query_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Show what a VHD is.", "-n disk.vhd -v -p"))
    for letter, text in (("v", "virtual size in MB"), ("s", "bytes of the file"), ("p", "parent"),
                         ("f", "whether it is hidden"), ("d", "depth of the chain"),
                         ("S", "the largest size in MB that it can be given")):
        parser.add_argument(f"-{letter}", dest=f"show_{letter}", action="store_true", help=text)
    return parser


def _query(options: argparse.Namespace) -> int:
    with Session() as session:
        chain = describe.describe(session, file_image(options.name, "vhd"), backing_chain=options.show_d)
    image = chain[0]
    if "backing_error" in image and (options.show_p or options.show_d):
        raise ImageError(image["backing_error"])
    if options.show_v:
        print(image["size_bytes"] // MIB)
    if options.show_s:
        print(Path(options.name).stat().st_size)
    if options.show_p:
        print(Path(image["backing"]).resolve() if "backing" in image else f"{options.name} has no parent")
    if options.show_f:
        print(f"hidden: {int(image['details']['hidden'])}")
    if options.show_d:
        print(f"chain depth: {len(chain)}")
    if options.show_S:
        print(MAX_DISK_BYTES // MIB)
    return EXIT_OK


def _check_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Look for errors in a VHD.", "-n disk.vhd -p"))
    parser.add_argument("-p", dest="parents", action="store_true", help="and in those below it")
    parser.add_argument("-i", "-b", "-t", dest="ignored", action="store_true",
                        help=f"{NO_EFFECT}: a missing footer is told, bitmaps are checked")
    return parser


def _check(options: argparse.Namespace) -> int:
    paths = [options.name]
    if options.parents:
        with Session() as session:
            chain = describe.describe(session, file_image(options.name, "vhd"), backing_chain=True)
        paths += [image["image"] for image in chain[1:] if image["format"] == "vhd"]
    status = EXIT_OK
    for path in paths:
        report = VhdTools.check(path)
        for message in report.messages:
            print(f"{path}: {message}")
        if report.errors:
            status = EXIT_ERROR
        else:
            print(f"{path} is valid")
    return status


def _coalesce_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Copy what a VHD has into its parent.", "-n top.vhd -p"))
    parser.add_argument("-p", dest="progress", action="store_true", help="show how far it is")
    parser.add_argument("-s", dest="sparse", action="store_true", help=f"{NO_EFFECT}: zeroes take no space")
    return parser


def _coalesce(options: argparse.Namespace) -> int:
    style = progress_style(wanted=options.progress, as_json=False)
    with Session() as session, Progress(style, "coalesce") as progress:
        layers.commit(session, file_image(options.name, "vhd"), progress)
    return EXIT_OK


def _resize_parser(program: str) -> argparse.ArgumentParser:
    parser = _named(parser_of(program, "Give a VHD another size.", "-n disk.vhd -s 20480"))
    parser.add_argument("-s", dest="size", type=int, required=True, metavar="MB")
    parser.add_argument("-j", dest="journal", metavar="FILE", help=f"{NO_EFFECT}: it cannot be left half done")
    parser.add_argument("-f", dest="fast", action="store_true", help=f"{NO_EFFECT}: it always is")
    parser.add_argument("--shrink", action="store_true", help="it may become smaller: what is behind is lost")
    return parser


def _resize(options: argparse.Namespace) -> int:
    refuse_readers(options.name)
    VhdTools.resize(options.name, options.size * MIB, shrink=options.shrink)
    return EXIT_OK


def _scan_parser(program: str) -> argparse.ArgumentParser:
    parser = parser_of(program, "Show one line for each VHD.", "-p -a -m '/vm/*.vhd'")
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("-m", dest="filter", metavar="PATTERN", help="and what this matches")
    parser.add_argument("-f", dest="fast", action="store_true", help="do not look for parents")
    parser.add_argument("-c", dest="go_on", action="store_true", help="go on after an error")
    parser.add_argument("-p", dest="pretty", action="store_true", help="as a tree, children under their parents")
    parser.add_argument("-a", dest="parents", action="store_true", help="parents too")
    parser.add_argument("-v", dest="verbose", action="store_true", help="whole paths")
    return parser


@dataclass
class _Scanned:
    path: str
    about: dict[str, Any]
    parent: str | None = None
    error: WritelogError | None = None

    def line(self, *, verbose: bool, note: str = "") -> str:
        if self.error is not None:
            return f"vhd={self.path} scan-error={self.error.errno} error-message='{self.error.message}'"
        name, parent = (path if verbose else Path(path).name for path in (self.path, self.parent or "none"))
        return (f"vhd={name} capacity={self.about['size_bytes']} size={Path(self.path).stat().st_size} "
                f"hidden={int(self.about['details']['hidden'])} parent={parent}{note}")


def _scan(options: argparse.Namespace) -> int:
    if not options.files and options.filter is None:
        raise UsageError("no file is named", hint="name some, or a pattern with -m")
    # Path.glob takes no absolute pattern.
    paths = sorted(glob.glob(options.filter)) if options.filter is not None else []  # noqa: PTH207
    paths += options.files
    found: dict[str, _Scanned] = {}
    for path in paths:
        image = _scan_one(path, options.fast and not options.pretty)
        found[str(Path(path).resolve())] = image
        if options.parents and image.parent is not None and str(Path(image.parent).resolve()) not in found:
            paths.append(image.parent)
        if not options.pretty:
            print(image.line(verbose=options.verbose))
        if image.error is not None and not options.go_on:
            break
    if options.pretty:
        _print_tree(found, options.verbose)
    return EXIT_ERROR if any(image.error for image in found.values()) and not options.go_on else EXIT_OK


def _scan_one(path: str, fast: bool) -> _Scanned:
    try:
        about = {"details": VhdTools.describe(path)}
        about["size_bytes"] = about["details"]["current_size"]
        parent = about["details"].get("parent_name" if fast else "backing")
        return _Scanned(path, about, parent)
    except WritelogError as error:
        return _Scanned(path, {}, error=error)


def _print_tree(found: dict[str, _Scanned], verbose: bool) -> None:
    children: dict[str | None, list[str]] = {}
    for key in sorted(found):
        parent = found[key].parent
        above = None if parent is None else str(Path(parent).resolve())
        children.setdefault(above if above in found else None, []).append(key)

    waiting = [(key, 0) for key in reversed(children.get(None, []))]
    while waiting:
        key, depth = waiting.pop()
        image = found[key]
        note = " (not found in scan)" if depth == 0 and image.parent is not None else ""
        print(" " * (INDENT * depth) + image.line(verbose=verbose, note=note))
        waiting += [(child, depth + 1) for child in reversed(children.get(key, []))]


Command = Callable[[argparse.Namespace], int]
MakeParser = Callable[[str], argparse.ArgumentParser]
VHD_COMMANDS: Final[dict[str, tuple[Command, MakeParser]]] = {
    "create": (_create, _create_parser), "snapshot": (_snapshot, _snapshot_parser),
    "query": (_query, _query_parser), "check": (_check, _check_parser),
    "coalesce": (_coalesce, _coalesce_parser), "resize": (_resize, _resize_parser), "scan": (_scan, _scan_parser),
}
