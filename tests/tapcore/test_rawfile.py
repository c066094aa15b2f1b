"""Raw files: what cannot be opened, the locks that QEMU shares, and what one blocking call does."""

from __future__ import annotations

import errno
import os
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tapcore.driver import OpenFlag
from tapcore.errors import ImageError
from tapcore.rawfile import IOV_MAX, RawFile, transfer
from tapcore.request import (
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    STATUS,
    STATUS_HOLE,
    STATUS_ZERO,
    WRITE,
    ZEROES,
    Request,
)

SIZE = 1 << 20
HOLE = STATUS_HOLE | STATUS_ZERO
RW, RO = OpenFlag.NONE, OpenFlag.RDONLY
PARENT = OpenFlag.RDONLY | OpenFlag.SHAREABLE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@contextmanager
def opened(path: Path, flags: OpenFlag = RW) -> Iterator[RawFile]:
    file = RawFile.open(str(path), flags)
    try:
        yield file
    finally:
        file.close()


def refusal(path: Path | str, flags: OpenFlag = RW) -> ImageError:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ImageError) as caught:
        RawFile.open(str(path), flags)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a descriptor was left open"
    return caught.value


# What cannot be opened


def test_a_missing_file(tmp_path: Path) -> None:
    error = refusal(tmp_path / "none.img")
    assert error.errno == errno.ENOENT
    assert str(error) == (f"{tmp_path}/none.img: cannot open the image for writing: No such file or directory; "
                          "check the path; a new image is made with: truncate -s 10G FILE")


@pytest.mark.parametrize("make, what", [
    (lambda path: path.mkdir(), "a directory"),
    (os.mkfifo, "a pipe"),
    (lambda path: path.symlink_to("/dev/null"), "a character device"),
])
def test_what_is_no_disk(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    make(tmp_path / "thing")
    for flags in (RW, RO):
        error = refusal(tmp_path / "thing", flags)
        assert str(error) == f"{tmp_path}/thing: is {what}, not a disk image; name a file or a block device"
        assert error.errno == errno.EINVAL


def test_a_file_that_one_may_not_read(image: Path) -> None:
    image.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        error = refusal(image, RO)
    finally:
        os.seteuid(user)
    assert error.errno == errno.EACCES
    assert "cannot open the image: Permission denied; user " in str(error)


@pytest.mark.parametrize("size", [1, 511, 513, SIZE - 1])
def test_a_size_that_is_no_multiple_of_a_sector(image: Path, size: int) -> None:
    os.truncate(image, size)
    assert str(refusal(image)) == (f"{image}: its size, {size} bytes, is not a multiple of 512; round it up with: "
                                   "truncate -s %512 FILE")


@needs_root
@pytest.mark.skipif(shutil.which("chattr") is None, reason="chattr is missing")
def test_a_file_that_nobody_may_write(image: Path) -> None:
    if subprocess.run(["chattr", "+i", image], capture_output=True).returncode:
        pytest.skip("the file system has no immutable files")
    try:
        assert "Operation not permitted; it may be immutable" in str(refusal(image))
        with opened(image, RO):
            pass
    finally:
        subprocess.run(["chattr", "-i", image], check=True)


# Locks


@pytest.mark.parametrize("first, second, refused", [
    (RW, RW, True), (RW, RO, True), (RO, RW, True), (RO, RO, False),
    (RW, PARENT, False), (PARENT, RW, False), (PARENT, PARENT, False), (RO, PARENT, False), (PARENT, RO, False),
    (RW, OpenFlag.QUERY, False), (OpenFlag.QUERY, RW, False),
    (OpenFlag.SHAREABLE, OpenFlag.SHAREABLE, False), (OpenFlag.SHAREABLE, PARENT, False),
    (OpenFlag.SHAREABLE, RW, True), (RW, OpenFlag.SHAREABLE, True), (OpenFlag.SHAREABLE, RO, True),
])
def test_who_may_open_an_image_together(image: Path, first: OpenFlag, second: OpenFlag, refused: bool) -> None:
    with opened(image, first):
        if refused:
            assert refusal(image, second).errno == errno.EBUSY
        else:
            with opened(image, second):
                pass
    with opened(image):
        pass


def test_an_image_in_use_says_who_uses_it_and_what_to_do(image: Path) -> None:
    with opened(image):
        this = f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
        in_use = f"{image}: the image is in use: {this}"
        assert str(refusal(image)) == (f"{in_use} does not let it be written by others; close it there first, or "
                                       "open this disk read-only")
        assert str(refusal(image, RO)) == f"{in_use} has it open to be written; close it there first"


def qemu_io(image: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-io", "-f", "raw", *options, "-c", command, image], capture_output=True, text=True,
                          timeout=20)


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[int]:
    """A qemu-nbd that has `image` open; its process id."""
    pid_file = image.with_suffix(".pid")
    subprocess.run(["qemu-nbd", "--fork", f"--pid-file={pid_file}", "-k", image.with_suffix(".sock"), "-t",
                    *options, image], check=True, capture_output=True, timeout=20)
    pid = int(pid_file.read_text())
    handle = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], 20)
        os.close(handle)
        assert ended, "qemu-nbd does not end"


