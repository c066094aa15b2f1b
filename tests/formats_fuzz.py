"""Damaged and hostile images: what is done to them, and how they are used then.

Whatever is in an image, what uses it succeeds, or fails in the ways that its contract names; it never changes what
it refused or only read, and its memory stays bounded.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from contract.runner import Runner
from hypothesis import strategies as st

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.layout import Layout
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, ZEROES, Request

SPARE_MEMORY_BYTES = 512 << 20
USED_BYTES = 256 << 10
MAX_FILE_BYTES = 16 << 20
"""Of space that an image takes after it was used."""


@dataclass(repr=False)
class Template:
    """A good image of one kind. `words` are offsets of its tables' entries, `offsets` those of its tables."""

    name: str
    data: bytes
    header: Layout
    words: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)
    """Files beside it that it needs."""


def fields_of(layout: Layout) -> list[tuple[int, int]]:
    """(offset, length) of each field of a structure."""
    found, at = [], 0
    for name in layout.names:
        sample = {other: b"" if "magic" in other else 0 for other in layout.names}
        low, high = layout.pack(**sample), layout.pack(**sample | {name: b"\xff" * 64 if "magic" in name else 1})
        last = max(place for place in range(len(low)) if low[place] != high[place])
        length = 4 if "magic" in name else last - at + 1
        while length not in (1, 2, 4, 8):
            at, length = at + 1, length - 1
        found.append((at, length))
        at += length
    return found


Change = tuple[str, int, int]
"""("set", offset, 8-byte big-endian number), ("byte", …) or ("length", 0, the file's)."""


@st.composite
def changes(draw: st.DrawFn, template: Template) -> list[Change]:
    """One to four things that are wrong with an image."""
    length = len(template.data)
    numbers = st.one_of(
        st.sampled_from([0, 1, 2, 7, 8, 511, 512, 513, 4096, (1 << 16) - 1, (1 << 31) - 1, (1 << 32) - 1, 1 << 32,
                         1 << 40, 1 << 55, (1 << 56) - 512, 1 << 62, (1 << 62) + 512, 1 << 63, (1 << 64) - 1]),
        st.sampled_from(template.offsets or [0]),
        st.sampled_from(template.offsets or [0]).map(lambda at: at | 1 << 63),
        st.integers(0, 2 * length), st.integers(0, (1 << 64) - 1))
    found: list[Change] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("field", "field", "word", "word", "byte", "length")))
        if kind == "field":
            at, size = draw(st.sampled_from(fields_of(template.header)))
            found += [("byte", at + place, byte) for place, byte in
                      enumerate((draw(numbers) % (1 << 8 * size)).to_bytes(size, "big"))]
        elif kind == "word" and template.words:
            found.append(("set", draw(st.sampled_from(template.words)), draw(numbers)))
        elif kind == "length":
            found.append(("length", 0, draw(st.sampled_from(
                (0, 3, 47, 71, 104, 511, length // 2, length - 1, 2 * length, 1 << 40, 1 << 43)))))
        else:
            at = draw(st.one_of(st.integers(0, min(1023, length - 1)), st.sampled_from(template.words or [0])))
            found.append(("byte", at, draw(st.integers(0, 255))))
    return found


def damaged(template: Template, wrong: list[Change], path: Path) -> None:
    """Write the image with that wrong."""
    data, length = bytearray(template.data), len(template.data)
    for kind, at, value in wrong:
        if kind == "set":
            data[at : at + 8] = value.to_bytes(8, "big")
        elif kind == "byte":
            data[at] = value
        else:
            length = value
    for name, content in template.others.items():
        (path.parent / name).write_bytes(content)
    with path.open("wb") as file:
        file.write(data[:length])
        file.truncate(length)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Whoever asks for much more memory than there is in use gets none."""
    in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + SPARE_MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def snapshot_of(path: Path) -> tuple[int, bytes]:
    """The file's length, and its first bytes."""
    with path.open("rb") as file:
        return path.stat().st_size, file.read(8 << 20)


def refuses_or_works(
    path: Path, action: Callable[[], object], *, reads_only: bool = False, kept: slice = slice(0, 512)
) -> bool:
    """True if `action` works. If it only reads, the file is as it was; if it raises, what is to be `kept` is."""
    before = snapshot_of(path)
    try:
        action()
    except (ChainError, ImageError, UsageError) as error:
        assert str(error)
        after = snapshot_of(path)
        assert after[1][kept] == before[1][kept]
        if reads_only:
            assert after == before
        return False
    if reads_only:
        assert snapshot_of(path) == before
    return True


def use(env: Env, driver: str, path: Path) -> None:
    """Open and read; then open and write."""
    refuses_or_works(path, lambda: drive(env, f"{driver}:{path}", OpenFlag.RDONLY), reads_only=True)
    before = snapshot_of(path)
    opened = refuses_or_works(path, lambda: Runner(env, f"{driver}:{path}").close())
    if opened:
        refuses_or_works(path, lambda: drive(env, f"{driver}:{path}", OpenFlag.NONE))
    else:
        assert snapshot_of(path) == before, "written, and then refused"
    assert path.stat().st_blocks * 512 < MAX_FILE_BYTES


def drive(env: Env, chain: str, flags: OpenFlag) -> None:
    """All verbs at both ends of the disk; each request ends, with an error or without."""
    runner = Runner(env, chain, flags)
    try:
        size = runner.size
        ends = {0, max(0, size - USED_BYTES)} if size else set()
        for start in sorted(ends):
            stop = min(size, start + USED_BYTES)
            batch = [Request(READ, at, 512, [memoryview(bytearray(512))]) for at in range(start, stop - 511, 1024)]
            batch += [Request(STATUS, start, stop - start)]
            if not flags & OpenFlag.RDONLY:
                batch += [Request(WRITE, at, 700, [memoryview(b"w" * 700)])
                          for at in range(start, stop - 700, 16000)]
                batch += [Request(DISCARD, at, 4096) for at in range(start + 4096, stop - 4096, 30720)]
                batch += [Request(ZEROES, at, 2048) for at in range(start + 10240, stop - 4096, 30720)]
            runner.run(*batch, Request(FLUSH))
    finally:
        runner.close()
