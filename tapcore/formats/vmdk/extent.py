"""vmdk: one sparse extent, a file with a grain directory, as a driver."""

from __future__ import annotations

import errno
from array import array

from tapcore.driver import SECTOR_BYTES, DiskInfo, Driver, Env, Feature, OpenFlag
from tapcore.errors import ImageError
from tapcore.formats.concat import Window
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vmdk.layout import Header
from tapcore.formats.vmdk.load import load_directory
from tapcore.formats.vmdk.mapping import Mapping
from tapcore.formats.vmdk.tables import mark_open, prepare_for_writing
from tapcore.formats.vmdk.writer import VmdkWriter
from tapcore.formats.writable import WritableDriver
from tapcore.request import Request


class SparseExtent(WritableDriver):
    """The first `size_bytes` of the extent in `file`, which it closes; they begin at `start` of the disk."""

    repair_hint = "repair it with td-img check --repair"
    mapping: Mapping
    writer: VmdkWriter

    def __init__(
        self, env: Env, file: ImageFile, header: Header, flags: OpenFlag, start: int, size_bytes: int
    ) -> None:
        """ImageError if the directory cannot be read, or the extent cannot be written though it is to be."""
        super().__init__(env, file.path, flags)
        self.path = file.path
        self.header = header
        self.start = start
        self._is_marked = False
        redundant: array[int] | None = None
        if not file.read_only:
            _check_writable(file, header)
            directory, redundant = prepare_for_writing(file, header)
        else:
            directory = load_directory(file, header, header.gd_offset)
        self.start_reading(file, Mapping(header, directory, file.size_bytes))
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        self.info = DiskInfo(size_bytes, features, preferred_block_bytes=header.grain_bytes,
                             read_only=file.read_only)
        if not file.read_only:
            self.start_writing(VmdkWriter(self, redundant))

    def lie_over(self, backing: Driver | None) -> None:
        """`backing`, a whole disk, is what shows where this extent has nothing."""
        if backing is not None and self.start:
            inside = max(0, min(backing.info.size_bytes - self.start, self.info.size_bytes))
            backing = Window(backing, self.start, inside)
        self.backing = backing

    def mark_open(self) -> None:
        """Say in the header that the extent is being written, not yet durably. ImageError."""
        mark_open(self.file, True)
        self._is_marked = True

    def closing(self) -> None:
        self.writer.tail.fill()

    def closed(self) -> None:
        if self._is_marked:
            mark_open(self.file, False)
            self.file.sync_or_raise()

    # Fast paths

    def queue_read(self, request: Request) -> bool:
        if not request.flags and self._reads_inline:
            host = self._plain_place(request)
            if host and self.data.read_inline(request.iov, host, request.length, self._read_flags):
                return True
        return super().queue_read(request)

    def queue_write(self, request: Request) -> bool:
        if not request.flags and self.writable and not self.distrusted:
            host = self._plain_place(request)
            if (host and self.watch.allows(request.length)
                    and self.data.write_inline(request.iov, host) == request.length):
                return True
        return super().queue_write(request)

    def _plain_place(self, request: Request) -> int:
        """The place in the file of a request within one grain that has data, if its table is cached; else 0."""
        mapping = self.mapping
        offset = request.offset
        within = offset & mapping.unit_bytes - 1
        if within + request.length > mapping.unit_bytes or mapping.header.compressed:
            return 0
        table = mapping.tables.use(offset >> mapping.table_bits)
        if table is None:
            return 0
        entry = table[offset >> mapping.grain_bits & mapping.index_mask]
        if not mapping.first_sector <= entry < mapping.end_sector:
            return 0
        return entry * SECTOR_BYTES + within


def _check_writable(file: ImageFile, header: Header) -> None:
    if header.compressed:
        what = "its grains are compressed (streamOptimized): it is written once, from front to back"
    elif header.is_cowd:
        what = "a vmfsSparse extent is not written here"
    elif file.is_device:
        what = "a sparse extent on a block device cannot grow"
    else:
        return
    raise ImageError(what, path=file.path, errno=errno.EROFS,
                     hint="open the disk read-only, lay an overlay over it, or convert it with td-img convert")
