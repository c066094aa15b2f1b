"""qcow2: the driver: open and the fast paths. What is not fast goes to the shared reader and writer."""

from __future__ import annotations

import errno
import logging
import os

from tapcore.driver import DiskInfo, Feature, ParentId
from tapcore.errors import ImageError, UsageError
from tapcore.formats.extents import TableMiss, from_big_endian
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import parent_of
from tapcore.formats.qcow2.changes import Qcow2Writer
from tapcore.formats.qcow2.check import rebuild_refcounts
from tapcore.formats.qcow2.layout import (
    AUTOCLEAR_AT,
    COPIED,
    CORRUPT,
    DIRTY,
    FEATURES,
    INCOMPATIBLE_AT,
    OFFSET_MASK,
)
from tapcore.formats.qcow2.load import DATA_FILE, data_path, load_header, load_refcounts
from tapcore.formats.qcow2.mapping import Mapping
from tapcore.formats.qcow2.refcounts import REFCOUNTS
from tapcore.formats.qcow2.subcluster_changes import SubclusterWriter
from tapcore.formats.qcow2.subclusters import make_mapping
from tapcore.formats.writable import WritableDriver
from tapcore.params import path_params
from tapcore.request import IS_ZERO, Request

logger = logging.getLogger(__name__)


class Qcow2Driver(WritableDriver):
    """One qcow2 image."""

    repair_hint = "repair it with td-img check --repair"
    mapping: Mapping

    def open(self) -> None:
        """UsageError for bad parameters; ImageError if the image is not valid, not supported, or in use."""
        options, self.path = path_params(self.name, self.params, ("data_file",))
        file = self.file_kind.open(self.path, self.flags)
        try:
            self._open(file, options.get("data_file"))
        except BaseException:
            file.close()
            raise

    def _open(self, file: ImageFile, data_file: str | None) -> None:
        self.header = load_header(file)
        data = self._open_data(file.path, data_file)
        try:
            self._start(file, data)
        except BaseException:
            if data is not None:
                data.close()
            raise

    def _open_data(self, path: str, chosen: str | None) -> ImageFile | None:
        name = self.header.data_file
        if name is None:
            if chosen is not None:
                raise UsageError(f"{path} has no {DATA_FILE}", hint="leave out the option data_file")
            return None
        place = data_path(path, name) if chosen is None else chosen
        try:
            return self.file_kind.open(place, self.flags)
        except ImageError as error:
            error.message = f"the {DATA_FILE} {chosen or name!r}: {error.message}"
            if error.errno == errno.ENOENT and chosen is None:
                error.hint = "its name, if relative, is looked up in the image's folder"
            raise

    def _start(self, file: ImageFile, data: ImageFile | None) -> None:
        header = self.header
        if not file.read_only and header.incompatible_features & CORRUPT:
            raise ImageError("the image is marked corrupt", path=file.path, offset=INCOMPATIBLE_AT,
                             hint="repair it with td-img check --repair, or open it read-only")
        l1 = from_big_endian("Q", file.load(header.l1_table_offset, 8 * header.l1_size, "the L1 table"))
        mapping = make_mapping(header, l1)
        mapping.grow(-(-file.size_bytes // header.cluster_bytes) * header.cluster_bytes)
        self.start_reading(file, mapping, data)
        features = Feature.FLUSH | Feature.DISCARD | Feature.ZEROES | Feature.FAST_ZEROES | Feature.STATUS
        self.info = DiskInfo(header.size, features, preferred_block_bytes=header.cluster_bytes,
                             read_only=file.read_only)

    def begin(self) -> None:
        """Rebuild the refcounts of an image that was not closed; clear the autoclear bits of what is not kept
        here; get ready to write. ImageError."""
        file = self.file
        if file.read_only:
            return
        data = None if self.data is file else self.data
        if self.header.incompatible_features & DIRTY:
            logger.warning("%s: was not closed; its refcounts are rebuilt", file.path)
            rebuild_refcounts(file, self.header)
            self.header = load_header(file)
            self._start(file, data)
        header = self.header
        self.refcounts = load_refcounts(file, header)
        self.refcounts.protect(entry & OFFSET_MASK for entry in self.mapping.l1)
        if header.autoclear_features != header.autoclear_kept:
            file.store(AUTOCLEAR_AT, FEATURES.pack(bits=header.autoclear_kept), "the header")
            file.sync_or_raise()
        if data is not None and header.data_is_raw and data.length_now() < header.size:
            data.truncate(header.size)
        self.start_writing(SubclusterWriter(self) if header.has_subclusters else Qcow2Writer(self))

    def get_parent_id(self) -> ParentId | None:
        if self.header.backing_file is None:
            return None
        assert self.path is not None
        return parent_of(self.path, self.header.backing_file, self.header.backing_format, self.env.reach)

    def closing(self) -> None:
        """The file ends with a whole cluster."""
        end = self.refcounts.fresh_from << self.header.cluster_bits
        if not self.file.is_device and self.file.length_now() < end:
            self.file.truncate(end)

    # Verbs

    def queue_read(self, request: Request) -> bool:
        mapping = self.mapping
        offset = request.offset
        within = offset & (mapping.unit_bytes - 1)
        if within + request.length <= mapping.unit_bytes and not request.flags and self._reads_inline:
            table = mapping.tables.get(offset >> mapping.table_shift)
            if table is None:
                entry = mapping.l1[offset >> mapping.table_shift]
            else:
                entry = table[(offset >> mapping.cluster_bits & mapping.index_mask) << mapping.words_shift]
            if not entry and request.takes_zero and mapping.is_plain and self.backing is None:
                request.flags = IS_ZERO
                return True
            if (table is not None and not entry & mapping.not_plain
                    and 0 < (host := entry & mapping.host_mask) < mapping.data_end
                    and (mapping.is_plain or mapping.is_present(entry, offset, request.length))):
                mapping.tables.move_to_end(offset >> mapping.table_shift)
                try:
                    if os.preadv(self._fd, request.iov, host + within, self._read_flags) == request.length:
                        return True
                except OSError:
                    pass
        return super().queue_read(request)

    def queue_write(self, request: Request) -> bool:
        mapping = self.mapping
        offset, length = request.offset, request.length
        within = offset & (mapping.unit_bytes - 1)
        if within + length <= mapping.unit_bytes and not request.flags and self.writable:
            table = mapping.tables.get(offset >> mapping.table_shift)
            if table is not None:
                entry = table[(offset >> mapping.cluster_bits & mapping.index_mask) << mapping.words_shift]
                if (entry & COPIED and not entry & mapping.not_plain
                        and 0 < (host := entry & mapping.host_mask) < mapping.data_end
                        and (mapping.is_plain or mapping.is_present(entry, offset, length))
                        and not self.distrusted and self.watch.allows(length)):
                    mapping.tables.move_to_end(offset >> mapping.table_shift)
                    if self.data.write_inline(request.iov, host + within) == length:
                        return True
        return super().queue_write(request)

    def install(self, miss: TableMiss, data: bytes) -> None:
        if miss.table == REFCOUNTS:
            self.refcounts.install(miss, data)
        else:
            self.mapping.install(miss, data)
