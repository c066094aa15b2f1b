"""The replication protocol: what a sync and a replica say to each other. Bytes in, messages out; no I/O.

    sync                                     replica
      HELLO version, session, size, ──────▶  right version, size, writable, no other sync, no copy of
            base, former                     something else: else REFUSED
                                    ◀──────  WELCOME: which of the two it holds, credit, journal; or FACTS, if
                                             the HELLO only asked, and nothing has begun
      BASE                          ──────▶  the copy's name from now on, recorded before what follows is applied
      DATA, ZERO, PACKED … (seq 1, 2 …) ──▶  checked, applied in order where they overlap
      PROBE seq, digests            ──────▶  compared with what is there, in that order too
                                    ◀──────  PROBED seq: which pieces differ
                                    ◀──────  ACK applied, durable: all up to these seqs; at least once a second
      BARRIER seq                   ──────▶  applies all before it, flushes; no PROBE may be without its answer
                                    ◀──────  DIGEST of all that this connection brought, in order
      VERIFY (optional)             ──────▶  reads its whole disk back
                                    ◀──────  CONTENT digest
      EPOCH digest                  ──────▶  that is the disk at one instant: its copy from now on
                                    ◀──────  KEPT epoch
      PROMOTE digest, or RELEASE    ──────▶  opens its export, or stays a replica
                                    ◀──────  PROMOTED or RELEASED

A message is one header frame, a msgpack array [kind, field …] with the fields of the class of that kind in their
order, sealed by its xxh3_64 in the 8 bytes behind it; and for DATA and PACKED a second frame, the payload. In any
version, HELLO begins [1, version] and REFUSED keeps its form, so that two versions can always tell each other
that they do not match. Instead of any answer the replica can send ERROR; then the session is over. Errors with
EBADMSG say that something was damaged, lost or doubled on the way: a new connection mends that. A connection that
drops is followed by a new one that begins with HELLO and seq 1. Offsets and lengths are bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Final, TypeAlias

import msgpack
import xxhash
import zstandard

from tapcore.errors import ProtocolError
from tapcore.layout import Buffer, Layout
from writelog.hashtree import DIGEST_BYTES, LEAF_BYTES, MAX_MASK_BYTES, MAX_PIECES, pieces_of

VERSION: Final = 3

MAX_HEADER_BYTES: Final = 8192
SEAL_BYTES: Final = 8
MAX_TEXT_CHARS: Final = 1024
MAX_DATA_BYTES: Final = 1 << 20
"""Payload of one DATA."""
MAX_ZERO_BYTES: Final = 1 << 30
"""Range of one ZERO."""
MAX_INT: Final = (1 << 63) - 1
MAX_BASE: Final = (1 << 64) - 1
CHECKSUM_BYTES: Final = 16
NO_CHECKSUM: Final = bytes(CHECKSUM_BYTES)
"""Stands for the checksum of a ZERO in the digest."""
VERIFY_CHUNK_BYTES: Final = 256 << 10
"""What one hash of a CONTENT digest covers."""


class Kind(IntEnum):
    """The first element of a header."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    DATA = 4
    ZERO = 5
    ACK = 6
    BARRIER = 7
    DIGEST = 8
    VERIFY = 9
    CONTENT = 10
    PROMOTE = 11
    PROMOTED = 12
    RELEASE = 13
    RELEASED = 14
    ERROR = 15
    BASE = 16
    PACKED = 17
    PROBE = 18
    PROBED = 19
    EPOCH = 20
    KEPT = 21
    FACTS = 22


class Refusal(IntEnum):
    """Why a replica answers HELLO with REFUSED."""

    VERSION = 1
    SIZE = 2
    READ_ONLY = 3
    BUSY = 4
    PROMOTED = 5
    STRANGER = 6


