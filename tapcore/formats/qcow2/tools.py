"""qcow2: the tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tapcore.driver import OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.probe import format_name
from tapcore.formats.qcow2.check import check
from tapcore.formats.qcow2.create import create
from tapcore.formats.qcow2.header import set_backing
from tapcore.formats.qcow2.layout import COMPRESSIONS, LAZY_REFCOUNTS
from tapcore.formats.qcow2.load import load_header
from tapcore.formats.qcow2.pack import PackedImage
from tapcore.formats.tools import Backing, ImageTools, Packer, Report
from tapcore.params import size_bytes as parse_size
from tapcore.params import whole


class Qcow2Tools(ImageTools):
    name = "qcow2"
    qemu_name = "qcow2"
    options: ClassVar[Mapping[str, str]] = {
        "version": "2, or 3 (the default)",
        "cluster_size": "512 to 2M (64K)",
        "refcount_bits": "1, 2, 4, 8, 16, 32 or 64 (16)",
        "lazy_refcounts": "on or off (off)",
        "extended_l2": "on or off (off): subclusters, for large clusters over a backing file",
        "data_file": "the path of a raw file for the guest's data, relative to the image's folder (none)",
        "data_file_raw": "on or off (off): the data file always is what the guest sees",
        "compression": "zlib or zstd, of clusters that are written compressed (zlib)",
    }

    file_options = ("data_file",)

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        options = options or {}
        switches = {name: _switch(name, options.get(name, "off"))
                    for name in ("lazy_refcounts", "extended_l2", "data_file_raw")}
        create(
            path, size_bytes,
            backing=backing.path if backing else None,
            backing_format=format_name(backing.driver) if backing else None,
            version=whole("version", options.get("version", "3")), cluster_bits=_cluster_bits(options),
            refcount_bits=whole("refcount_bits", options.get("refcount_bits", "16")),
            compression=options.get("compression", "zlib"), data_file=options.get("data_file"), **switches)

    @classmethod
    def packer(cls, path: str, size_bytes: int, options: Mapping[str, str], *, compress: bool) -> Packer | None:
        if not compress:
            return None
        others = sorted(set(options) - {"version", "cluster_size", "compression"})
        if others:
            raise UsageError(f"{others[0]} is not an option of an image that is written compressed",
                             hint="they are version, cluster_size and compression")
        return PackedImage(path, size_bytes, version=whole("version", options.get("version", "3")),
                           cluster_bits=_cluster_bits(options), compression=options.get("compression", "zlib"))

    @classmethod
    def check(cls, path: str, *, repair: bool = False) -> Report:
        return check(path, repair=repair)

    @classmethod
    def describe(cls, path: str) -> dict[str, Any]:
        file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
        try:
            header = load_header(file)
        finally:
            file.close()
        data = {} if header.data_file is None else {
            "data_file": header.data_file, "data_file_raw": header.data_is_raw}
        return {
            "version": header.version, "cluster_bytes": header.cluster_bytes,
            "refcount_bits": 1 << header.refcount_order, "compression": COMPRESSIONS[header.compression_type],
            "lazy_refcounts": bool(header.compatible_features & LAZY_REFCOUNTS),
            "extended_l2": header.has_subclusters, "snapshots": header.nb_snapshots, **data,
        }

    @classmethod
    def set_backing(cls, path: str, backing: Backing | None) -> None:
        set_backing(path, backing)

    @classmethod
    def resize(cls, path: str, size_bytes: int, *, shrink: bool = False) -> None:
        from tapcore.formats.qcow2.resize import resize  # it opens chains, whose drivers import what is here

        resize(path, size_bytes, shrink=shrink)


def _cluster_bits(options: Mapping[str, str]) -> int:
    cluster_bytes = parse_size("cluster_size", options.get("cluster_size", "64K"))
    if cluster_bytes & (cluster_bytes - 1) or not cluster_bytes:
        raise UsageError(f"cluster_size {cluster_bytes} is not a power of two")
    return cluster_bytes.bit_length() - 1


def _switch(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{name} {text!r} is neither on nor off")
    return text == "on"
