"""Constants and structures, against bytes written out by hand from the specification."""

from __future__ import annotations

import errno

import pytest

from tapcore.nbd import wire


def test_magic_numbers_are_their_ascii() -> None:
    assert wire.NBDMAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert wire.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"


def test_request() -> None:
    data = wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=wire.NBD_CMD_FLAG_FUA, type=wire.NBD_CMD_WRITE,
                             cookie=0x0102030405060708, offset=0x1000, length=0x200)
    assert data == bytes.fromhex("25609513 0001 0001 0102030405060708 0000000000001000 00000200")


def test_replies() -> None:
    simple = wire.SIMPLE_REPLY.pack(magic=wire.NBD_SIMPLE_REPLY_MAGIC, error=wire.NBD_ENOSPC, cookie=7)
    assert simple == bytes.fromhex("67446698 0000001c 0000000000000007")
    chunk = wire.DATA_CHUNK.pack(magic=wire.NBD_STRUCTURED_REPLY_MAGIC, flags=wire.NBD_REPLY_FLAG_DONE,
                                 type=wire.NBD_REPLY_TYPE_OFFSET_DATA, cookie=7, length=9, offset=512)
    assert chunk == bytes.fromhex("668e33ef 0001 0001 0000000000000007 00000009 0000000000000200")
    assert wire.NBD_REPLY_TYPE_ERROR == 0x8001
    assert wire.NBD_REPLY_TYPE_ERROR_OFFSET == 0x8002


def test_option_and_its_reply() -> None:
    option = wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_GO, length=6)
    assert option == b"IHAVEOPT" + bytes.fromhex("00000007 00000006")
    reply = wire.OPTION_REPLY.pack(magic=wire.NBD_REP_MAGIC, option=wire.NBD_OPT_GO,
                                   type=wire.NBD_REP_ERR_UNKNOWN, length=0)
    assert reply == bytes.fromhex("0003e889045565a9 00000007 80000006 00000000")


@pytest.mark.parametrize(("code", "expected"), [
    (0, 0), (errno.EPERM, 1), (errno.EROFS, 1), (errno.EIO, 5), (errno.ENOMEM, 12), (errno.EINVAL, 22),
    (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EFBIG, 28), (errno.EOVERFLOW, 75), (errno.ENOTSUP, 95),
    (errno.ESHUTDOWN, 108), (errno.ENOENT, 5), (errno.ESTALE, 5), (9999, 5),
])
def test_errno_on_the_wire(code: int, expected: int) -> None:
    assert wire.nbd_error(code) == expected
