"""vmdk: the tools."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from tapcore.driver import OpenFlag
from tapcore.errors import UsageError
from tapcore.formats.imagefile import ImageFile
from tapcore.formats.tools import Backing, ImageTools, Packer, Report
from tapcore.formats.vmdk.check import check
from tapcore.formats.vmdk.create import ADAPTERS, SUBFORMATS, Parent, check_parent, create
from tapcore.formats.vmdk.descriptor import NO_PARENT_CID, SPARSE_TYPES, replace_entries
from tapcore.formats.vmdk.load import load_image, open_sparse
from tapcore.formats.vmdk.resize import resize
from tapcore.formats.vmdk.rewrite import rewrite
from tapcore.formats.vmdk.stream import StreamImage
from tapcore.params import size_bytes as parse_size

STREAM: Final = "streamOptimized"


class VmdkTools(ImageTools):
    name = "vmdk"
    qemu_name = "vmdk"
    options: ClassVar[Mapping[str, str]] = {
        "subformat": f"{', '.join(SUBFORMATS)} (monolithicSparse)",
        "zeroed_grain": "on or off: grains can be marked as zero, which needs version 2 (off)",
        "adapter_type": f"{', '.join(ADAPTERS)} (ide)",
        "grain_size": "4K to 2M (64K)",
    }

    @classmethod
    def create(
        cls, path: str, size_bytes: int, *, backing: Backing | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        options = options or {}
        zeroed = options.get("zeroed_grain", "off")
        if zeroed not in ("on", "off"):
            raise UsageError(f"zeroed_grain {zeroed!r} is neither on nor off")
        create(path, size_bytes, subformat=options.get("subformat", "monolithicSparse"),
               parent=_parent(path, backing) if backing else None, zeroed_grain=zeroed == "on",
               adapter_type=options.get("adapter_type", "ide"),
               grain_bytes=parse_size("grain_size", options.get("grain_size", "64K")))

    @classmethod
    def packer(cls, path: str, size_bytes: int, options: Mapping[str, str], *, compress: bool) -> Packer | None:
        """A stream, which is asked for by its subformat too."""
        if options.get("subformat", STREAM if compress else "") != STREAM:
            if compress:
                raise UsageError(f"a compressed vmdk has the subformat {STREAM}", hint="leave out the other one")
            return None
        others = sorted(set(options) - {"subformat", "adapter_type"})
        if others:
            raise UsageError(f"{others[0]} is not an option of {STREAM}", hint="it has adapter_type alone")
        adapter = options.get("adapter_type", ADAPTERS[0])
        if adapter not in ADAPTERS:
            raise UsageError(f"adapter_type {adapter!r} is none of {', '.join(ADAPTERS)}")
        return StreamImage(path, size_bytes, adapter_type=adapter)

    @classmethod
    def check(cls, path: str, *, repair: bool = False) -> Report:
        return check(path, repair=repair)

    @classmethod
    def describe(cls, path: str) -> dict[str, Any]:
        file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
        try:
            image = load_image(file)
            descriptor = image.descriptor
            headers = [image.header] if image.header else []
            for line in [] if image.header else descriptor.extents:
                if line.kind in SPARSE_TYPES:
                    extent, header = open_sparse(image, line, OpenFlag.RDONLY | OpenFlag.QUERY, ImageFile.open)
                    extent.close()
                    headers.append(header)
        finally:
            file.close()
        found: dict[str, Any] = {
            "subformat": descriptor.create_type, "cid": f"{descriptor.cid:08x}",
            "parent_cid": f"{descriptor.parent_cid:08x}",
            "adapter_type": descriptor.entries.get("ddb.adapterType"),
            "extents": [line.name for line in descriptor.extents] if not image.header else [Path(path).name],
        }
        if headers:
            first = headers[0]
            found |= {"version": first.version, "grain_bytes": first.grain_bytes,
                      "zeroed_grain": all(header.has_zero_grain for header in headers),
                      "redundant_tables": all(bool(header.rgd_offset) for header in headers),
                      "closed": not any(header.unclean for header in headers)}
        return found

    @classmethod
    def set_backing(cls, path: str, backing: Backing | None) -> None:
        """Also accepts a parent as it is that was written since: its present CID is what the image then knows."""
        parent = _parent(path, backing) if backing else None
        file = ImageFile.open(path, OpenFlag.NONE)
        try:
            image = load_image(file)
            if parent is not None:
                check_parent(parent, image.descriptor.create_type)
            cid = parent.cid if parent else NO_PARENT_CID
            changes = {"parentCID": f"{cid:08x}", "parentFileNameHint": f'"{parent.hint}"' if parent else None}
            rewrite(image, partial(replace_entries, changes=changes))
        finally:
            file.close()

    @classmethod
    def accept_backing(cls, path: str) -> None:
        file = ImageFile.open(path, OpenFlag.RDONLY | OpenFlag.QUERY)
        try:
            hint = load_image(file).descriptor.parent_hint
        finally:
            file.close()
        if hint is not None:
            cls.set_backing(path, Backing(hint, cls.name))


    @classmethod
    def resize(cls, path: str, size_bytes: int, *, shrink: bool = False) -> None:
        resize(path, size_bytes)


def _parent(path: str, backing: Backing) -> Parent:
    """UsageError, ImageError for what cannot be a parent."""
    if backing.driver != "vmdk":
        raise UsageError(f"the backing of a vmdk is a vmdk, not {backing.driver}",
                         hint="convert one of them, or choose another format: -f qcow2")
    file = ImageFile.open(str(Path(path).parent / backing.path), OpenFlag.RDONLY | OpenFlag.QUERY)
    try:
        return Parent(backing.path, load_image(file).descriptor.cid)
    finally:
        file.close()
