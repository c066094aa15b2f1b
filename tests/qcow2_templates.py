"""Small qcow2 images of every kind, to be damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from contract.runner import Runner
from formats_fuzz import Template
from qcow2_images import qemu

from tapcore.driver import Env
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.layout import HEADER_V2, HEADER_V3, OFFSET_MASK, SNAPSHOT
from tapcore.formats.qcow2.snapshots import create_snapshot
from tapcore.layout import Layout
from tapcore.loop import Loop
from tapcore.workers import Workers

SIZE = 96 * 1024
HEADER = Layout("qcow2 header, both parts", ">", """
    magic:4s version:I backing_file_offset:Q backing_file_size:I cluster_bits:I size:Q crypt_method:I l1_size:I
    l1_table_offset:Q refcount_table_offset:Q refcount_table_clusters:I nb_snapshots:I snapshots_offset:Q
    incompatible_features:Q compatible_features:Q autoclear_features:Q refcount_order:I header_length:I
    compression_type:B :7x""", size=HEADER_V2.size + HEADER_V3.size)


def written(env: Env, path: Path) -> None:
    runner = Runner(env, f"qcow2:{path}")
    rng = random.Random(1)
    for at in range(0, SIZE, 6144):
        assert runner.write(at, rng.randbytes(1500)) == 0
        assert runner.zeroes(at + 2048, 2048) == 0
    runner.close()


def plain(env: Env, path: Path) -> None:
    create(str(path), SIZE, cluster_bits=9)
    written(env, path)


def version_2(env: Env, path: Path) -> None:
    create(str(path), SIZE, cluster_bits=9, version=2)
    written(env, path)


def narrow(env: Env, path: Path) -> None:
    create(str(path), SIZE, cluster_bits=10, refcount_bits=1)
    written(env, path)


def with_snapshots(env: Env, path: Path) -> None:
    plain(env, path)
    create_snapshot(str(path), "one")
    written(env, path)
    create_snapshot(str(path), "two")


def overlay(env: Env, path: Path) -> None:
    (path.parent / "base.raw").write_bytes(b"b" * 50000 + bytes(176))
    create(str(path), SIZE, cluster_bits=9, backing="base.raw", backing_format="raw")
    written(env, path)


def subclusters(env: Env, path: Path) -> None:
    create(str(path), SIZE, cluster_bits=14, extended_l2=True)
    written(env, path)


def compressed(env: Env, path: Path) -> None:
    raw = path.parent / "a.raw"
    raw.write_bytes(b"".join(bytes([at]) * 3000 + random.Random(at).randbytes(1096) for at in range(SIZE // 4096)))
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    raw.unlink()


def with_bitmaps(env: Env, path: Path) -> None:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "b0")


def with_data_file(env: Env, path: Path) -> None:
    create(str(path), SIZE, cluster_bits=9, data_file="a.data")
    written(env, path)


KINDS: dict[str, Callable[[Env, Path], None]] = {make.__name__: make for make in (
    plain, version_2, narrow, with_snapshots, overlay, subclusters, compressed, with_bitmaps, with_data_file)}


def u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big")


@cache
def template(kind: str) -> Template:
    with TemporaryDirectory() as name:
        loop = Loop()
        env = Env(loop, Workers(loop, 2))
        path = Path(name) / "a.qcow2"
        KINDS[kind](env, path)
        env.workers.close()
        loop.close()
        others = {other.name: other.read_bytes() for other in Path(name).iterdir() if other != path}
        data = path.read_bytes()
    header = HEADER_V2.unpack(data)
    tables = [(header["l1_table_offset"], header["l1_size"])]
    at = header["snapshots_offset"]
    for _ in range(header["nb_snapshots"]):
        fields = SNAPSHOT.unpack(data, at)
        tables += [(at, 10), (fields["l1_table_offset"], fields["l1_size"])]
        at += SNAPSHOT.size + fields["extra_data_size"] + fields["id_str_size"] + fields["name_size"] + 7 & ~7
    pointers = [u64(data, start + 8 * number) & OFFSET_MASK for start, count in tables for number in range(count)]
    tables += [(host, 12) for host in pointers if 0 < host < len(data)]
    tables += [(header["refcount_table_offset"], 4), (u64(data, header["refcount_table_offset"]), 16)]
    words = [word for start, count in tables for word in range(start, start + 8 * count, 8) if word < len(data)]
    return Template(kind, data, HEADER, words, [start for start, _ in tables], others)
