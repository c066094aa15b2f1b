"""The server's handshake: every option, in one piece and a byte at a time."""

from __future__ import annotations

import dataclasses

import pytest

from tapcore.nbd import wire
from tapcore.nbd.client_codec import ClientNegotiation, NbdError, ServerOffer
from tapcore.nbd.negotiate import (
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_QUERIES,
    MAX_SKIPPED_BYTES,
    ExportInfo,
    Negotiated,
    ServerNegotiation,
    resolve_name,
)

FLAGS = wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_DF
DIRTY_A, DIRTY_B = "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"
DISK = ExportInfo("disk", 1 << 30, FLAGS, description="the first", min_block=512, preferred_block=65536,
                  max_block=1 << 25, contexts=(wire.BASE_ALLOCATION, DIRTY_A, DIRTY_B))
OTHER = ExportInfo("böse", 4096, wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_READ_ONLY)
FIXED = wire.CLIENT_FLAGS.pack(flags=wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES)

Reply = tuple[int, int, bytes]
"""Option, type of the reply, data."""


class Table:
    def __init__(self, *exports: ExportInfo) -> None:
        self.exports = {export.name: export for export in exports}

    def names(self) -> list[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        found = resolve_name(self.exports, name)
        return None if found is None else self.exports[found]


class Peer:
    """A negotiation and what it answered."""

    def __init__(self, *exports: ExportInfo, byte_wise: bool = False) -> None:
        self.server = ServerNegotiation(Table(*(exports or (DISK, OTHER))))
        self.byte_wise = byte_wise

    def send(self, *pieces: bytes) -> bytes:
        data = b"".join(pieces)
        for start in range(0, len(data), 1 if self.byte_wise else max(len(data), 1)):
            self.server.feed(data[start : start + 1] if self.byte_wise else data)
        return self.server.output()

    def ask(self, *options: bytes) -> list[Reply]:
        return parse_replies(self.send(*options))

    def result(self) -> Negotiated:
        assert self.server.result is not None
        return self.server.result


@pytest.fixture(params=[False, True], ids=["whole", "byte-wise"])
def peer(request: pytest.FixtureRequest) -> Peer:
    """A client that has sent its flags."""
    peer = Peer(byte_wise=request.param)
    assert peer.send(FIXED) == b""
    return peer


def option(number: int, data: bytes = b"") -> bytes:
    return wire.OPTION.pack(magic=wire.IHAVEOPT, option=number, length=len(data)) + data


def text(value: str) -> bytes:
    data = value.encode()
    return wire.LENGTH.pack(value=len(data)) + data


def info(name: str, *requests: int, number: int = wire.NBD_OPT_GO) -> bytes:
    data = text(name) + wire.INFO_COUNT.pack(value=len(requests))
    return option(number, data + b"".join(wire.INFO_TYPE.pack(type=request) for request in requests))


def queries(number: int, name: str, *names: str) -> bytes:
    return option(number, text(name) + wire.LENGTH.pack(value=len(names)) + b"".join(map(text, names)))


def structured() -> bytes:
    return option(wire.NBD_OPT_STRUCTURED_REPLY)


def parse_replies(data: bytes) -> list[Reply]:
    replies = []
    while data:
        head = wire.OPTION_REPLY.unpack(data)
        assert head["magic"] == wire.NBD_REP_MAGIC
        end = wire.OPTION_REPLY.size + head["length"]
        replies.append((head["option"], head["type"], data[wire.OPTION_REPLY.size : end]))
        assert len(data) >= end
        data = data[end:]
    return replies


def types(replies: list[Reply]) -> list[int]:
    return [type for _, type, _ in replies]


def contexts(replies: list[Reply]) -> list[tuple[int, str]]:
    """(id, name) of the contexts in front of the final acknowledgement."""
    assert types(replies) == [wire.NBD_REP_META_CONTEXT] * (len(replies) - 1) + [wire.NBD_REP_ACK]
    return [(wire.META_CONTEXT.unpack(data)["id"], data[4:].decode()) for _, _, data in replies[:-1]]


def refusal(replies: list[Reply]) -> tuple[int, str]:
    """Type and text of the one reply, an error."""
    assert len(replies) == 1
    return replies[0][1], replies[0][2].decode()


# Greeting and client flags


def test_greeting() -> None:
    assert Peer().server.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_unknown_client_flags_close() -> None:
    peer = Peer()
    assert peer.send(wire.CLIENT_FLAGS.pack(flags=5)) == b""
    assert peer.server.finished
    assert peer.server.error == "unknown client flags 0x5"


def test_without_fixed_newstyle_only_export_name_is_allowed() -> None:
    peer = Peer()
    assert peer.send(wire.CLIENT_FLAGS.pack(flags=0), option(wire.NBD_OPT_LIST)) == b""
    assert peer.server.finished
    assert "NBD_OPT_LIST from a client that did not set NBD_FLAG_C_FIXED_NEWSTYLE" in peer.server.error


# NBD_OPT_EXPORT_NAME


@pytest.mark.parametrize("byte_wise", [False, True])
@pytest.mark.parametrize(("flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name(flags: int, zeroes: int, byte_wise: bool) -> None:
    peer = Peer(byte_wise=byte_wise)
    answer = peer.send(wire.CLIENT_FLAGS.pack(flags=flags), option(wire.NBD_OPT_EXPORT_NAME, b"disk"))
    told = FLAGS & ~wire.NBD_FLAG_SEND_DF
    assert answer == (1 << 30).to_bytes(8, "big") + told.to_bytes(2, "big") + bytes(zeroes)
    assert peer.result() == Negotiated(DISK, told, False, flags >= 2, [])
    assert not peer.server.finished


@pytest.mark.parametrize(("name", "error"), [
    (b"nobody", "there is no export 'nobody'"),
    (b"\xff\xfe", "no UTF-8"),
    (b"di\0sk", "NUL"),
    (b"n" * 4096, "there is no export 'nnnn"),
])
def test_export_name_that_cannot_be_had_closes(peer: Peer, name: bytes, error: str) -> None:
    assert peer.send(option(wire.NBD_OPT_EXPORT_NAME, name)) == b""
    assert peer.server.finished
    assert error in peer.server.error
    assert len(peer.server.error) < 200
    assert peer.server.result is None


def test_export_name_that_is_too_long_closes_before_it_is_read(peer: Peer) -> None:
    header = wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_EXPORT_NAME, length=4097)
    assert peer.send(header) == b""
    assert peer.server.error == "an export name of 4097 bytes; at most 4096 are allowed"


def test_default_export() -> None:
    only = Peer(OTHER)
    only.send(FIXED, option(wire.NBD_OPT_EXPORT_NAME))
    assert only.result().export is OTHER
    assert resolve_name(["a", "default"], "") == "default"
    assert resolve_name(["a", "default", ""], "") == ""
    assert resolve_name(["a", "b"], "") is None
    assert resolve_name([], "") is None
    assert resolve_name(["a"], "b") is None


# NBD_OPT_ABORT, NBD_OPT_LIST, unknown ones


@pytest.mark.parametrize("data", [b"", b"why not"])
def test_abort(peer: Peer, data: bytes) -> None:
    assert peer.ask(option(wire.NBD_OPT_ABORT, data)) == [(wire.NBD_OPT_ABORT, wire.NBD_REP_ACK, b"")]
    assert peer.server.finished
    assert peer.server.error == ""
    assert peer.ask(option(wire.NBD_OPT_LIST)) == []
    assert peer.server.leftover() == b""


def test_list(peer: Peer) -> None:
    assert peer.ask(option(wire.NBD_OPT_LIST)) == [
        (wire.NBD_OPT_LIST, wire.NBD_REP_SERVER, b"\0\0\0\4diskthe first"),
        (wire.NBD_OPT_LIST, wire.NBD_REP_SERVER, b"\0\0\0\5b\xc3\xb6se"),
        (wire.NBD_OPT_LIST, wire.NBD_REP_ACK, b""),
    ]


@pytest.mark.parametrize("number", [wire.NBD_OPT_LIST, wire.NBD_OPT_STRUCTURED_REPLY])
def test_data_where_none_belongs(peer: Peer, number: int) -> None:
    assert refusal(peer.ask(option(number, b"xy"))) == (wire.NBD_REP_ERR_INVALID, "2 bytes too many at the end")
    assert types(peer.ask(option(wire.NBD_OPT_LIST)))[-1] == wire.NBD_REP_ACK


@pytest.mark.parametrize(("number", "name"), [
    (wire.NBD_OPT_STARTTLS, "NBD_OPT_STARTTLS"), (wire.NBD_OPT_PEEK_EXPORT, "NBD_OPT_PEEK_EXPORT"),
    (wire.NBD_OPT_EXTENDED_HEADERS, "NBD_OPT_EXTENDED_HEADERS"), (0, "option 0"),
    (0xFFFFFFFF, "option 4294967295"),
])
def test_options_that_are_not_supported(peer: Peer, number: int, name: str) -> None:
    for data in (b"", b"IHAVEOPT" * 100):
        assert peer.ask(option(number, data)) == [
            (number, wire.NBD_REP_ERR_UNSUP, f"{name} is not supported".encode())]
    peer.send(info("disk"))
    assert peer.result().export is DISK


# NBD_OPT_INFO, NBD_OPT_GO


EXPORT_INFO = b"\0\0" + (1 << 30).to_bytes(8, "big") + (FLAGS & ~wire.NBD_FLAG_SEND_DF).to_bytes(2, "big")
BLOCK_INFO = b"\0\3" + bytes.fromhex("00000200 00010000 02000000")


@pytest.mark.parametrize("number", [wire.NBD_OPT_INFO, wire.NBD_OPT_GO])
def test_info_and_go(peer: Peer, number: int) -> None:
    requests = (wire.NBD_INFO_NAME, wire.NBD_INFO_DESCRIPTION, wire.NBD_INFO_NAME, 0xFFFF)
    replies = peer.ask(info("disk", *requests, number=number))
    assert replies == [
        *((number, wire.NBD_REP_INFO, data) for data in (EXPORT_INFO, BLOCK_INFO, b"\0\1disk", b"\0\2the first")),
        (number, wire.NBD_REP_ACK, b""),
    ]
    assert (peer.server.result is None) == (number == wire.NBD_OPT_INFO)
    assert not peer.server.finished


def test_go_with_nothing_asked_for(peer: Peer) -> None:
    replies = peer.ask(info("böse"))
    assert types(replies) == [wire.NBD_REP_INFO, wire.NBD_REP_INFO, wire.NBD_REP_ACK]
    assert peer.result() == Negotiated(OTHER, OTHER.flags, False, True, [])


def test_a_description_that_is_not_there_is_not_told(peer: Peer) -> None:
    replies = peer.ask(info("böse", wire.NBD_INFO_DESCRIPTION))
    assert len(replies) == 3


def test_structured_replies_show_in_the_flags(peer: Peer) -> None:
    assert peer.ask(structured()) == [(wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_REP_ACK, b"")]
    replies = peer.ask(info("disk"))
    assert replies[0][2][-2:] == FLAGS.to_bytes(2, "big")
    assert (peer.result().flags, peer.result().structured_replies) == (FLAGS, True)


def test_strings_of_our_own_are_made_fit() -> None:
    """A path may be no UTF-8, and be longer than the protocol allows."""
    peer = Peer(ExportInfo("disk", 512, FLAGS, description="\udcff" + "ö" * 4096))
    peer.send(FIXED)
    fit = b"?" + "ö".encode() * 2047
    assert peer.ask(option(wire.NBD_OPT_LIST))[0][2] == b"\0\0\0\4disk" + fit
    assert peer.ask(info("disk", wire.NBD_INFO_DESCRIPTION))[2][2] == b"\0\2" + fit


def test_go_for_an_unknown_export_leaves_another_chance(peer: Peer) -> None:
    assert refusal(peer.ask(info("nobody"))) == (wire.NBD_REP_ERR_UNKNOWN, "there is no export 'nobody'")
    assert refusal(peer.ask(info(""))) == (wire.NBD_REP_ERR_UNKNOWN, "there is no export ''")
    assert peer.server.result is None
    peer.send(info("disk"))
    assert peer.result().export is DISK


@pytest.mark.parametrize(("data", "error"), [
    (b"", "the data ends inside the length of the export name (0 of 4 bytes)"),
    (b"\0\0\0\5disk", "the data ends inside the export name (4 of 5 bytes)"),
    (text("disk"), "the data ends inside the number of information requests (0 of 2 bytes)"),
    (text("disk") + b"\0\2\0\3", "the data ends inside the information requests (0 of 2 bytes)"),
    (text("disk") + b"\0\0\0", "1 bytes too many at the end"),
    (b"\0\0\0\1\xff\0\0", "the export name is no UTF-8 (byte 0)"),
    (b"\0\0\0\1\0\0\0", "the export name has a NUL in it"),
    (b"\xff\xff\xff\xff\0\0", "the data ends inside the export name (2 of 4294967295 bytes)"),
])
def test_go_with_malformed_data(peer: Peer, data: bytes, error: str) -> None:
    assert refusal(peer.ask(option(wire.NBD_OPT_GO, data))) == (wire.NBD_REP_ERR_INVALID, error)
    peer.send(info("disk"))
    assert peer.result().export is DISK


def test_go_with_a_name_that_is_too_long(peer: Peer) -> None:
    type, error = refusal(peer.ask(info("n" * 4097)))
    assert type == wire.NBD_REP_ERR_TOO_BIG
    assert "4097 bytes" in error


def test_what_follows_go_is_left_over(peer: Peer) -> None:
    request = bytes(range(28))
    replies = peer.ask(info("disk"), request)
    assert types(replies)[-1] == wire.NBD_REP_ACK
    assert peer.server.leftover() == request
    assert peer.server.leftover() == b""


# Metadata contexts


@pytest.mark.parametrize(("asked", "expected"), [
    ((), [wire.BASE_ALLOCATION, DIRTY_A, DIRTY_B]),
    (("base:",), [wire.BASE_ALLOCATION]),
    (("qemu:",), [DIRTY_A, DIRTY_B]),
    (("qemu:dirty-bitmap:",), [DIRTY_A, DIRTY_B]),
    ((DIRTY_B, "base:", DIRTY_B), [wire.BASE_ALLOCATION, DIRTY_B]),
    (("qemu:dirty-bitmap:nobody", "x-unknown:", "", "base"), []),
])
def test_list_meta_context(peer: Peer, asked: tuple[str, ...], expected: list[str]) -> None:
    peer.send(structured())
    replies = peer.ask(queries(wire.NBD_OPT_LIST_META_CONTEXT, "disk", *asked))
    assert contexts(replies) == [(0, name) for name in expected]


@pytest.mark.parametrize(("asked", "expected"), [
    ((), []),
    (("base:", "qemu:", "qemu:dirty-bitmap:"), []),
    ((wire.BASE_ALLOCATION,), [wire.BASE_ALLOCATION]),
    ((DIRTY_B, wire.BASE_ALLOCATION, DIRTY_B, "x-unknown:y"), [wire.BASE_ALLOCATION, DIRTY_B]),
])
def test_set_meta_context(peer: Peer, asked: tuple[str, ...], expected: list[str]) -> None:
    peer.send(structured())
    selected = contexts(peer.ask(queries(wire.NBD_OPT_SET_META_CONTEXT, "disk", *asked)))
    assert [name for _, name in selected] == expected
    assert len({id for id, _ in selected}) == len(expected)
    peer.send(info("disk"))
    assert peer.result().contexts == selected


def test_a_second_set_replaces_the_first_even_when_it_fails(peer: Peer) -> None:
    peer.send(structured(), queries(wire.NBD_OPT_SET_META_CONTEXT, "disk", DIRTY_A))
    peer.send(queries(wire.NBD_OPT_SET_META_CONTEXT, "disk", DIRTY_B))
    replies = peer.ask(queries(wire.NBD_OPT_SET_META_CONTEXT, "nobody", DIRTY_B))
    assert refusal(replies)[0] == wire.NBD_REP_ERR_UNKNOWN
    peer.send(info("disk"))
    assert peer.result().contexts == []


def test_contexts_of_another_export_do_not_count(peer: Peer) -> None:
    peer.send(structured(), queries(wire.NBD_OPT_SET_META_CONTEXT, "disk", DIRTY_A), info("böse"))
    assert peer.result().contexts == []


def test_contexts_of_the_default_export_count_under_its_name() -> None:
    peer = Peer(DISK)
    peer.send(FIXED, structured(), queries(wire.NBD_OPT_SET_META_CONTEXT, "", DIRTY_A), info("disk"))
    assert [name for _, name in peer.result().contexts] == [DIRTY_A]


def test_a_context_that_has_gone_meanwhile_does_not_count() -> None:
    table = Table(DISK)
    server = ServerNegotiation(table)
    server.feed(FIXED + structured() + queries(wire.NBD_OPT_SET_META_CONTEXT, "disk", DIRTY_A, DIRTY_B))
    table.exports["disk"] = dataclasses.replace(DISK, contexts=(DIRTY_B,))
    server.feed(info("disk"))
    assert server.result is not None
    assert [name for _, name in server.result.contexts] == [DIRTY_B]


@pytest.mark.parametrize("number", [wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_OPT_SET_META_CONTEXT])
def test_errors_of_meta_context_options(peer: Peer, number: int) -> None:
    type, error = refusal(peer.ask(queries(number, "disk", wire.BASE_ALLOCATION)))
    assert (type, "NBD_OPT_STRUCTURED_REPLY first" in error) == (wire.NBD_REP_ERR_INVALID, True)
    peer.send(structured())

    def code(data: bytes) -> int:
        return refusal(peer.ask(option(number, data)))[0]

    assert refusal(peer.ask(queries(number, "nobody")))[0] == wire.NBD_REP_ERR_UNKNOWN
    assert code(text("disk")) == wire.NBD_REP_ERR_INVALID
    assert code(text("disk") + b"\0\0\0\1") == wire.NBD_REP_ERR_INVALID
    assert code(text("disk") + b"\0\0\0\1\0\0\0\5base") == wire.NBD_REP_ERR_INVALID
    assert code(text("disk") + b"\0\0\0\0x") == wire.NBD_REP_ERR_INVALID
    assert code(text("disk") + b"\0\0\0\1\0\0\0\1\xff") == wire.NBD_REP_ERR_INVALID
    assert code(text("disk") + b"\0\0\0\1" + text("q" * 4097)) == wire.NBD_REP_ERR_TOO_BIG
    assert code(text("disk") + wire.LENGTH.pack(value=MAX_QUERIES + 1)) == wire.NBD_REP_ERR_TOO_BIG
    assert types(peer.ask(queries(number, "disk", *["x:y"] * MAX_QUERIES))) == [wire.NBD_REP_ACK]


# Limits


def test_option_data_that_is_too_long_is_skipped_without_being_kept() -> None:
    peer = Peer()
    peer.send(FIXED)
    header = wire.OPTION.pack(magic=wire.IHAVEOPT, option=wire.NBD_OPT_GO, length=MAX_SKIPPED_BYTES)
    type, error = refusal(parse_replies(peer.send(header)))
    assert type == wire.NBD_REP_ERR_TOO_BIG
    assert f"{MAX_SKIPPED_BYTES} bytes of option data" in error
    chunk = option(wire.NBD_OPT_ABORT) * 1024
    for _ in range(MAX_SKIPPED_BYTES // len(chunk)):
        assert peer.send(chunk) == b""
        assert len(peer.server._buffer) == 0
    assert not peer.server.finished
    peer.send(info("disk"))
    assert peer.result().export is DISK


def test_the_longest_option_data_that_is_read(peer: Peer) -> None:
    assert refusal(peer.ask(option(99, bytes(MAX_OPTION_BYTES))))[0] == wire.NBD_REP_ERR_UNSUP
    assert refusal(peer.ask(option(99, bytes(MAX_OPTION_BYTES + 1))))[0] == wire.NBD_REP_ERR_TOO_BIG
    assert types(peer.ask(option(wire.NBD_OPT_LIST)))[-1] == wire.NBD_REP_ACK


def test_option_data_beyond_all_measure_closes(peer: Peer) -> None:
    header = wire.OPTION.pack(magic=wire.IHAVEOPT, option=99, length=MAX_SKIPPED_BYTES + 1)
    assert peer.send(header) == b""
    assert peer.server.finished
    assert f"option 99 announces {MAX_SKIPPED_BYTES + 1} bytes" in peer.server.error


def test_a_client_that_never_comes_to_the_point_is_hung_up_on() -> None:
    peer = Peer()
    peer.send(FIXED)
    for _ in range(MAX_OPTIONS):
        assert types(peer.ask(option(99))) == [wire.NBD_REP_ERR_UNSUP]
    peer.send(option(99))
    assert peer.server.error == f"more than {MAX_OPTIONS} options"


def test_bad_option_magic_closes_and_says_which(peer: Peer) -> None:
    peer.send(structured())
    assert peer.send(b"GET / HTTP/1.1\r\n") == b""
    assert peer.server.finished
    assert peer.server.error == ("option 2 has the magic 0x474554202f204854 instead of 0x49484156454f5054 "
                                 "(IHAVEOPT)")


# The client's half


def handshake(server: ServerNegotiation, client: ClientNegotiation) -> None:
    """Let them talk, a byte at a time, until both are silent."""
    to_client = server.greeting()
    while to_client:
        for byte in to_client:
            client.feed(bytes([byte]))
        server.feed(client.output())
        to_client = server.output()


def test_client_and_server_agree() -> None:
    server, client = ServerNegotiation(Table(DISK)), ClientNegotiation("disk", contexts=[DIRTY_A, "base:", "x:y"])
    handshake(server, client)
    assert server.result is not None
    assert client.result is not None
    assert server.result.contexts == [(1, DIRTY_A)]
    assert client.result == ServerOffer(1 << 30, FLAGS, True, {1: DIRTY_A}, 512, 65536, 1 << 25)


def test_client_without_structured_replies_asks_for_no_contexts() -> None:
    server = ServerNegotiation(Table(DISK))
    client = ClientNegotiation("disk", structured_replies=False, contexts=[DIRTY_A])
    handshake(server, client)
    assert client.result is not None
    assert (client.result.structured_replies, client.result.contexts) == (False, {})
    assert client.result.flags == FLAGS & ~wire.NBD_FLAG_SEND_DF


def test_client_that_is_refused_says_goodbye() -> None:
    server, client = ServerNegotiation(Table(DISK)), ClientNegotiation("nobody", contexts=[DIRTY_A])
    with pytest.raises(NbdError, match="no such export"):
        handshake(server, client)
    server.feed(client.output())
    assert (server.finished, server.error) == (True, "")


def test_before_tls_nothing_is_told_and_what_was_said_counts_for_nothing() -> None:
    server = ServerNegotiation(Table(DISK), uses_tls=True)
    server.feed(wire.CLIENT_FLAGS.pack(flags=3))
    for kind in (wire.NBD_OPT_LIST, wire.NBD_OPT_STRUCTURED_REPLY, wire.NBD_OPT_GO):
        server.feed(option(kind))
        assert wire.OPTION_REPLY.unpack(server.output())["type"] == wire.NBD_REP_ERR_TLS_REQD
    server.feed(option(wire.NBD_OPT_STARTTLS))
    assert server.wants_tls and wire.OPTION_REPLY.unpack(server.output())["type"] == wire.NBD_REP_ACK
    server.tls_begun()
    server.feed(option(wire.NBD_OPT_STARTTLS))
    assert wire.OPTION_REPLY.unpack(server.output())["type"] == wire.NBD_REP_ERR_INVALID
    assert not server.wants_tls and server.result is None


def test_an_export_name_in_the_clear_ends_the_connection_where_tls_is_used() -> None:
    server = ServerNegotiation(Table(DISK), uses_tls=True)
    server.feed(wire.CLIENT_FLAGS.pack(flags=3)
                + option(wire.NBD_OPT_EXPORT_NAME))
    assert server.finished and "TLS" in server.error and server.result is None
