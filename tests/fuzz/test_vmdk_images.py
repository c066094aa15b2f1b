"""VMDKs whose every field may be wrong: refused, or errors where they are looked at; never a crash, a loop, memory
without a limit, or a change of what was refused or opened read-only."""

from __future__ import annotations

import logging
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from contract.runner import Runner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError, WritelogError
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.create import create
from tapcore.formats.vmdk.layout import COWD_HEADER, FOOTER_BYTES, HEADER
from tapcore.formats.vmdk.stream import StreamDecoder, StreamImage
from tapcore.formats.vmdk.tools import VmdkTools
from tapcore.layout import Layout
from tapcore.loop import Loop
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, Request
from tapcore.workers import Workers

SIZE = (1 << 20) + 1536
FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MAX_MEMORY_BYTES = 80 << 20

NUMBERS = st.one_of(
    st.sampled_from((0, 1, 2, 3, 127, 128, 512, 4096, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 42,
                     (1 << 63), (1 << 64) - 1)),
    st.integers(0, 4000), st.integers(0, (1 << 64) - 1))


class Seeds(dict[str, "Seed"]):
    def __repr__(self) -> str:
        return "…"  # it is long, and a failure shows it


@dataclass(frozen=True)
class Seed:
    """The files of a good image, its own first."""

    files: dict[str, bytes] = field(repr=False)

    @property
    def extent(self) -> str:
        """A file with an extent's header."""
        return next(name for name, data in self.files.items() if data[:4] in (b"KDMV", b"COWD"))


def filled(env: Env, path: Path) -> None:
    runner = Runner(env, f"vmdk:{path}")
    data = random.Random(1).randbytes(SIZE)
    assert runner.write(0, data[:200000]) == 0 and runner.write(SIZE - 1000, data[:1000]) == 0
    assert runner.write(600000, data[:100000]) == 0 and runner.discard(65536, 65536) == 0
    runner.close()


def cowd() -> bytes:
    header = COWD_HEADER.pack(magic=b"COWD", version=1, flags=3, numSectors=SIZE // 512, grainSize=1, gdOffset=4,
                              numGDEntries=1, freeSector=64)
    table = b"".join((40 + at % 20).to_bytes(4, "little") for at in range(4096))
    return header + (5).to_bytes(4, "little").ljust(512, b"\0") + table + random.Random(2).randbytes(64 * 512)


def make_seeds(folder: Path) -> Seeds:
    loop = Loop()
    env = Env(loop, Workers(loop, 2), folder)
    seeds = Seeds()
    for name, options in (("sparse", {"zeroed_grain": True}), ("split", {
            "subformat": "twoGbMaxExtentSparse", "split_bytes": 1 << 19, "grain_bytes": 4096}),
            ("flat", {"subformat": "twoGbMaxExtentFlat", "split_bytes": 1 << 19})):
        (folder / name).mkdir()
        create(str(folder / name / "a.vmdk"), SIZE, **options)
        filled(env, folder / name / "a.vmdk")
    (folder / "stream").mkdir()
    with StreamImage(str(folder / "stream" / "a.vmdk"), SIZE) as image:
        image.write(1000, random.Random(3).randbytes(100000) + bytes(300000) + b"x" * 100000)
    (folder / "cowd").mkdir()
    (folder / "cowd" / "a.vmdk").write_text('# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n'
                                            f'createType="vmfsSparse"\nRW {SIZE // 512} VMFSSPARSE "b.vmdk"\n')
    (folder / "cowd" / "b.vmdk").write_bytes(cowd())
    for name in ("sparse", "split", "flat", "stream", "cowd"):
        files = {"a.vmdk": (folder / name / "a.vmdk").read_bytes()}
        seeds[name] = Seed(files | {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())})
    env.workers.close()
    loop.close()
    return seeds


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    with TemporaryDirectory(dir="/dev/shm") as name:
        return make_seeds(Path(name))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


