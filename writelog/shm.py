"""Names and POSIX shared memory of the write log: opening it safely, and the 8 MiB region of one client.

The region (docs/protocol.md, "Region"):

    0          export area: disk_range[262144], or what a version 1 message asked for
    4 MiB      the ring, one page (writelog.ring); its header's padding holds the RESULT of version 1 messages
    4 MiB + 4 KiB   data area, 4,190,208 bytes

Objects are made with mode 0600 and all their memory is claimed at once: a full /dev/shm must fail here, with an
error, and not later with a signal.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import stat
from pathlib import Path

import posix_ipc

from tapcore.errors import LogError
from tapcore.layout import Layout

SHM_DIR = Path("/dev/shm")
"""Where Linux shows POSIX shared memory as files."""

REGION_BYTES = 8 << 20
EXPORT_BYTES = REGION_BYTES // 2
RING_OFFSET = EXPORT_BYTES
RING_BYTES = 4096
DATA_OFFSET = RING_OFFSET + RING_BYTES
DATA_BYTES = REGION_BYTES - DATA_OFFSET
COOKIE = 0xDEADBEEF
"""Written over the first 4 bytes of the region with the reply to `shmp`."""

DISK_RANGE = Layout("disk_range", "<", "sector:Q count:I :4x", size=16)
MAX_RANGES = EXPORT_BYTES // DISK_RANGE.size
MAX_LISTED = 4096
"""Ranges that a client can ask for in one message."""
COOKIE_WORD = Layout("cookie", "<", "cookie:I", size=4)

RESULT_OFFSET = RING_OFFSET + 16
RESULT = Layout("version 1 result", "<", "version:I error:I lease:I count:I next_sector:Q :24x", size=48)
"""`error` is an errno or 0. The other fields are as `writelog.control` says for each message."""

FIGURES = Layout(
    "log figures", "<",
    "version:I granularity_bytes:I sectors:Q generation:Q dirty_blocks:Q leased_blocks:Q "
    "in_flight:I clients:I leases:I :12x current:Q base:Q former:Q :8x", size=96)
"""At the start of the export area after `peek` FIGURES; see writelog.control.Figures."""

MAX_NAME_LENGTH = 100
_NAME = re.compile(r"[A-Za-z0-9_.+=@-]+")


def check_name(name: str) -> str:
    """`name` if a log may be called so: it becomes part of file names. LogError otherwise."""
    if not _NAME.fullmatch(name) or name.strip(".") == "" or len(name) > MAX_NAME_LENGTH:
        raise LogError(f"log name {name!r}", errno=errno.EINVAL,
                       hint=f"1 to {MAX_NAME_LENGTH} letters, digits and _ . + = @ - are allowed; "
                            "log:NAME sets the name")
    return name


def _prefix(run_dir: Path, name: str) -> str:
    """What tells logs of one name under different run directories apart."""
    folder = hashlib.blake2s(os.fsencode(os.path.realpath(run_dir)), digest_size=4).hexdigest()
    return f"{folder}_{check_name(name)}"


def socket_path(run_dir: Path, name: str) -> Path:
    """The control socket of the log `name`."""
    return run_dir / f"log__{check_name(name)}.ctl"


def bitmap_name(run_dir: Path, name: str) -> str:
    return f"/writelog_{_prefix(run_dir, name)}.bitmap"


def region_name(run_dir: Path, name: str, number: int) -> str:
    return f"/log_{_prefix(run_dir, name)}_{os.getpid()}_{number}.wlog"


def remove_stale_regions(run_dir: Path, name: str) -> None:
    """Unlink every region of the log. To be called by the holder of the log's bitmap before it makes any: those
    that exist were left by a process that died."""
    pattern = re.compile(re.escape(f"log_{_prefix(run_dir, name)}_") + r"\d+_\d+\.wlog")
    for path in SHM_DIR.iterdir():
        if pattern.fullmatch(path.name):
            unlink_shared(f"/{path.name}")


def create_shared(name: str) -> int:
    """The descriptor of a new, empty object; FileExistsError if there is one of that name."""
    try:
        return int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=0).fd)
    except posix_ipc.ExistentialError:
        raise FileExistsError(errno.EEXIST, "shared memory exists", name) from None
    except (OSError, ValueError) as error:
        raise LogError(f"cannot create shared memory {name}: {error}") from error


def open_shared(name: str) -> int:
    """The descriptor of an existing object; FileNotFoundError if there is none.

    LogError unless it is a regular file of this user that nobody else may open: /dev/shm is everybody's.
    """
    try:
        fd = int(posix_ipc.SharedMemory(name, 0).fd)
    except posix_ipc.ExistentialError:
        raise FileNotFoundError(errno.ENOENT, "no such shared memory", name) from None
    except (OSError, ValueError, posix_ipc.Error) as error:
        raise LogError(f"cannot open shared memory {name}: {error}",
                       hint=f"remove {SHM_DIR}{name} if nothing uses it") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise LogError(f"shared memory {name} is not this user's alone (owner {status.st_uid}, "
                       f"mode {stat.S_IMODE(status.st_mode):o})", errno=errno.EPERM,
                       hint=f"remove {SHM_DIR}{name} if nothing uses it")
    return fd


def unlink_shared(name: str) -> None:
    """Remove the name; who has it mapped keeps the memory. Nothing happens if it is gone already."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return


def allocate(fd: int, size_bytes: int, name: str) -> None:
    """Make the object `size_bytes` long with all its memory claimed; LogError if there is not enough."""
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        raise LogError(f"no room for {size_bytes} bytes of shared memory {name}: {os.strerror(error.errno or 0)}",
                       errno=error.errno,
                       hint=f"make {SHM_DIR} larger, or track the disk with a coarser granularity") from error


class Region:
    """The 8 MiB of one connection, mapped. `export`, `page` and `data` are its parts."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self._map = mmap.mmap(fd, REGION_BYTES)
        self.memory = memoryview(self._map)
        self.export = self.memory[:EXPORT_BYTES]
        self.page = self.memory[RING_OFFSET:DATA_OFFSET]
        self.data = self.memory[DATA_OFFSET:]

    @classmethod
    def create(cls, name: str) -> Region:
        """A new region, all zero; LogError if /dev/shm has no room for it."""
        fd = create_shared(name)
        try:
            allocate(fd, REGION_BYTES, name)
            return cls(name, fd)
        except BaseException:
            unlink_shared(name)
            raise
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, name: str) -> Region:
        """The region that a server named; LogError if it is not there or too short."""
        try:
            fd = int(posix_ipc.SharedMemory(name, 0).fd)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise LogError(f"cannot open the region {name}: {error}",
                           hint="the client must run on the tapdisk's host and as its user") from error
        try:
            if os.fstat(fd).st_size < REGION_BYTES:
                raise LogError(f"the region {name} is shorter than {REGION_BYTES} bytes")
            return cls(name, fd)
        finally:
            os.close(fd)

    def put_result(self, *, error: int = 0, lease: int = 0, count: int = 0, next_sector: int = 0) -> None:
        RESULT.pack_into(self.memory, RESULT_OFFSET, version=1, error=error, lease=lease, count=count,
                         next_sector=next_sector)

    def close(self) -> None:
        """Unmap. A view that is still held elsewhere keeps the memory mapped until it goes."""
        for view in (self.export, self.page, self.data, self.memory):
            view.release()
        try:
            self._map.close()
        except BufferError:
            return
