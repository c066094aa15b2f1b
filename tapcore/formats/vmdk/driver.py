"""vmdk: a disk: its descriptor, and its extents one behind the other."""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final

from tapcore.driver import SECTOR_BYTES, Driver, OpenFlag, ParentId, find_driver
from tapcore.errors import ChainError, ImageError
from tapcore.formats.concat import Concat, Window
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import parent_of
from tapcore.formats.vmdk.descriptor import NO_PARENT_CID, SPARSE_TYPES, ExtentLine, extent_path
from tapcore.formats.vmdk.extent import SparseExtent
from tapcore.formats.vmdk.load import Image, load_image, open_sparse
from tapcore.params import path_params
from tapcore.request import Request, fail

logger = logging.getLogger(__name__)

MIN_CID_DIGITS: Final = 4
"""A CID is changed in place. QEMU writes it without leading zeroes: one in a million has fewer digits."""

Verb = Callable[[Request], bool]


class VmdkDriver(Driver):
    """One VMDK image. What it does itself: before the first change after an open the CID is changed, durably, so
    that images laid over the former content are known to be stale."""

    keeps_tables = True
    file_kind: ClassVar[type[ImageFile]] = ImageFile

    def open(self) -> None:
        """UsageError for bad parameters; ImageError if the image is not valid, not supported, or in use."""
        _, self.path = path_params(self.name, self.params)
        self._extents: list[Driver] = []
        file = self.file_kind.open(self.path, self.flags)
        self._own_file: ImageFile | None = file
        try:
            self._open(file)
        except BaseException:
            self.close()
            raise

    def _open(self, file: ImageFile) -> None:
        self.image = image = load_image(file)
        self.cid = image.descriptor.cid
        if not file.read_only:
            _check_writable(image)
        if image.header is not None:
            extent = SparseExtent(self.env, file, image.header, self.flags, 0, image.size_bytes)
            self._own_file = None  # the extent's now
            self._extents.append(extent)
        else:
            start = 0
            for line in image.descriptor.extents:
                self._extents.append(self._open_extent(line, start))
                start += line.sectors * SECTOR_BYTES
        several = len(self._extents) > 1
        self._body = Concat(self.env, self.flags, self._extents) if several else self._extents[0]
        self.info = self._body.info
        self._marked = False
        self._marking: list[Callable[[int], None]] = []
        for verb in ("queue_read", "queue_flush", "queue_status", "submit"):
            setattr(self, verb, getattr(self._body, verb))
        self.queue_own_status: Verb = getattr(self._body, "queue_own_status", self._body.queue_status)

    def fileno(self) -> int:
        return self.image.file.fd

    def _open_extent(self, line: ExtentLine, start: int) -> Driver:
        size_bytes = line.sectors * SECTOR_BYTES
        if line.kind in SPARSE_TYPES:
            file, header = open_sparse(self.image, line, self.flags, self.file_kind.open)
            try:
                return SparseExtent(self.env, file, header, self.flags, start, size_bytes)
            except BaseException:
                file.close()
                raise
        assert self.path is not None
        path = extent_path(self.path, line.name)
        flat = find_driver("aio")(self.env, path, self.flags)
        flat.open()
        end = line.offset_sectors * SECTOR_BYTES + size_bytes
        if flat.info.size_bytes < end:
            flat.close()
            raise ImageError(f"has {flat.info.size_bytes} bytes, but the descriptor has an extent that ends at "
                             f"{end}", path=path, errno=errno.EINVAL)
        if flat.info.size_bytes == size_bytes:
            return flat
        return Window(flat, line.offset_sectors * SECTOR_BYTES, size_bytes)

    def close(self) -> None:
        """The first failure is raised after all files were closed."""
        failure: Exception | None = None
        closers = [extent.close for extent in self._extents]
        if self._own_file is not None:
            closers.append(self._own_file.close)
        self._extents, self._own_file = [], None
        for close in closers:
            try:
                close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    # The parent

    def get_parent_id(self) -> ParentId | None:
        descriptor = self.image.descriptor
        if descriptor.parent_cid == NO_PARENT_CID or descriptor.parent_hint is None:
            return None
        assert self.path is not None
        return parent_of(self.path, descriptor.parent_hint, "vmdk", self.env.reach)

    def validate_parent(self, parent: Driver) -> None:
        if not isinstance(parent, VmdkDriver):
            raise ChainError(f"the parent of a VMDK is a VMDK, not {parent.name}")
        wanted = self.image.descriptor.parent_cid
        if parent.cid != wanted and not self.flags & OpenFlag.QUERY:
            raise ImageError(
                f"{parent.path} was written after this image was laid over it: its CID is {parent.cid:08x}, and "
                f"the parentCID here is {wanted:08x}", errno=errno.ESTALE, path=self.path,
                hint="bring back the parent as it was; or, if its content is known to be right, accept it as it "
                     "is with: td-img rebase -u")

    @property
    def backing(self) -> Driver | None:
        return self._backing

    @backing.setter
    def backing(self, backing: Driver | None) -> None:
        self._backing = backing
        for extent in self._extents:
            if isinstance(extent, SparseExtent):
                extent.lie_over(backing)

    _backing: Driver | None = None

    # Changes

    def queue_write(self, request: Request) -> bool:
        if self._marked:
            return self._body.queue_write(request)
        return self._mark_first(self._body.queue_write, request)

    def queue_discard(self, request: Request) -> bool:
        if self._marked:
            return self._body.queue_discard(request)
        return self._mark_first(self._body.queue_discard, request)

    def queue_zeroes(self, request: Request) -> bool:
        if self._marked:
            return self._body.queue_zeroes(request)
        return self._mark_first(self._body.queue_zeroes, request)

    def _mark_first(self, verb: Verb, request: Request) -> bool:
        """Do `request` when the image says that it is being changed."""
        if self.info.read_only:
            return fail(request, errno.EROFS)
        self._marking.append(partial(self._go_on, verb, request))
        if len(self._marking) == 1:
            result = [errno.EIO]

            def work() -> None:
                result[0] = self._mark()

            self.env.workers.submit(work, lambda: self._after_mark(result[0]))
        return False

    def _mark(self) -> int:
        """In a worker. Returns 0 or an errno."""
        image = self.image
        descriptor = self.image.descriptor
        cid = self.cid
        while cid == self.cid:
            cid = secrets.randbelow(min(NO_PARENT_CID, 16**descriptor.cid_digits))
        sparse = [extent for extent in self._extents if isinstance(extent, SparseExtent)]
        try:
            text = b"%0*x" % (descriptor.cid_digits, cid)
            image.file.store(image.descriptor_at + descriptor.cid_at, text, "the descriptor's CID")
            for extent in sparse:
                extent.mark_open()
            for file in {image.file, *(extent.file for extent in sparse)}:
                file.sync_or_raise()
        except ImageError as error:
            logger.error("%s", error)
            return error.errno
        self.cid = cid
        return 0

    def _after_mark(self, code: int) -> None:
        self._marked = not code
        waiting, self._marking = self._marking, []
        for go_on in waiting:
            go_on(code)
        self.submit()

    def _go_on(self, verb: Verb, request: Request, code: int) -> None:
        request.error = code
        if code or verb(request):
            request.done(request)

    def quiesce(self, done: Callable[[], None]) -> None:
        self._body.quiesce(done)


def _check_writable(image: Image) -> None:
    """ImageError if writing would lose something, or is not possible."""
    descriptor = image.descriptor
    path, hint = image.file.path, "open the disk read-only, or lay an overlay over it"
    if any(line.access != "RW" for line in descriptor.extents):
        raise ImageError("its descriptor has an extent that is not to be written (RDONLY)", errno=errno.EROFS,
                         path=path, hint=hint)
    if descriptor.cid_digits < MIN_CID_DIGITS:
        raise ImageError(f"its descriptor's CID has {descriptor.cid_digits} digits, too few to change it in place",
                         path=path, errno=errno.EINVAL, hint=hint)
    if "changeTrackPath" in descriptor.entries:
        raise ImageError("its changed blocks are tracked in a file that would not be kept up to date "
                         "(changeTrackPath)", errno=errno.EOPNOTSUPP, path=path,
                         hint=f"switch the tracking off first, {hint}")
