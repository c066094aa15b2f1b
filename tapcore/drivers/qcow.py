"""qcow: QEMU's first copy-on-write format, version 1, read and written.

Use: qcow:/vm/disk.qcow
     log:|qcow:/vm/overlay.qcow

Options: none. The path begins with '/' or '.'. A backing file is opened read-only below; a relative name is looked
up in the image's folder. The format has no place for the backing file's format: images that are made here say it
behind the name, where other programs do not look. Where it is not said the file is looked at, and refused if it
leads to further files.

Read: clusters of 512 bytes to 64 KiB, compressed clusters (deflate), backing files of any format with a driver
here, also shorter than the image.
Written: clusters and tables are added at the end of the file; those given up by discard are used again, and their
space returned. Write-zeroes and discard are done by the mapping where no backing file shows; elsewhere zeroes are
written, and discard zeroes what the image has itself.

Tables are written at a flush, L2 before L1, so that a crash or power loss leaves unused clusters at most. Memory
for them is bounded: 32 MiB beside the L1 table, whatever the disk's size.

Limits: encrypted images (AES) are refused. tapdisk's variant for Xen (a second header, an L1 table that may be
little-endian) is read-only, as are images on block devices. L1 tables up to 32 MiB: disks of up to 8 TiB with
clusters of 4 KiB. The size is a multiple of 512 bytes. Clusters that are unused when the image is opened stay
unused, and take space until td-img check --repair; so does a compressed cluster's place when it is overwritten.
Over a backing file QEMU writes an image rightly only if its clusters have 512 bytes; so td-img makes no others.
"""

from __future__ import annotations

from tapcore.formats.qcow.driver import QcowDriver


class Qcow(QcowDriver):
    name = "qcow"
