"""qcow2: QEMU's image format, versions 2 and 3, read and written.

Use: qcow2:/vm/disk.qcow2
     log:|qcow2:/vm/overlay.qcow2
     qcow2:data_file=/dev/vg/disk,/vm/disk.qcow2

Options: data_file=PATH: where the external data file is, of an image that has one; without it that must be in the
image's folder or below. The path begins with '/' or '.'. A backing file is opened read-only below; a relative name
is looked up in the image's folder. Its format is taken from the image; where the image does not say it, the file
is looked at, and refused if it leads to further files.

Read: zero clusters, compressed clusters (zlib, zstd), backing files of any format with a driver here, also shorter
than the image; images with internal snapshots, bitmaps, lazy refcounts, extended L2 entries (subclusters), or an
external data file (a relative name is looked up in the image's folder; by QEMU in that where it was started).
Written: clusters are allocated, and copied if a snapshot shares them (of an image with subclusters only those that
are touched); discard gives clusters and their space back; write-zeroes needs no data (version 3). The refcounts of
an image that was not closed (dirty bit) are rebuilt.
Refcounts are kept exactly, also where the image would allow them to be lazy. Bitmaps are marked as out of date
(autoclear bits), and their clusters stay in use until td-img check --repair.

Tables are written at a flush, in an order that leaves at most unused clusters after a crash or power loss. Memory
for them is bounded: about 50 MiB beside the L1 table and the refcount table, whatever the disk's size.

Limits: encrypted images (AES, LUKS) and unknown incompatible features are refused, as is writing to an image that
is marked corrupt. Version 2 cannot zero or discard by tables alone over a backing file: there zeroes are written
and discard changes nothing. Clusters up to 2 MiB, L1 table up to 32 MiB. An image whose tables are found to
contradict each other is not written any more. An image whose data file is elsewhere cannot be another's backing
file, and not be resized: an image from strangers must not make others read or write what it likes.
"""

from __future__ import annotations

from tapcore.formats.qcow2.driver import Qcow2Driver


class Qcow2(Qcow2Driver):
    name = "qcow2"