@dataclass(frozen=True, slots=True)
class Hello:
    """`session` is 16 random bytes that stay the same when a sync connects again. `base` names the copy that the
    primary's log counts for: it lacks what is dirty there, no more; 0: there is none. It may still go by `former`,
    if that is not 0. `overwrite`: whatever other copy the replica holds may be replaced. `in_place`: a consistent
    copy that it holds need not stay one until this one is complete. `is_inquiry`: nothing begins, the answer is
    FACTS."""

    version: int
    session: bytes
    size_bytes: int
    disk: str
    base: int
    former: int
    overwrite: bool
    in_place: bool
    is_inquiry: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """`reason`, `message` and `hint` are those of the REFUSED that such a HELLO would get; 0: it would get
    WELCOME, with `base`. `free_bytes` is the room that the replica's file system has left, `held_bytes` what
    its image has of it; the first is MAX_INT where that has no end."""

    reason: int
    message: str
    hint: str
    base: int
    size_bytes: int
    free_bytes: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """`base`: the name in the HELLO that the copy goes by; 0: it is none of them, and is made anew.
    `credit_bytes`: how much may be sent beyond what it has applied. `is_journaled`: it holds a consistent copy,
    and keeps it until the next EPOCH; its journal is `journal_bytes` long."""

    base: int
    credit_bytes: int
    is_journaled: bool
    journal_bytes: int


@dataclass(frozen=True, slots=True)
class Base:
    """What the copy is called from now on: what follows brings it to `base`."""

    base: int


@dataclass(frozen=True, slots=True)
class Refused:
    reason: int
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Data:
    """The payload, of `length` bytes, follows in a frame of its own; `checksum` is its xxh3_128."""

    seq: int
    offset: int
    length: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Packed:
    """As DATA, but the payload is a zstd frame of `length` bytes; `checksum` is of what comes out."""

    seq: int
    offset: int
    length: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Zero:
    """The range reads as zeroes; it may become a hole."""

    seq: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Probe:
    """`digests` are those of each `grain` bytes of the range (writelog.hashtree). What is equal counts as applied,
    and durable after a flush, like what is sent."""

    seq: int
    offset: int
    length: int
    grain: int
    digests: bytes

    @property
    def checksum(self) -> bytes:
        return checksum(self.digests)


@dataclass(frozen=True, slots=True)
class Probed:
    """Of the PROBE `seq`: a bit for each of its pieces, set if the replica has something else there."""

    seq: int
    differing: bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything up to seq `applied` is in the chain, up to `durable` it was flushed too. The last flush took
    `flush_ns` and covered `flush_bytes`."""

    applied: int
    durable: int
    flush_ns: int
    flush_bytes: int


@dataclass(frozen=True, slots=True)
class Barrier:
    seq: int


@dataclass(frozen=True, slots=True)
class Digest:
    """All up to the barrier `seq` is durable; `digest` is the RunningDigest over it, the barrier left out."""

    seq: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Verify:
    pass


@dataclass(frozen=True, slots=True)
class Content:
    digest: bytes


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the barrier with that `digest` confirmed is the disk at one instant, `at_ms` of the primary's clock."""

    digest: bytes
    at_ms: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Whatever happens, the replica has the disk of that instant, or of a later one, from now on. With a journal
    it is applied after this; nothing else is heeded before that is done. `is_journaled`: it keeps that copy until
    the next EPOCH."""

    epoch: int
    is_journaled: bool


@dataclass(frozen=True, slots=True)
class Promote:
    """`digest` must be that of the barrier that the replica confirmed last."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Promoted:
    """`export` is where the replica serves the disk now; empty if it does not."""

    export: str


@dataclass(frozen=True, slots=True)
class Release:
    pass


@dataclass(frozen=True, slots=True)
class Released:
    pass


@dataclass(frozen=True, slots=True)
class Failure:
    """ERROR: the replica gave the session up."""

    errno: int
    message: str
    hint: str


Message: TypeAlias = (Hello | Welcome | Refused | Data | Zero | Ack | Barrier | Digest | Verify | Content | Promote
                      | Promoted | Release | Released | Failure | Base
                      | Packed | Probe | Probed | Epoch | Kept | Facts)

CLASSES: Final[dict[int, type[Any]]] = {
    Kind.HELLO: Hello, Kind.WELCOME: Welcome, Kind.REFUSED: Refused, Kind.DATA: Data, Kind.ZERO: Zero,
    Kind.ACK: Ack, Kind.BARRIER: Barrier, Kind.DIGEST: Digest, Kind.VERIFY: Verify, Kind.CONTENT: Content,
    Kind.PROMOTE: Promote, Kind.PROMOTED: Promoted, Kind.RELEASE: Release, Kind.RELEASED: Released,
    Kind.ERROR: Failure, Kind.BASE: Base, Kind.PACKED: Packed, Kind.PROBE: Probe, Kind.PROBED: Probed,
    Kind.EPOCH: Epoch, Kind.KEPT: Kept, Kind.FACTS: Facts,
}
_KINDS: Final = {cls: int(kind) for kind, cls in CLASSES.items()}
_NAMES: Final = {kind: tuple(field.name for field in fields(cls)) for kind, cls in CLASSES.items()}
_BYTES_FIELDS: Final = frozenset({"session", "checksum", "digest"})
_TEXT_FIELDS: Final = frozenset({"disk", "message", "hint", "export"})


