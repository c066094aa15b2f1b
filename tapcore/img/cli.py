"""`td-img`: makes, looks at, converts and changes disk images."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from tapcore.errors import UsageError, WritelogError
from tapcore.formats.tools import ImageTools, find_tools, format_name
from tapcore.img import commands
from tapcore.img.commands import EXIT_ERROR, EXIT_TROUBLE, EXIT_USAGE
from tapcore.params import size_bytes

Command = Callable[[argparse.Namespace], int]

MINUS = re.compile(r"-[0-9]+[KMGT]?", re.IGNORECASE)

ABOUT = """\
IMAGE is a file, of the format that -f says or that it looks like, or a chain as tapdisk takes it
(nbd:unix:/run/vm1.nbd, log:|qcow2:/vm/disk.qcow2). A file's name with a colon in it is written ./name:1.
SIZE and BYTES are numbers of bytes, or with K, M, G or T. An image that others use is refused, with their names.
Backing files are opened wherever images name them, or only in their own folders and in $TAPDISK_BACKING_DIRS
(DIR[:DIR...]), if that is set.

exit codes: 0 done, 1 an error (one line on standard error), 2 wrong usage; compare and check have more
"""
EXAMPLES = """
examples:
  td-img create disk.qcow2 20G
  td-img info --backing-chain overlay.qcow2
  td-img convert --progress disk.vmdk disk.qcow2
  td-img compare disk.vmdk disk.qcow2
"""
CREATE = """
The format is what -f says, else what the name ends with (.qcow2, .qcow, .vhd, .vmdk), else raw. PATH must not
exist. BACKING is written into the image as it is (x:1 as ./x:1): a relative path counts from the folder of PATH.

examples:
  td-img create disk.img 10G                                   sparse
  td-img create -o cluster_size=2M,lazy_refcounts=on disk.qcow2 1T
  td-img create -b base.qcow2 -F qcow2 overlay.qcow2           of the size of its backing
"""
INFO = """
examples:
  td-img info disk.qcow2
  td-img --json info --backing-chain overlay.qcow2
  td-img info nbd+unix:///vm1?socket=/run/vm1.nbd
"""
CHECK = """
exit codes: 0 nothing is wrong, 1 it could not be checked, 2 errors were found (or wrong usage), 3 only leaks

examples:
  td-img check disk.qcow2
  td-img check --repair disk.qcow2
"""
MAP = """
examples:
  td-img map overlay.qcow2                   which image of the chain each part is from
  td-img map --json --offset 1G --length 1M disk.qcow2
"""
CONVERT = """
The target's format is what -O says, else what the name ends with, else raw. It appears when it is whole: a
convert that fails or is killed leaves nothing of that name. Zeroes take no space in it. A chain, a block device,
and with -n any image, is written where it is, and zeroed behind the source's end.

examples:
  td-img convert disk.vmdk disk.qcow2
  td-img convert --progress -O vhd -o variant=fixed disk.qcow2 disk.vhd
  td-img convert -c -o compression=zstd disk.img disk.qcow2
  td-img convert -c disk.qcow2 disk.vmdk                       streamOptimized
  td-img convert nbd:unix:/run/vm1.nbd copy.qcow2
  td-img convert disk.qcow2 /dev/vg/disk
"""
COMPARE = """
Disks of different size are equal if the longer one is zero behind the end of the other.

exit codes: 0 equal, 1 different, 2 they could not be compared

examples:
  td-img compare disk.vmdk disk.qcow2
  td-img compare disk.qcow2 nbd:unix:/run/copy.nbd
"""
SNAPSHOT = """
These snapshots are inside a qcow2 image, which must not be in use.

examples:
  td-img snapshot -l disk.qcow2
  td-img snapshot -c before-upgrade disk.qcow2
  td-img snapshot -a before-upgrade disk.qcow2       the disk is what it was; what it is now is lost
  td-img snapshot -d before-upgrade disk.qcow2
"""
COMMIT = """
The overlay stays as it is, and right, until the backing is durable; with --delete it is removed then. Other
overlays on the same backing show something else afterwards: there must be none that is needed. A VMDK overlay
whose commit was cut off says that its parent was changed; rebase --unsafe to that parent makes it valid again.

examples:
  td-img commit --progress overlay.qcow2
  td-img commit --delete overlay.qcow2
"""
REBASE = """
BACKING is written into the image as it is: a relative path counts from the image's folder. What the image shows
does not change: where the new backing differs from the old one, data is copied first. With --unsafe nothing is
looked at.

examples:
  td-img rebase -b /vm/base2.qcow2 -F qcow2 overlay.qcow2
  td-img rebase -b '' overlay.qcow2                          without a backing: all is copied
  td-img rebase --unsafe -b /moved/base.qcow2 -F qcow2 overlay.qcow2
"""
RESIZE = """
What is added reads as zeroes. The file systems in it are not looked at.

examples:
  td-img resize disk.qcow2 20G
  td-img resize disk.qcow2 +512M
  td-img resize --shrink disk.qcow2 -1G
"""
READ = """
examples:
  td-img read disk.qcow2 --length 512 | xxd               the first sector
  td-img read disk.qcow2 --offset 1M --length 1G --file part.img
"""
WRITE = """
Without --length all of the input is written. It is durable when the command ends.

examples:
  td-img write disk.qcow2 --offset 1M --file part.img
  gunzip < disk.img.gz | td-img write disk.qcow2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run("td-img", lambda: options.command(options), EXIT_TROUBLE if options.command is commands.compare
               else EXIT_ERROR)