class Bench:
    """A folder with a bad image, and what is done with it."""

    def __init__(self, env: Env, folder: Path, files: dict[str, bytes]) -> None:
        self.env = env
        self.folder = folder
        self.path = folder / "a.vmdk"
        self.refusals: list[str] = []
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}

    def open(self, flags: OpenFlag) -> Runner | None:
        before = self.content()
        try:
            return Runner(self.env, f"vmdk:{self.path}", flags)
        except ChainError as error:
            self.refusals.append(str(error))
            assert self.content() == before, "what was refused was changed"
            return None

    def try_all(self) -> None:
        before = self.content()
        self.look()
        runner = self.open(OpenFlag.RDONLY)
        if runner is not None:
            self.read(runner)
            self.close(runner)
        assert self.content() == before, "what was opened read-only was changed"
        runner = self.open(OpenFlag.NONE)
        if runner is not None:
            self.write(runner)
            self.close(runner)
        self.look()
        self.quietly(lambda: check(str(self.path), repair=True))
        runner = self.open(OpenFlag.RDONLY)
        if runner is not None:
            self.read(runner)
            self.close(runner)

    def look(self) -> None:
        self.quietly(lambda: check(str(self.path)))
        self.quietly(lambda: VmdkTools.describe(str(self.path)))

    def quietly(self, what: Callable[[], object]) -> None:
        try:
            what()
        except (ImageError, UsageError) as error:
            self.refusals.append(str(error))

    def ranges(self, size: int) -> Iterator[tuple[int, int]]:
        for offset in (0, 65536, 500000, size // 2 // 512 * 512, size - 65536):
            if 0 <= offset < size:
                yield offset, min(70000, size - offset)

    def read(self, runner: Runner) -> None:
        for offset, length in self.ranges(runner.size):
            runner.run(Request(READ, offset, length, [memoryview(bytearray(length))]),
                       Request(STATUS, offset, length))

    def write(self, runner: Runner) -> None:
        self.read(runner)
        for offset, length in self.ranges(runner.size):
            data = random.Random(offset).randbytes(length)
            runner.run(Request(WRITE, offset, length, [memoryview(data)]))
            runner.run(Request(READ, offset, length, [memoryview(bytearray(length))]))
            runner.run(Request(DISCARD, offset, 65536 if offset + 65536 <= runner.size else 512))
        runner.run(Request(FLUSH))

    def close(self, runner: Runner) -> None:
        try:
            runner.close()
        except WritelogError as error:
            self.refusals.append(str(error))


def run(env: Env, files: dict[str, bytes]) -> list[str]:
    with TemporaryDirectory(dir="/dev/shm") as name:
        bench = Bench(env, Path(name), files)
        bench.try_all()
        return bench.refusals


def packed(layout: Layout, data: bytes, at: int, field: str, value: int) -> bytes:
    """`data` with another value of a field of the structure at `at`."""
    fields = layout.unpack(data, at)
    former = fields[field]
    for bits in (64, 32, 16, 8):
        fields[field] = (value & (1 << bits) - 1).to_bytes(8, "little")[: len(former)] if isinstance(
            former, bytes) else value & (1 << bits) - 1
        try:
            new = layout.pack(**fields)
        except Exception:
            continue
        kept = bytearray(data)
        kept[at : at + len(new)] = new
        return bytes(kept)
    raise AssertionError(field)


FIELDS = [name for name in HEADER.names if name != "magic"]


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(("sparse", "split", "stream")), changes=st.dictionaries(
    st.sampled_from(FIELDS), NUMBERS, min_size=1, max_size=3), footer=st.booleans())
@example(kind="sparse", changes={"grainSize": 4096, "capacity": 1 << 42}, footer=False)
@example(kind="sparse", changes={"overHead": 0}, footer=False)
@example(kind="stream", changes={"gdOffset": 3}, footer=True)
def test_header_fields(env: Env, seeds: Seeds, kind: str, changes: dict[str, int], footer: bool) -> None:
    seed = seeds[kind]
    data = seed.files[seed.extent]
    at = len(data) - FOOTER_BYTES + 512 if footer and kind == "stream" else 0
    for name, value in changes.items():
        data = packed(HEADER, data, at, name, value)
    tracemalloc.start()
    try:
        run(env, seed.files | {seed.extent: data})
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
    finally:
        tracemalloc.stop()


NAMED_FIELDS = [name for name in FIELDS if name not in ("uncleanShutdown", "lineEnds", "overHead")]


@pytest.mark.parametrize("field", NAMED_FIELDS)
def test_an_absurd_header_field_is_named(env: Env, seeds: Seeds, field: str) -> None:
    seed = seeds["stream" if field == "compressAlgorithm" else "sparse"]
    data = packed(HEADER, seed.files["a.vmdk"], 0, field, (1 << 64) - 2)
    refusals = run(env, {"a.vmdk": data})
    assert any(field in refusal for refusal in refusals), refusals


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURE)
@given(changes=st.dictionaries(st.sampled_from([name for name in COWD_HEADER.names if name != "magic"]), NUMBERS,
                               min_size=1, max_size=3))
def test_fields_of_a_vmfs_sparse_extent(env: Env, seeds: Seeds, changes: dict[str, int]) -> None:
    data = seeds["cowd"].files["b.vmdk"]
    for name, value in changes.items():
        data = packed(COWD_HEADER, data, 0, name, value)
    run(env, seeds["cowd"].files | {"b.vmdk": data})


ENTRIES = st.one_of(st.integers(0, 3000), st.sampled_from((0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF)))


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(("sparse", "split", "stream")), unclean=st.booleans(), changes=st.lists(
    st.tuples(st.sampled_from(("gd", "rgd", "gt", "rgt")), st.integers(0, 40), ENTRIES), min_size=1, max_size=6))
