"""vmdk: VMware's image format, read and written.

Use: vmdk:/vm/disk.vmdk
     log:|vmdk:/vm/overlay.vmdk

Options: none. The path begins with '/' or '.'; it is that of the image, or of the descriptor where the disk's data
is in other files (-s001.vmdk, -flat.vmdk …).

Read and written: monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, vmfs; headers of
versions 1 to 3, grains marked as zero. Only read: streamOptimized (td-img convert writes them), vmfsSparse.
Extents are files in the image's folder: a descriptor that names one elsewhere, also by a symbolic link, is
refused.

The parent, found by parentFileNameHint, is opened read-only below. It must be a VMDK with the content ID (CID)
that the image knows of it; one that was written since is refused, unless td-img rebase -u accepts it as it is. The
image's own CID is changed, durably, before the first write after an open.

Tables are written at a flush, the redundant ones first, in an order that leaves at most unused grains after a
crash or power loss. An extent that was not closed gets its redundant tables brought in step. Memory for tables is
bounded: 8 MiB for each extent, beside the directory.

An extent that was cut short is not written before td-img check --repair.

Limits: grains up to 2 MiB, directories up to 4 MiB, 4096 extents, descriptors up to 1 MiB. Refused: SESPARSE, raw
devices and other types of extents, encrypted images, writing where changed blocks are tracked (changeTrackPath).
Without grains marked as zero (zeroed_grain=on) zeroes are written where a parent has data, and discard leaves what
the image does not have. What a discard frees is used again until the image is closed; later td-img check --repair
finds it.
"""

from __future__ import annotations

from tapcore.formats.vmdk.driver import VmdkDriver


class Vmdk(VmdkDriver):
    name = "vmdk"