def run(program: str, command: Callable[[], int], trouble: int = EXIT_ERROR) -> int:
    """Carry out a command of `program`; the exit code, `trouble` if it failed, which is told in one line."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    logging.basicConfig(format=f"{program}: %(message)s", level=logging.WARNING)
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return trouble
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (WritelogError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return trouble
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return trouble


def number_bytes(text: str) -> int:
    """An argument that is a number of bytes."""
    try:
        return size_bytes("number", text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="td-img", description="Make, look at, convert and change disk images.",
                                     epilog=ABOUT + EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands_parser = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, command: Command, text: str, epilog: str, image: str | None = "image",
            **defaults: object) -> argparse.ArgumentParser:
        sub = commands_parser.add_parser(name, help=text, description=text, epilog=ABOUT + epilog,
                                         parents=[shared], formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("-f", "--format", metavar="FMT", help="the image's format (default: what it looks like)")
        if image is not None:
            sub.add_argument(image, metavar="IMAGE")
        sub.set_defaults(command=command, **defaults)
        return sub

    _add_making(add)
    _add_copying(add)
    _add_changing(add)
    # A space keeps -1G from being taken for an option.
    return parser.parse_args([f" {text}" if MINUS.fullmatch(text) else text for text in arguments])


def _format_options() -> str:
    """For create's help: the options of every format."""
    find_tools("raw")
    lines = ["", "options (-o):"]
    for tools in sorted(ImageTools.registry.values(), key=lambda tools: tools.name):
        lines += [f"  {format_name(tools.name):6}  {name}: {text}" for name, text in tools.options.items()]
    return "\n".join(lines) + "\n"


Add = Callable[..., argparse.ArgumentParser]


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is, on standard error")


def _add_backing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("-b", "--backing", metavar="BACKING", required=required, help="the backing file")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="its format")


def _add_making(add: Add) -> None:
    create = add("create", commands.create, "Make an empty image.", _format_options() + CREATE, None)
    create.add_argument("path", metavar="PATH")
    create.add_argument("size", metavar="SIZE", nargs="?", help="(default: that of the backing file)")
    create.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE,…",
                        help="options of the format")
    _add_backing(create, required=False)
    info = add("info", commands.info, "Show what an image is. It may be in use.", INFO)
    info.add_argument("--backing-chain", action="store_true", help="and all that are below it")
    check = add("check", commands.check, "Look for errors in an image.", CHECK)
    check.add_argument("-r", "--repair", action="store_true", help="put right what can be without loss")
    mapping = add("map", commands.show_map, "Show which parts of a disk are data, zeroes and holes.", MAP)
    mapping.add_argument("--offset", type=number_bytes, default=0, metavar="BYTES")
    mapping.add_argument("--length", type=number_bytes, metavar="BYTES")


def _add_copying(add: Add) -> None:
    convert = add("convert", commands.convert, "Copy a disk into an image of any format.", CONVERT, "source")
    convert.add_argument("target", metavar="TARGET")
    convert.add_argument("-O", "--target-format", metavar="FMT", help="the target's format")
    convert.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE,…",
                         help="options of the target's format, as for create")
    convert.add_argument("-n", "--existing", action="store_true", help="write into an image that exists")
    convert.add_argument("--force", action="store_true",
                         help="replace a file that exists when the new one is whole")
    convert.add_argument("-c", "--compress", action="store_true", help="write it compressed")
    _add_progress(convert)
    compare = add("compare", commands.compare, "Tell whether two disks have the same content.", COMPARE, "one")
    compare.add_argument("other", metavar="OTHER")
    compare.add_argument("-F", "--other-format", metavar="FMT", help="the other's format")
    compare.add_argument("-s", "--strict", action="store_true", help="sizes must be equal too")
    compare.add_argument("-q", "--quiet", action="store_true", help="the exit code says it")
    _add_progress(compare)
    commit = add("commit", commands.commit, "Copy an overlay into its backing.", COMMIT)
    commit.add_argument("-d", "--delete", action="store_true", help="remove the overlay when that is durable")
    _add_progress(commit)
    rebase = add("rebase", commands.rebase, "Give an image another backing.", REBASE)
    _add_backing(rebase, required=True)
    rebase.add_argument("-u", "--unsafe", action="store_true", help="only change what the image says")
    _add_progress(rebase)


def _add_changing(add: Add) -> None:
    resize = add("resize", commands.resize, "Give a disk another size.", RESIZE)
    resize.add_argument("size", metavar="[+|-]SIZE")
    resize.add_argument("--shrink", action="store_true", help="it may become smaller: what is behind is lost")
    snapshot = add("snapshot", commands.snapshot, "List, take, apply and delete snapshots inside an image.",
                   SNAPSHOT)
    which = snapshot.add_mutually_exclusive_group()
    which.add_argument("-l", "--list", action="store_true", help="(what is done without another option)")
    which.add_argument("-c", "--create", metavar="NAME", help="take one")
    which.add_argument("-a", "--apply", metavar="NAME", help="make the disk what it was then")
    which.add_argument("-d", "--delete", metavar="NAME", help="delete one")
    read = add("read", commands.read, "Read a range of a disk.", READ)
    read.add_argument("--offset", type=number_bytes, default=0, metavar="BYTES")
    read.add_argument("--length", type=number_bytes, metavar="BYTES", help="(default: up to the end)")
    read.add_argument("--file", default=commands.STDIO, help="where to (default: standard output)")
    _add_progress(read)
    write = add("write", commands.write, "Write a range of a disk.", WRITE)
    write.add_argument("--offset", type=number_bytes, default=0, metavar="BYTES")
    write.add_argument("--length", type=number_bytes, metavar="BYTES", help="(default: all of the input)")
    write.add_argument("--file", default=commands.STDIO, help="where from (default: standard input)")
    _add_progress(write)


if __name__ == "__main__":
    sys.exit(main())
