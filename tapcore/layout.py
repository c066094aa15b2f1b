"""Binary structures, declared once, in the order of their specification.

    HEADER = Layout("ring header", "<", "req_prod:I req_event:I rsp_prod:I rsp_event:I :48x", size=64)
    HEADER.pack(req_prod=0, req_event=1, rsp_prod=0, rsp_event=1)
    HEADER.unpack(buffer, offset)["rsp_prod"]

A field is `name:code` with a code of the `struct` module; one without a name is padding. The size is checked
at import. Hot loops take `layout.struct` and its bound methods.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap
"""What holds bytes (collections.abc.Buffer comes with Python 3.12)."""


class Layout:
    """One fixed-size structure: `byte_order` as in `struct`, `size` in bytes."""

    def __init__(self, title: str, byte_order: str, fields: str, *, size: int) -> None:
        pairs = [field.split(":") for field in fields.split()]
        self.title = title
        self.names = tuple(name for name, _ in pairs if name)
        self.struct = struct.Struct(byte_order + "".join(code for _, code in pairs))
        self.size = size
        if self.struct.size != size:
            raise AssertionError(f"{title}: declared {size} bytes, fields take {self.struct.size}")

    def pack(self, **values: Any) -> bytes:
        """The structure's bytes; KeyError if a field is missing."""
        return self.struct.pack(*[values[name] for name in self.names])

    def pack_into(self, buffer: Buffer, offset: int, **values: Any) -> None:
        """Write the structure at `offset` bytes of `buffer`; KeyError if a field is missing."""
        self.struct.pack_into(buffer, offset, *[values[name] for name in self.names])

    def unpack(self, buffer: Buffer, offset: int = 0) -> dict[str, Any]:
        """Field values by name; struct.error if fewer than `size` bytes are left."""
        return dict(zip(self.names, self.struct.unpack_from(buffer, offset), strict=True))