@pytest.mark.parametrize("flags, reads, writes", [
    (RW, True, False), (RO, True, False), (PARENT, True, True), (OpenFlag.QUERY, True, True),
])
def test_qemu_respects_the_locks(image: Path, flags: OpenFlag, reads: bool, writes: bool) -> None:
    with opened(image, flags):
        read = qemu_io(image, "read 0 4k", "-r")
        assert (read.returncode == 0) == reads
        write = qemu_io(image, "write 0 4k")
        assert (write.returncode == 0) == writes
        if not writes:
            assert 'Failed to get "write" lock' in write.stderr
    assert qemu_io(image, "write 0 4k").returncode == 0, "closing releases the locks"


def test_qemu_img_does_not_resize_under_a_writer(image: Path) -> None:
    with opened(image):
        resize = subprocess.run(["qemu-img", "resize", "-f", "raw", image, "2M"], capture_output=True, text=True,
                                timeout=20)
        assert resize.returncode != 0 and "lock" in resize.stderr
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize("options, allowed", [
    (("-f", "raw"), (PARENT, OpenFlag.QUERY)),
    (("-f", "qcow2"), (PARENT, OpenFlag.QUERY)),
    (("-r", "-f", "qcow2"), (RO, PARENT, OpenFlag.QUERY)),
])
def test_the_locks_of_qemu_are_respected(image: Path, options: Sequence[str], allowed: Sequence[OpenFlag]) -> None:
    if "qcow2" in options:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True, timeout=20)
        os.truncate(image, -(-image.stat().st_size // 512) * 512)
    with qemu_nbd(image, *options) as pid:
        for flags in (RW, RO, PARENT, OpenFlag.QUERY):
            if flags in allowed:
                with opened(image, flags):
                    pass
            else:
                error = refusal(image, flags)
                assert error.errno == errno.EBUSY and f"process {pid} (qemu-nbd)" in str(error)


# What one call does


def perform(file: RawFile, op: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> int:
    request = Request(op, offset, length, [memoryview(data)] if data else [], flags)
    return file.perform(request)


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_rest_of_a_request(image: Path) -> None:
    with opened(image) as file:
        request = Request(WRITE, 100, 6, [memoryview(b"abc"), memoryview(b"def")])
        assert file.perform(request, 4) == 0
        assert image.read_bytes()[100:107] == b"\0\0\0\0ef\0"
        target = bytearray(b"______")
        assert file.perform(Request(READ, 101, 6, [memoryview(target)]), 2) == 0
        assert target == b"__\0ef\0"


def test_calls_that_do_less_than_they_were_asked() -> None:
    source = bytes(range(200))
    target = bytearray(200)

    def short_read(fd: int, iov: Sequence[memoryview], offset: int, flags: int) -> int:
        calls.append(len(iov))
        view = iov[0]
        count = min(7, len(view))
        view[:count] = source[offset - 1000 : offset - 1000 + count]
        return count

    calls: list[int] = []
    views = [memoryview(target)[i : i + 10] for i in range(0, 200, 10)]
    assert transfer(short_read, -1, views, 1000, 200) == 0
    assert target == source and len(calls) == 40


def test_no_more_buffers_in_a_call_than_the_kernel_takes(image: Path) -> None:
    data = os.urandom(3 * IOV_MAX)
    with opened(image) as file:
        views = [memoryview(data)[i : i + 1] for i in range(len(data))]
        assert file.write(views, 5, len(data)) == 0
    assert image.read_bytes()[5 : 5 + len(data)] == data


def test_a_file_cut_short_under_us(image: Path) -> None:
    with opened(image) as file:
        os.truncate(image, 4096)
        target = bytearray(8192)
        assert file.read([memoryview(target)], 0, 8192) == errno.EIO
        assert file.read([memoryview(target)], 100000, 8192) == errno.EIO


def test_a_file_that_may_not_grow_is_an_error_of_the_request(image: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(image) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limit[1]))
        try:
            codes = [perform(file, WRITE, offset, 8192, bytes(8192)) for offset in (0, 61440, 65536)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert codes == [0, errno.EFBIG, errno.EFBIG]
        assert perform(file, WRITE, 61440, 8192, bytes(8192)) == 0


@needs_root
def test_a_full_disk_is_an_error_of_the_request(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        image = place / "disk.img"
        with image.open("wb") as made:
            made.truncate(SIZE)
        with opened(image) as file:
            assert perform(file, WRITE, 0, 131072, bytes(131072)) == errno.ENOSPC
            assert perform(file, ZEROES, 262144, 131072, flags=NO_HOLE) == errno.ENOSPC
            assert perform(file, FLUSH, 0, 0) == 0
            assert perform(file, DISCARD, 0, SIZE) == 0
            assert perform(file, WRITE, 524288, 32768, b"x" * 32768) == 0
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_failed_fdatasync_is_never_followed_by_a_good_one(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(image) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda fd: fail(errno.ENOSPC))
            assert perform(file, FLUSH, 0, 0) == errno.ENOSPC
        assert perform(file, FLUSH, 0, 0) == errno.ENOSPC
        assert perform(file, ZEROES, 0, 512, flags=FUA) == errno.ENOSPC
        assert perform(file, WRITE, 0, 512, bytes(512), FUA) == 0, "it is durable all by itself"
    assert caplog.text.count("some may be lost") == 1
    with opened(image) as file:
        assert perform(file, FLUSH, 0, 0) == 0


def test_a_durable_write_that_failed_may_have_hidden_a_lost_page(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(image) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: fail(errno.EIO))
            assert perform(file, WRITE, 0, 512, bytes(512)) == errno.EIO
            assert file.sync() == 0
            assert perform(file, WRITE, 0, 512, bytes(512), FUA) == errno.EIO
        assert file.sync() == errno.EIO


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


# Holes


def test_discard_gives_space_back_and_zeroes_keep_it_if_asked(image: Path) -> None:
    with opened(image) as file:
        assert perform(file, WRITE, 0, SIZE, b"x" * SIZE) == 0 and file.sync() == 0
        assert allocated_bytes(image) >= SIZE
        assert perform(file, ZEROES, 0, 65536, flags=NO_HOLE | FUA) == 0
        assert allocated_bytes(image) >= SIZE
        assert perform(file, ZEROES, 65536, 65536) == 0
        assert perform(file, DISCARD, 131072, 65536, flags=FUA) == 0
        assert allocated_bytes(image) <= SIZE - 131072
        assert image.read_bytes() == bytes(196608) + b"x" * (SIZE - 196608)


def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
    fail(errno.EOPNOTSUPP)


def test_without_fallocate_zeroes_are_written_unless_that_is_too_slow(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapcore.rawfile.fallocate", unsupported)
    with opened(image) as file:
        assert perform(file, WRITE, 0, SIZE, b"x" * SIZE) == 0
        assert perform(file, DISCARD, 0, SIZE) == 0
        assert perform(file, ZEROES, 0, SIZE, flags=FAST) == errno.ENOTSUP
        assert image.read_bytes() == b"x" * SIZE
        assert perform(file, ZEROES, 1, SIZE - 2) == 0
        assert image.read_bytes() == b"x" + bytes(SIZE - 2) + b"x"


def test_fallocate_that_fails_fails_the_request(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapcore.rawfile.fallocate", lambda *_: fail(errno.ENOSPC))
    with opened(image) as file:
        assert perform(file, ZEROES, 0, 512, flags=FAST) == errno.ENOSPC
        assert perform(file, DISCARD, 0, 512) == errno.ENOSPC


def test_an_answer_to_block_status_is_bounded(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapcore.rawfile.MAX_EXTENTS", 4)
    with opened(image) as file:
        for offset in range(0, SIZE, 131072):
            assert perform(file, WRITE, offset, 4096, b"x" * 4096) == 0
        assert file.sync() == 0
        request = Request(STATUS, 0, SIZE)
        assert file.perform(request) == 0
        assert request.extents == [(4096, 0), (126976, 3), (4096, 0), (126976, 3), (4096, 0)]


def test_the_end_of_a_run_of_data_is_looked_for_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image.write_bytes(b"x" * (1 << 20))
    with opened(image) as file:
        assert file.status(0, 65536) == [(65536, 0)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "lseek", lambda *_: pytest.fail("looked for again"))
            assert file.status(65536, 1 << 19) == [(1 << 19, 0)]
        assert file.discard(131072, 65536) == 0
        assert file.status(65536, 1 << 18) == [(65536, 0), (65536, HOLE), (131072, 0)]
        assert file.status(131072, 65536) == [(65536, HOLE)]
        assert file.zeroes(0, 65536, 0) == 0
        assert file.status(0, 131072) == [(65536, HOLE), (65536, 0)]


def test_a_file_system_that_fails_to_answer_block_status(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(image) as file:
        monkeypatch.setattr(os, "lseek", lambda *_: fail(errno.EIO))
        assert file.perform(Request(STATUS, 0, SIZE)) == errno.EIO


# Block devices


@pytest.fixture
def device(image: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("no right to make a block device")
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no block device: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path
    subprocess.run(["losetup", "-d", path], check=True)


def test_a_block_device_is_a_disk_too(device: Path) -> None:
    with opened(device) as file:
        assert file.is_device and file.size_bytes == SIZE and file.quick_read_flags() == os.RWF_NOWAIT
        assert refusal(device).errno == errno.EBUSY
        assert perform(file, WRITE, 0, SIZE, b"x" * SIZE, FUA) == 0
        assert file.status(512, 4096) == [(4096, 0)]
        assert perform(file, ZEROES, 4096, 4096, flags=NO_HOLE) == 0
        assert perform(file, ZEROES, 8192, 4096) == 0
        assert perform(file, ZEROES, 12288, 4096, flags=FAST) in (0, errno.ENOTSUP)
        assert perform(file, ZEROES, 16384, 512, flags=FAST | NO_HOLE) == errno.ENOTSUP
        assert perform(file, ZEROES, 20481, 1000) == 0, "not aligned: written"
        assert perform(file, DISCARD, 24577, 1000, flags=FUA) == 0
        assert perform(file, DISCARD, 28673, 10) == 0
        target = bytearray(SIZE)
        assert file.read([memoryview(target)], 0, SIZE) == 0
    assert target[:4096] == b"x" * 4096 and target[4096:12288] == bytes(8192)
    assert target[12288:16384] in (bytes(4096), b"x" * 4096)
    assert target[16384:20481] == b"x" * 4097 and target[20481:21481] == bytes(1000)
    assert target[21481:25088] == b"x" * 3607 and target[25600:] == b"x" * (SIZE - 25600)
