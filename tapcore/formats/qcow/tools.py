"""qcow: the tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tapcore.driver import OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.qcow.check import check
from tapcore.formats.qcow.create import create, set_backing
from tapcore.formats.qcow.layout import load_header
from tapcore.formats.tools import Backing, ImageTools, Report
from tapcore.params import size_bytes as parse_size


class QcowTools(ImageTools):
    name = "qcow"
    qemu_name = "qcow"
    options: ClassVar[Mapping[str, str]] = {"cluster_size": "512 to 64K (4K; over a backing file always 512)"}

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        default = "512" if backing else "4K"
        cluster_bytes = parse_size("cluster_size", (options or {}).get("cluster_size", default))
        if backing and cluster_bytes != 512:
            raise UsageError(f"cluster_size {cluster_bytes}: over a backing file it is 512",
                             hint="leave it out: QEMU does not copy what a write leaves of a larger one")
        if cluster_bytes & (cluster_bytes - 1) or not cluster_bytes:
            raise UsageError(f"cluster_size {cluster_bytes} is not a power of two")
        create(path, size_bytes, backing=backing, cluster_bits=cluster_bytes.bit_length() - 1)

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
        return {"version": 1, "cluster_bytes": header.cluster_bytes, "l2_table_bytes": header.l2_bytes,
                "variant": "xen" if header.is_xen else "qemu"}

    @classmethod
    def set_backing(cls, path: str, backing: Backing | None) -> None:
        set_backing(path, backing)