def test_entries_of_directories_and_tables(
    env: Env, seeds: Seeds, kind: str, unclean: bool, changes: list[tuple[str, int, int]]
) -> None:
    seed = seeds[kind]
    data = bytearray(seed.files[seed.extent])
    header = HEADER.unpack(data, len(data) - FOOTER_BYTES + 512 if kind == "stream" else 0)
    data[72] = unclean
    places = {}
    for which, name in (("", "gdOffset"), ("r", "rgdOffset")):
        directory = places[which + "gd"] = header[name] * 512
        places[which + "gt"] = int.from_bytes(data[directory : directory + 4], "little") * 512
    for where, index, value in changes:
        at = places[where] + 4 * (index % 3 if where.endswith("gd") else index)
        if places[where]:
            data[at : at + 4] = value.to_bytes(4, "little")
    run(env, seed.files | {seed.extent: bytes(data)})


LINES = st.one_of(
    st.sampled_from((b"CID=", b"CID=zz", b"parentCID=1", b'parentFileNameHint="a.vmdk"\nparentCID=00000001',
                     b'RW 1 FLAT "a.vmdk" 0', b'RW 99999999999999999999 SPARSE "x"', b'RW 8 SPARSE ""', b"=", b'"',
                     b'RW 2051 SPARSE "a-s001.vmdk"', b'createType="seSparse"', b'RW 8 FLAT "../../etc/passwd" 0',
                     b'RW 8 FLAT "' + b"x" * 5000 + b'" 0', b"\xff\xfe",
                     b'RW 8 FLAT "a-f001.vmdk" 18446744073709551615')),
    st.binary(max_size=60))


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(("sparse", "split", "flat", "stream")), edits=st.lists(
    st.tuples(st.sampled_from(("replace", "insert", "delete", "twice")), st.integers(0, 20), LINES),
    min_size=1, max_size=4))
def test_lines_of_the_descriptor(
    env: Env, seeds: Seeds, kind: str, edits: list[tuple[str, int, bytes]]
) -> None:
    data = seeds[kind].files["a.vmdk"]
    embedded = data[:4] == b"KDMV"
    room = HEADER.unpack(data)["descriptorSize"] * 512 if embedded else 0
    lines = (data[512 : 512 + room] if embedded else data).rstrip(b"\0").split(b"\n")
    for edit, number, line in edits:
        at = number % (len(lines) + 1)
        if edit == "insert":
            lines.insert(at, line)
        elif at < len(lines):
            lines[at : at + 1] = {"replace": [line], "delete": [], "twice": [lines[at]] * 2}[edit]
    text = b"\n".join(lines)
    if embedded:
        text = data[:512] + text[:room].ljust(room, b"\0") + data[512 + room :]
    run(env, seeds[kind].files | {"a.vmdk": text})


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(kind=st.sampled_from(("sparse", "split", "flat", "stream", "cowd")), flips=st.lists(
    st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)), max_size=8),
       cut=st.one_of(st.none(), st.integers(0, 1 << 21)))
def test_flipped_bytes_and_files_that_were_cut_short(
    env: Env, seeds: Seeds, kind: str, flips: list[tuple[int, int]], cut: int | None
) -> None:
    files = dict(seeds[kind].files)
    for number, (at, mask) in enumerate(flips):
        name = list(files)[number % len(files)]
        data = bytearray(files[name])
        if data:
            # Most of a file is data, so most flips go to its beginning.
            data[at % len(data) if number % 4 == 0 else at % min(len(data), 20480)] ^= mask
            files[name] = bytes(data)
    if cut is not None:
        name = list(files)[cut % len(files)]
        files[name] = files[name][:cut]
    run(env, files)


@settings(max_examples=80, deadline=None, suppress_health_check=FIXTURE)
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)), max_size=4),
       cut=st.one_of(st.none(), st.integers(0, 1 << 18)), step=st.sampled_from((1000, 4096, 70001)))
def test_streams_that_are_damaged_on_the_way(
    seeds: Seeds, flips: list[tuple[int, int]], cut: int | None, step: int
) -> None:
    data = bytearray(seeds["stream"].files["a.vmdk"])
    for number, (at, mask) in enumerate(flips):
        data[at % len(data) if number % 2 else at % 2048] ^= mask
    del data[len(data) if cut is None else cut :]
    decoder = StreamDecoder("the pipe")
    last = 0
    try:
        for at in range(0, len(data), step):
            for offset, grain in decoder.feed(data[at : at + step]):
                assert offset >= last and decoder.size_bytes is not None
                last = offset + len(grain)
                assert last <= decoder.size_bytes
        decoder.finish()
    except ImageError as error:
        assert str(error).startswith("the pipe: ")


def test_the_seeds_are_good(env: Env, seeds: Seeds) -> None:
    for kind, seed in seeds.items():
        refusals = run(env, dict(seed.files))
        assert all("written" in refusal for refusal in refusals), (kind, refusals)