def encode(message: Message) -> bytes:
    """The header frame of `message`; texts are cut at MAX_TEXT_CHARS."""
    kind = _KINDS[type(message)]
    header = [kind]
    for name in _NAMES[kind]:
        value = getattr(message, name)
        header.append(value[:MAX_TEXT_CHARS] if name in _TEXT_FIELDS else value)
    return seal(msgpack.packb(header))


def seal(header: bytes) -> bytes:
    """`header` with its checksum: without one, data that came over whole could be written to a wrong place."""
    return header + xxhash.xxh3_64_digest(header)


def decode(frames: Sequence[Buffer]) -> tuple[Message, Buffer | None]:
    """The message in `frames` (header, and for DATA the payload) and its payload, lengths checked against each
    other; the payload's checksum is left to the caller. ProtocolError says what is wrong."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise _damaged(f"a message of {len(frames)} frames has no header of at most {MAX_HEADER_BYTES} bytes")
    message = _decode_header(frames[0])
    if isinstance(message, Packed):
        if len(frames) != 2 or not 0 < len(frames[1]) <= MAX_DATA_BYTES:
            raise _damaged(f"PACKED came with {len(frames) - 1} payload frames, or one that is too long",
                           message.offset)
        return message, frames[1]
    if not isinstance(message, Data):
        if len(frames) != 1:
            raise _damaged(f"{type(message).__name__} came with {len(frames) - 1} frames too many")
        return message, None
    if len(frames) != 2 or len(frames[1]) != message.length:
        sizes = [len(frame) for frame in frames[1:3]]
        raise _damaged(f"DATA of {message.length} bytes came with {len(frames) - 1} payload frames, of "
                       f"{sizes} bytes", message.offset)
    return message, frames[1]


def _damaged(text: str, offset: int | None = None) -> ProtocolError:
    """On the way, most likely: encryption does not notice that a frame was lost."""
    return ProtocolError(text, errno=errno.EBADMSG, offset=offset)


def _decode_header(frame: Buffer) -> Message:
    header = memoryview(frame)[:-SEAL_BYTES]
    if xxhash.xxh3_64_digest(header) != bytes(memoryview(frame)[-SEAL_BYTES:]):
        raise ProtocolError("a message was damaged on the way, or is none: its checksum is wrong",
                            errno=errno.EBADMSG)
    try:
        values = msgpack.unpackb(header, raw=False, max_array_len=16, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a header is not msgpack: {type(error).__name__}") from None
    if not isinstance(values, list) or not values or type(values[0]) is not int or values[0] not in CLASSES:
        raise ProtocolError("a header is not an array that begins with a known kind")
    kind, *values = values
    if kind == Kind.HELLO and values and type(values[0]) is int and values[0] != VERSION:
        return Hello(values[0], bytes(CHECKSUM_BYTES), 0, "", 0, 0, False, False, False)
    names = _NAMES[kind]
    if len(values) != len(names):
        raise ProtocolError(f"{Kind(kind).name} has {len(values)} fields, not {len(names)}")
    for name, value in zip(names, values, strict=True):
        if not _is_valid(name, value):
            raise ProtocolError(f"{Kind(kind).name} has a {name} that it cannot have")
    message: Message = CLASSES[kind](*values)
    if isinstance(message, Data | Packed | Zero | Probe):
        limit = MAX_ZERO_BYTES if kind == Kind.ZERO else MAX_DATA_BYTES
        if not 0 < message.length <= limit:
            raise ProtocolError(f"{Kind(kind).name} of {message.length} bytes: 1 to {limit} are allowed",
                                offset=message.offset)
    if isinstance(message, Probe) and not _is_whole(message):
        raise ProtocolError(f"PROBE of {message.length} bytes by {message.grain} has {len(message.digests)} bytes "
                            "of digests", offset=message.offset)
    return message


def _is_whole(probe: Probe) -> bool:
    if probe.grain < LEAF_BYTES or len(probe.digests) > MAX_PIECES * DIGEST_BYTES:
        return False
    return len(probe.digests) == pieces_of(probe.length, probe.grain) * DIGEST_BYTES


def _is_valid(name: str, value: object) -> bool:
    if name in _BYTES_FIELDS:
        return type(value) is bytes and len(value) == CHECKSUM_BYTES
    if name == "digests":
        return type(value) is bytes
    if name == "differing":
        return type(value) is bytes and len(value) <= MAX_MASK_BYTES
    if name in _TEXT_FIELDS:
        return type(value) is str and len(value) <= MAX_TEXT_CHARS
    if name in ("overwrite", "in_place", "is_journaled", "is_inquiry"):
        return type(value) is bool
    if name in ("base", "former"):
        return type(value) is int and 0 <= value <= MAX_BASE
    return type(value) is int and 0 <= value <= MAX_INT


def unpack(message: Packed, payload: Buffer) -> bytes:
    """The data of a PACKED, of the length that it says. ProtocolError if the payload does not hold that."""
    frame = memoryview(payload)
    try:
        if zstandard.frame_content_size(frame) == message.length:
            return zstandard.ZstdDecompressor().decompress(frame, max_output_size=message.length)
    except zstandard.ZstdError as error:
        raise _damaged(f"PACKED cannot be decompressed: {error}", message.offset) from None
    raise _damaged(f"PACKED does not hold the {message.length} bytes that it says", message.offset)


def checksum(payload: Buffer) -> bytes:
    """xxh3_128, as DATA carries it."""
    return xxhash.xxh3_128_digest(payload)


_RECORD: Final = Layout("digest record", "<", "seq:Q kind:Q offset:Q length:Q checksum:16s", size=48)
_pack_record = _RECORD.struct.pack


class RunningDigest:
    """xxh3_128 over the records of all extents of one connection, in their order (PACKED as DATA), and over what
    came of its PROBEs, in any order. Both ends keep one: equal digests say that the replica applied all that the
    sync sent, nothing else and in that order, and that both mean the same pieces when they speak of equal ones."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._outcomes = 0
        """Of the PROBEs: the xxh3_128 of each, all in one by XOR."""

    def add(self, message: Data | Packed | Zero | Probe) -> None:
        if isinstance(message, Zero):
            kind, check = Kind.ZERO, NO_CHECKSUM
        else:
            kind, check = Kind.PROBE if isinstance(message, Probe) else Kind.DATA, message.checksum
        self._hash.update(_pack_record(message.seq, kind, message.offset, message.length, check))

    def settle(self, answer: Probed) -> None:
        """The PROBE of that seq was answered so."""
        record = _pack_record(answer.seq, Kind.PROBED, 0, 0, answer.differing.ljust(CHECKSUM_BYTES, b"\0"))
        self._outcomes ^= xxhash.xxh3_128_intdigest(record)

    def digest(self) -> bytes:
        if not self._outcomes:
            return self._hash.digest()
        whole = self._hash.copy()
        whole.update(self._outcomes.to_bytes(CHECKSUM_BYTES, "little"))
        return whole.digest()


class ContentDigest:
    """The digest of a whole disk of `size_bytes`: xxh3_128 over the xxh3_128 of each VERIFY_CHUNK_BYTES of it,
    which may come in any order."""

    def __init__(self, size_bytes: int) -> None:
        self.chunks = -(-size_bytes // VERIFY_CHUNK_BYTES)
        self._size_bytes = size_bytes
        self._digests = bytearray(self.chunks * CHECKSUM_BYTES)

    def range_of(self, chunk: int) -> tuple[int, int]:
        """Offset and length in bytes of the chunk number `chunk`."""
        offset = chunk * VERIFY_CHUNK_BYTES
        return offset, min(VERIFY_CHUNK_BYTES, self._size_bytes - offset)

    def set(self, chunk: int, data: Buffer) -> None:
        self._digests[chunk * CHECKSUM_BYTES : (chunk + 1) * CHECKSUM_BYTES] = checksum(data)

    def digest(self) -> bytes:
        """Once every chunk was set."""
        return xxhash.xxh3_128_digest(self._digests)
