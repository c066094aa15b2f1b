"""What is on the wire of the NBD protocol: constants under their names in the specification, and structures.

Specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
Everything is big-endian. Offsets, lengths and sizes are bytes.
"""

from __future__ import annotations

import errno
from typing import Final

from tapcore.layout import Layout

DEFAULT_TCP_PORT: Final = 10809

# Magic numbers. "IHAVEOPT" follows NBDMAGIC in the greeting and starts every option.
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
NBD_REP_MAGIC: Final = 0x0003E889045565A9
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

# Handshake flags of the server, and the client's answer.
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags of an export.
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_RESIZE: Final = 1 << 9
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_PEEK_EXPORT: Final = 4
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7
NBD_CMD_RESIZE: Final = 8

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4

NBD_REPLY_FLAG_DONE: Final = 1 << 0

NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

# Bits of an extent in the metadata context base:allocation, and in qemu:dirty-bitmap:NAME.
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1
QEMU_STATE_DIRTY: Final = 1 << 0
BASE_ALLOCATION: Final = "base:allocation"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

NBD_ERRORS: Final[dict[int, int]] = {
    errno.EPERM: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EIO: NBD_EIO,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
    errno.EOVERFLOW: NBD_EOVERFLOW,
    errno.EOPNOTSUPP: NBD_ENOTSUP,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}
"""What an errno is on the wire; every other one is NBD_EIO."""


def nbd_error(code: int) -> int:
    """The error field that stands for the errno `code` on the wire; 0 (success) stays 0."""
    return NBD_ERRORS.get(code, NBD_EIO) if code else 0


MAX_STRING_BYTES: Final = 4096
"""The longest string (export name, description, context, error text) that the protocol allows."""
DEFAULT_MAX_PAYLOAD_BYTES: Final = 32 << 20
"""What a client may put into one request when no block sizes were exchanged."""
RESERVED_ZEROES: Final = bytes(124)
"""What follows EXPORT_REPLY unless both sides said NO_ZEROES."""

GREETING = Layout("greeting", ">", "nbdmagic:Q ihaveopt:Q handshake_flags:H", size=18)
CLIENT_FLAGS = Layout("client flags", ">", "flags:I", size=4)
OPTION = Layout("option", ">", "magic:Q option:I length:I", size=16)
OPTION_REPLY = Layout("option reply", ">", "magic:Q option:I type:I length:I", size=20)
EXPORT_REPLY = Layout("answer to NBD_OPT_EXPORT_NAME", ">", "size_bytes:Q flags:H", size=10)

LENGTH = Layout("length of a string, or number of queries", ">", "value:I", size=4)
INFO_COUNT = Layout("number of information requests", ">", "value:H", size=2)
INFO_TYPE = Layout("type of an information", ">", "type:H", size=2)
INFO_EXPORT = Layout("NBD_INFO_EXPORT", ">", "type:H size_bytes:Q flags:H", size=12)
INFO_BLOCK_SIZE = Layout("NBD_INFO_BLOCK_SIZE", ">", "type:H min_block:I preferred_block:I max_block:I", size=14)
META_CONTEXT = Layout("head of NBD_REP_META_CONTEXT", ">", "id:I", size=4)

REQUEST = Layout("request", ">", "magic:I flags:H type:H cookie:Q offset:Q length:I", size=28)
SIMPLE_REPLY = Layout("simple reply", ">", "magic:I error:I cookie:Q", size=16)
CHUNK = Layout("structured reply chunk", ">", "magic:I flags:H type:H cookie:Q length:I", size=20)
OFFSET_DATA = Layout("head of NBD_REPLY_TYPE_OFFSET_DATA", ">", "offset:Q", size=8)
DATA_CHUNK = Layout("structured reply chunk with data", ">", "magic:I flags:H type:H cookie:Q length:I offset:Q",
                    size=28)
HOLE_CHUNK = Layout("structured reply chunk for a hole", ">",
                    "magic:I flags:H type:H cookie:Q length:I offset:Q hole_bytes:I", size=32)
OFFSET_HOLE = Layout("NBD_REPLY_TYPE_OFFSET_HOLE", ">", "offset:Q length:I", size=12)
ERROR = Layout("head of an error chunk", ">", "error:I message_length:H", size=6)
ERROR_OFFSET = Layout("tail of NBD_REPLY_TYPE_ERROR_OFFSET", ">", "offset:Q", size=8)
STATUS_CONTEXT = Layout("head of NBD_REPLY_TYPE_BLOCK_STATUS", ">", "context_id:I", size=4)
STATUS_EXTENT = Layout("extent of a block status", ">", "length:I flags:I", size=8)
