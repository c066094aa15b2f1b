"""A format that is read and written: what each of their drivers has beside its `open` and its fast paths."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import ClassVar

from tapcore.errors import ImageError
from tapcore.formats.durable import Durable
from tapcore.formats.ranges import Range
from tapcore.formats.reader import ImageDriver
from tapcore.formats.writer import Writer
from tapcore.request import Request, fail
from tapcore.writewatch import WriteWatch

logger = logging.getLogger(__name__)


class WritableDriver(ImageDriver):
    """`open` of a format calls `start_reading` and, unless the image is read-only, `start_writing`."""

    repair_hint: ClassVar[str] = ""
    """What mends an image whose tables contradict each other."""
    writer: Writer
    durable: Durable
    writable = False
    distrusted = False
    """The image's tables contradict each other: nothing is changed any more."""

    def start_writing(self, writer: Writer) -> None:
        self.writer = writer
        self.durable = writer.durable
        self.watch = WriteWatch()
        self.writable = True

    def close(self) -> None:
        """ImageError if the last changes cannot be written; the files are closed all the same."""
        try:
            if self.writable and not self.distrusted:
                self.closing()
                self.durable.finish()
                if not self.distrusted:
                    self.closed()
        finally:
            self.close_files()

    def closing(self) -> None:
        """Called before the last commit, with nothing under way; may do I/O. ImageError, OSError."""

    def closed(self) -> None:
        """Called after the last commit: everything is durable. ImageError, OSError."""

    def distrust(self, error: ImageError) -> None:
        """The image's tables contradict each other: change nothing more."""
        self.log_damage(error)
        if not self.distrusted:
            self.distrusted = True
            logger.error("%s: the image is damaged and will not be written any more; %s", self.path,
                         self.repair_hint)

    # Verbs

    def queue_write(self, request: Request) -> bool:
        return self.writer.write(request) if self.writable else fail(request, errno.EROFS)

    def queue_flush(self, request: Request) -> bool:
        if not self.writable:
            return True
        self.durable.flush(request)
        return False

    def queue_discard(self, request: Request) -> bool:
        if not self.writable:
            return fail(request, errno.EROFS)
        return fail(request, errno.EIO) if self.distrusted else Range(self.writer, request).run()

    queue_zeroes = queue_discard

    def submit(self) -> None:
        super().submit()
        if self.writable:
            self.watch.end_batch()
            self.durable.submit()

    def landed(self) -> None:
        if self.writable:
            self.durable.landed()

    def quiesce(self, done: Callable[[], None]) -> None:
        if self.writable:
            self.durable.when_idle(done)
        else:
            done()
