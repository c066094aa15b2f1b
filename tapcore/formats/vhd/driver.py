"""VHD: the driver: open and repair, the fast paths, close. The rest is `VhdWriter`'s and the shared reader's."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import ClassVar

from tapcore.driver import DiskInfo, Driver, Feature, OpenFlag, ParentId
from tapcore.errors import ChainError, ImageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.vhd.changes import FixedWriter, VhdWriter
from tapcore.formats.vhd.layout import (
    DIFFERENCING,
    EPOCH_S,
    FIXED,
    NO_ID,
    SECTOR_BYTES,
    SHORT_FOOTER_BYTES,
    Image,
)
from tapcore.formats.vhd.load import (
    batmap_writes,
    end_of_blocks,
    find_overlaps,
    find_parent,
    load_full_blocks,
    load_image,
    load_table,
)
from tapcore.formats.vhd.mapping import FixedMapping, Mapping
from tapcore.formats.writable import WritableDriver
from tapcore.params import path_params
from tapcore.request import Request

logger = logging.getLogger(__name__)


class VhdDriver(WritableDriver):
    """One VHD image."""

    mapping: Mapping | FixedMapping
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
        self.image = image = load_image(file)
        if image.footer.disk_type == FIXED:
            self.start_reading(file, FixedMapping())
            if not file.read_only:
                self.start_writing(FixedWriter(self))
        else:
            self._open_blocks(file, image)
        for damage in image.damages:
            logger.warning("%s: done without %s", file.path, damage)
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        self.info = DiskInfo(image.size_bytes, features, preferred_block_bytes=4096, read_only=file.read_only)

    def _open_blocks(self, file: ImageFile, image: Image) -> None:
        assert image.header is not None
        table = load_table(file, image)
        full = load_full_blocks(file, image)
        if image.damages and self.flags & OpenFlag.STRICT:
            raise ImageError(f"is damaged: {'; '.join(image.damages)}", errno=errno.EINVAL, path=file.path,
                             hint="repair it with td-img check --repair")
        if not file.read_only:
            faults = find_overlaps(image, table, image.end_bytes)
            if faults:
                raise ImageError(faults[0], errno=errno.EINVAL, path=file.path, offset=image.header.table_offset,
                                 hint="look at it with td-img check; it can be opened read-only")
        mapping = Mapping(image.header, table, full, image.end_bytes)
        self.start_reading(file, mapping)
        if not file.read_only:
            end = end_of_blocks(image, table) if file.is_device else image.end_bytes
            self.start_writing(VhdWriter(self, mapping, image, bytearray(full), end))

    def begin(self) -> None:
        if self.writable and isinstance(self.mapping, Mapping):
            repair_copies(self.file, self.image, self.mapping.full)

    def get_parent_id(self) -> ParentId | None:
        if self.image.footer.disk_type != DIFFERENCING:
            return None
        assert self.path is not None
        return find_parent(self.path, self.file, self.image, self.name, self.env.reach)

    def validate_parent(self, parent: Driver) -> None:
        header = self.image.header
        assert header is not None
        if header.parent_unique_id == NO_ID:
            return
        if not isinstance(parent, VhdDriver) or parent.image.footer.unique_id != header.parent_unique_id:
            raise ChainError(f"{parent.path} is not the parent of {self.path}: its id is another",
                             hint="restore the parent, or name another with td-img rebase")
        assert parent.path is not None
        modified_s = int(Path(parent.path).stat().st_mtime) - EPOCH_S
        if header.parent_time_stamp not in (0, modified_s & 0xFFFFFFFF):
            logger.warning("%s: its parent %s was modified after it was made", self.path, parent.path)

    def closed(self) -> None:
        """The batmap learns which blocks are full."""
        writer = self.writer
        if (isinstance(writer, VhdWriter) and self.image.batmap is not None
                and writer.in_batmap != writer.mapping.full):
            for offset, data in batmap_writes(self.image, writer.mapping.full):
                self.file.store(offset, data, "the batmap")
            self.file.sync_or_raise()

    # Verbs

    def queue_read(self, request: Request) -> bool:
        if self._reads_inline and not request.flags:
            host = self.mapping.place(request.offset, request.length)
            if host >= 0 and self.data.read_inline(request.iov, host, request.length, self._read_flags):
                return True
        return super().queue_read(request)

    def queue_write(self, request: Request) -> bool:
        if self.writable and not request.flags and not self.distrusted:
            length = request.length
            host = self.mapping.place(request.offset, length)
            if host >= 0 and self.watch.allows(length) and self.file.write_inline(request.iov, host) == length:
                return True
        return super().queue_write(request)

    def queue_status(self, request: Request) -> bool:
        """Of a fixed image, the file system knows."""
        if not isinstance(self.mapping, FixedMapping):
            return super().queue_status(request)

        def work() -> None:
            request.error = errno.EIO  # what stays if the next line raises
            request.error = self.file.perform(request)

        self.env.workers.submit(work, lambda: request.done(request))
        return False


def repair_copies(file: ImageFile, image: Image, full: bytearray) -> None:
    """Write what is missing or damaged: the footer or its copy, the batmap. Durably. ImageError."""
    if not image.damages:
        return
    footer = image.footer.pack()
    start = file.load(0, SECTOR_BYTES, "the footer's copy")
    end = file.load(image.end_bytes, SECTOR_BYTES, "the footer")
    if end[:SHORT_FOOTER_BYTES] != footer[:SHORT_FOOTER_BYTES]:
        file.store(image.end_bytes, footer, "the footer")
    if start != footer:
        file.store(0, footer, "the footer's copy")
    if image.batmap is not None:
        for offset, data in batmap_writes(image, full):
            file.store(offset, data, "the batmap")
    file.sync_or_raise()
