"""vhd: the format of Virtual PC, Hyper-V, Azure and XenServer: fixed, dynamic and differencing, read and written.

Use: vhd:/vm/disk.vhd
     log:|vhd:/vm/child.vhd
     vhdsync:/vm/disk.vhd

Options: none. The path begins with '/' or '.'. The parent of a differencing image is opened read-only below: the
first file that its locators lead to (relative ones first, Windows' with their backslashes, drive letters left out;
last its name alone, in the image's folder) and that has the id that the image asks for. Without an id it is a raw
file, as XenServer has it. A parent that was modified since is only warned of.

vhdsync does the same with every call to the system in the loop's thread, one after the other.

Read: blocks of 64 KiB to 256 MiB, with a bitmap of sectors; a damaged or missing footer is taken from its copy at
the start, a damaged copy from the footer, and either is repaired by the first opening for writing; the old footer
of 511 bytes; XenServer's batmap, if its checksum is right. The size is taken from the geometry or from
current_size, by the program that made the image, as QEMU does.
Written: blocks are added at the end, their data aligned to 4 KiB. Discard gives space back to the file system, and
so does write-zeroes, which writes no data. The batmap is never wrong, and complete when the image was closed.

Bitmaps and BAT are written at a flush, in an order that leaves at most unused blocks at the end after a crash or
power loss. Memory is bounded: 16 MiB of bitmaps, and 5 bytes a block.

On a block device, as XenServer has them, blocks are added up to the footer at its end; then writes get ENOSPC.

Limits: disks up to 2040 GiB. An image whose BAT names places that are not in the file, or overlap, is not opened
for writing. A block that was once allocated stays. tapdisk's images of version 0.1 (bitmaps of another bit order)
are refused. XenServer's own tools want sizes that are multiples of 2 MiB.
"""

from __future__ import annotations

from dataclasses import replace

from tapcore.driver import Env, OpenFlag
from tapcore.formats.vhd.driver import VhdDriver
from tapcore.workers import Workers


class Vhd(VhdDriver):
    name = "vhd"


class VhdSync(VhdDriver):
    name = "vhdsync"

    def __init__(self, env: Env, params: str, flags: OpenFlag) -> None:
        super().__init__(replace(env, workers=Workers(env.loop, 0)), params, flags)
