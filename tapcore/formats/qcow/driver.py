"""qcow: the driver: open and the fast paths. The rest is `QcowWriter`'s and the shared reader's."""

from __future__ import annotations

import errno
from array import array
from typing import ClassVar

from tapcore.driver import DiskInfo, Feature, ParentId
from tapcore.errors import ImageError
from tapcore.formats.extents import from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import parent_of
from tapcore.formats.qcow.changes import QcowWriter
from tapcore.formats.qcow.layout import Header, load_header
from tapcore.formats.qcow.mapping import Mapping
from tapcore.formats.writable import WritableDriver
from tapcore.params import path_params
from tapcore.request import Request


class QcowDriver(WritableDriver):
    """One qcow image."""

    mapping: Mapping
    writer: QcowWriter
    repair_hint: ClassVar[str] = "look at it with td-img check"

    def open(self) -> None:
        """UsageError for bad parameters; ImageError if the image is not valid, not supported, or in use."""
        _, self.path = path_params(self.name, self.params)
        file = self.file_kind.open(self.path, self.flags)
        try:
            self._open(file)
        except BaseException:
            file.close()
            raise

    def _open(self, file: ImageFile) -> None:
        self.header = header = load_header(file)
        if not file.read_only and (header.is_xen or file.is_device):
            what = "has tapdisk's second header" if header.is_xen else "is on a block device"
            raise ImageError(f"{what}: it is read-only here", errno=errno.EOPNOTSUPP, path=file.path,
                             hint="open it read-only, or convert it with td-img convert")
        mapping = Mapping(header, load_l1(file, header))
        mapping.file_bytes = file.size_bytes
        self.start_reading(file, mapping)
        if not file.read_only:
            self.start_writing(QcowWriter(self))
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        self.info = DiskInfo(header.size, features, preferred_block_bytes=header.cluster_bytes,
                             read_only=file.read_only)

    def get_parent_id(self) -> ParentId | None:
        if self.header.backing_file is None:
            return None
        assert self.path is not None
        return parent_of(self.path, self.header.backing_file, self.header.backing_format, self.env.reach)

    def closing(self) -> None:
        self.writer.tail.fill()

    # Verbs

    def queue_read(self, request: Request) -> bool:
        if self._reads_inline and not request.flags:
            host = self.mapping.place(request.offset, request.length)
            if host >= 0 and self.file.read_inline(request.iov, host, request.length, self._read_flags):
                return True
        return super().queue_read(request)

    def queue_write(self, request: Request) -> bool:
        if self.writable and not request.flags and not self.distrusted:
            length = request.length
            host = self.mapping.place(request.offset, length)
            if host >= 0 and self.watch.allows(length) and self.file.write_inline(request.iov, host) == length:
                return True
        return super().queue_write(request)


def load_l1(file: ImageFile, header: Header) -> array[int]:
    data = file.load(header.l1_table_offset, 8 * header.l1_size, "the L1 table")
    l1 = from_big_endian("Q", data)
    if header.l1_is_little_endian:
        l1.byteswap()
    return l1
