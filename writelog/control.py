"""The log's control socket, as bytes: no I/O here (docs/protocol.md).

A client's message is 20 bytes: a command of 4, and 16 of parameters. With a first parameter byte of 0 it is the
original's, whatever follows; 1 makes it a version 1 message:

    byte  0        1   2..3   4..7   8..15
          version  op  lease  count  sector       little-endian, sectors of 512 bytes

| command, op    | lease | count             | sector       | what it does                                        |
| -------------- | ----- | ----------------- | ------------ | --------------------------------------------------- |
| `peek` EXTENTS | 0     | sectors to look   | where to     | the dirty or leased extents are in the export area, |
|                |       | at, 0: to the end | start        | as for the original                                 |
| `peek` BITMAP  | 0     | as above          | as above; on | one bit a block in the export area, bit 0 of byte 0 |
|                |       |                   | 8 blocks     | is the block at `sector`; at most 33,554,432 blocks |
| `peek` FIGURES | 0     | 0                 | 0            | FIGURES (writelog.shm) is in the export area        |
| `peek` TOUCHED | 0     | 0                 | where to     | one bit a chunk of 64 KiB in the export area, for   |
|                |       |                   | start        | the chunks written to since the last such message;  |
|                |       |                   |              | the first one, of nothing, begins the watching      |
| `getw` TAKE    | 0: a  | sectors to look   | where to     | dirty extents that no write is in flight to are in  |
|                | new   | at, 0: to the end | start        | the export area and in the lease; not what a lease  |
|                | one   |                   |              | holds already                                       |
| `getw` LISTED  | as    | ranges in the     | which of     | as TAKE, but only of the ranges that the client has |
|                | above | export area       | them: from   | put into the export area, ascending and apart       |
|                |       |                   | this sector  |                                                     |
| `clrw` COMMIT  | which | sectors, 0: all   | where to     | the blocks entirely inside are forgotten; "all"     |
|                |       | and the lease     | start        | closes the lease                                    |
| `clrw` RECLAIM | which | as above          | as above     | the blocks touched are dirty again; "all" closes it |
| `clrw` FILL    | 0     | 0                 | 0            | every block of the disk is dirty, durably, and the  |
|                |       |                   |              | log has a new base: a full resync begins            |
| `clrw` ADOPT   | 0     | 0                 | base, or     | what is committed from now on, the copy of that     |
|                |       |                   | former       | name has, which is called by a new base from now    |
|                |       |                   |              | on, durably; ESTALE if the log counts for another   |

Sectors to look at are rounded outwards to whole blocks.

The reply is `done` or, if the message was refused, `fail`; the connection lives either way. What came of a version
1 message is in the RESULT at 4 MiB + 16 of the region, in the padding of the ring's header, where the original
looks at nothing: `error`, an errno (EPROTONOSUPPORT for a version that is not known, EINVAL for an op or a sector,
ENOENT for a lease of nobody or of somebody else, ENOSPC for too many leases); `lease`, that of a TAKE; `count`,
ranges exported or blocks in the bitmap; `next_sector`, where the same message has to go on because the export area
was full, or 0 when there is nothing more; of a FILL or an ADOPT the new base.

The base is a name for the copy that the log counts for: it lacks what is dirty or leased, and nothing else, as
long as only those clear bits who speak for it. So a COMMIT, `getw` or `clrw` of a connection that has sent neither
FILL nor ADOPT takes the base away (it is 0 then), and the copy needs all of the disk. After an ADOPT the copy may
still go by the name before, `former`, until a COMMIT clears bits: by then it has to have noted down the new one,
durably, so that no two states of it have the same name.

A lease belongs to its connection: what is not committed when the connection ends is dirty again. A connection that
has sent a version 1 `getw` or `clrw` holds the log until it ends: meanwhile those of others, also the original's,
are answered `fail` (EBUSY), since what they took or cleared the holder would miss. All may `peek` and read,
but only one may watch, until it ends (EBUSY).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tapcore.errors import ProtocolError
from tapcore.layout import Buffer, Layout
from writelog.shm import FIGURES, REGION_BYTES

SHMP: Final = b"shmp"
PEEK: Final = b"peek"
CLEAR: Final = b"clrw"
GET: Final = b"getw"
KICK: Final = b"kick"
COMMANDS: Final = (SHMP, PEEK, CLEAR, GET, KICK)

DONE: Final = b"done"
FAIL: Final = b"fail"

MESSAGE = Layout("log_ctlmsg", "<", "command:4s version:B op:B lease:H count:I sector:Q", size=20)
SHMP_REPLY = Layout("shmp reply", "<", "size_bytes:I name:252s", size=256)
STATUS_BYTES: Final = 4
KICK_MESSAGE: Final = KICK + bytes(16)


class Version(IntEnum):
    ORIGINAL = 0
    """All parameters are zero."""
    LEASES = 1
    """Cursors, leases, dense bitmaps, figures."""


class PeekOp(IntEnum):
    EXTENTS = 0
    BITMAP = 1
    FIGURES = 2
    TOUCHED = 3


class GetOp(IntEnum):
    TAKE = 0
    LISTED = 1


class ClearOp(IntEnum):
    COMMIT = 0
    RECLAIM = 1
    FILL = 2
    ADOPT = 3


OPS: Final[dict[bytes, type[IntEnum]]] = {PEEK: PeekOp, GET: GetOp, CLEAR: ClearOp}


@dataclass(frozen=True)
class Message:
    """One message of a client; see the table."""

    command: bytes
    version: int = Version.ORIGINAL
    op: int = 0
    lease: int = 0
    count: int = 0
    sector: int = 0

    def encode(self) -> bytes:
        return MESSAGE.pack(**vars(self))

    @property
    def is_known(self) -> bool:
        """Whether version and op are among those of the table."""
        if self.version == Version.ORIGINAL:
            return True
        ops = OPS.get(self.command)
        return self.version == Version.LEASES and ops is not None and self.op in list(ops)


@dataclass(frozen=True)
class Figures:
    """The state of a log."""

    granularity_bytes: int
    sectors: int
    """Size of the disk."""
    generation: int
    """A random number drawn when the bitmap was made. One that a client does not know says that the log may miss
    writes from before: all of the disk has to be read."""
    dirty_blocks: int
    leased_blocks: int
    in_flight: int
    """Writes that were submitted and have not ended."""
    clients: int
    leases: int
    current: int
    base: int
    former: int
    """See writelog.generations."""

    def encode(self) -> bytes:
        return FIGURES.pack(version=Version.LEASES, **vars(self))

    @classmethod
    def decode(cls, data: Buffer) -> Figures:
        """ProtocolError if it is of a later version."""
        fields = FIGURES.unpack(data)
        if (version := fields.pop("version")) != Version.LEASES:
            raise ProtocolError(f"log figures of version {version}", hint="the tapdisk is newer than this client")
        return cls(**fields)


class Decoder:
    """Bytes from a client in, messages out; a message may come in pieces, or many at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. ProtocolError on a command that nobody defined: the stream is out of
        step, or the peer speaks something else."""
        buffer = self._buffer
        buffer += data
        whole = len(buffer) - len(buffer) % MESSAGE.size
        messages = []
        for start in range(0, whole, MESSAGE.size):
            message = Message(**MESSAGE.unpack(buffer, start))
            if message.command not in COMMANDS:
                raise ProtocolError(f"unknown command {message.command!r} on the log's control socket")
            if message.version == Version.ORIGINAL:
                message = Message(message.command)
            messages.append(message)
        del buffer[:whole]
        return messages


def encode_shmp_reply(name: str) -> bytes:
    """The reply that names the region; an empty name and a size of 0 say that there is none."""
    return SHMP_REPLY.pack(size_bytes=REGION_BYTES if name else 0, name=name.encode("ascii"))


def decode_shmp_reply(data: bytes) -> str:
    """The region's name; ProtocolError if the server has none or it makes no sense."""
    reply = SHMP_REPLY.unpack(data)
    name: str = reply["name"].split(b"\0", 1)[0].decode("ascii", "replace")
    if reply["size_bytes"] != REGION_BYTES or not name.startswith("/") or "/" in name[1:] or len(name) < 2:
        raise ProtocolError(f"the log server has no region for this client (size {reply['size_bytes']}, {name!r})",
                            hint="see the tapdisk's log; /dev/shm may be full")
    return name


class ReplyDecoder:
    """Bytes from a server in; replies and kicks out, which share the stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._reply_bytes: list[int] = []
        self.kicks = 0
        """Kick messages received."""

    def expect(self, size_bytes: int) -> None:
        """The reply to the message just sent will have `size_bytes`."""
        self._reply_bytes.append(size_bytes)

    def feed(self, data: bytes) -> list[bytes]:
        """The replies that `data` completes; ProtocolError on bytes that nobody waits for."""
        buffer = self._buffer
        buffer += data
        replies: list[bytes] = []
        while len(buffer) >= STATUS_BYTES:
            if buffer.startswith(KICK):
                size_bytes = MESSAGE.size
            elif self._reply_bytes:
                size_bytes = self._reply_bytes[0]
            else:
                raise ProtocolError(f"unexpected bytes {bytes(buffer[:STATUS_BYTES])!r} from the log server")
            if len(buffer) < size_bytes:
                break
            reply = bytes(buffer[:size_bytes])
            del buffer[:size_bytes]
            if reply.startswith(KICK):
                self.kicks += 1
            else:
                self._reply_bytes.pop(0)
                replies.append(reply)
        return replies
