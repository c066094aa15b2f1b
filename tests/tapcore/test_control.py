"""The control protocol: its codec, byte by byte, and its client against servers that behave and that do not."""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tapcore import unixsocket
from tapcore.control import (
    MAX_REQUEST_BYTES,
    ControlClient,
    Lines,
    decode_reply,
    decode_request,
    encode_error,
    encode_request,
    encode_result,
    find_disk,
    processes,
    socket_path,
)
from tapcore.errors import ControlError, ImageError, ProtocolError, WritelogError

# Codec


def lines_of(pieces: list[bytes], max_bytes: int = 100) -> list[bytes]:
    lines = Lines(max_bytes)
    found = []
    for piece in pieces:
        lines.feed(piece)
        while (line := lines.next_line()) is not None:
            found.append(line)
    return found


def test_lines_are_the_same_in_any_pieces() -> None:
    data = b'{"op":"list"}\n\n{"op":"version"}\nrest'
    expected = [b'{"op":"list"}', b"", b'{"op":"version"}']
    assert lines_of([data]) == expected
    assert lines_of([data[at : at + 1] for at in range(len(data))]) == expected
    for cut in range(len(data)):
        assert lines_of([data[:cut], data[cut:]]) == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\nmore\n"])
def test_a_line_that_is_too_long_is_refused_whether_or_not_it_ends(end: bytes) -> None:
    lines = Lines(10)
    lines.feed(b"short\n" + b"x" * 11 + end)
    assert lines.next_line() == b"short"
    with pytest.raises(ProtocolError, match="more than 10 bytes"):
        lines.next_line()
    assert lines.buffered_bytes == 0 and lines.next_line() is None


def test_the_longest_line_is_let_through() -> None:
    assert lines_of([b"x" * 10 + b"\n"], 10) == [b"x" * 10]
    assert lines_of([b"x" * 10], 10) == []


def test_requests_round_trip() -> None:
    line = encode_request("open", {"chain": "aio:/a\udcff é", "name": None, "nbd": ["unix:/x"], "read_only": True})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode_request(line) == ("open", {"chain": "aio:/a\udcff é", "nbd": ["unix:/x"], "read_only": True})
    line = b'{"op":"map","disk":"d","offset":null,"length":0}'
    assert decode_request(line) == ("map", {"disk": "d", "length": 0})


@pytest.mark.parametrize("line", [
    b"", b"\xff\xfe", b"list", b"[]", b'"list"', b"1", b"{", b'{"op":NaN}', b'{"op":1e999}', b"[" * 60000,
    b'{"op":"list"}{"op":"list"}', b'{"op":' + b"1" * 9999 + b"}",
])
def test_what_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(WritelogError):
        decode_request(line)


@pytest.mark.parametrize(("request_", "message"), [
    ({}, "unknown op None"),
    ({"op": "format"}, "unknown op 'format'"),
    ({"op": ["list"]}, "unknown op"),
    ({"op": "x" * 5000}, "unknown op 'xxx"),
    ({"op": "list", "disk": "d"}, "unknown parameter 'disk'"),
    ({"op": "unpause", "disk": "d", "froce": True}, "unknown parameter 'froce'"),
    ({"op": "pause"}, "'disk' is missing"),
    ({"op": "pause", "disk": None}, "'disk' is missing"),
    ({"op": "pause", "disk": 7}, "'disk' must be a text"),
    ({"op": "pause", "disk": "a\0b"}, "'disk' must be a text"),
    ({"op": "pause", "disk": "\ud800"}, "'disk' must be a text"),
    ({"op": "pause", "disk": "d", "hold": 1}, "'hold' must be true or false"),
    ({"op": "open", "chain": "c", "nbd": "unix:/x"}, "'nbd' must be a list"),
    ({"op": "open", "chain": "c", "nbd": [1]}, "'nbd' must be a list"),
    ({"op": "map", "disk": "d", "offset": -1}, "'offset' must be a whole number"),
    ({"op": "map", "disk": "d", "offset": True}, "'offset' must be a whole number"),
    ({"op": "map", "disk": "d", "offset": 1.0}, "'offset' must be a whole number"),
    ({"op": "map", "disk": "d", "length": 1 << 63}, "'length' must be a whole number"),
])
def test_requests_without_sense_are_refused_by_name(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlError) as caught:
        decode_request(json.dumps(request_).encode())
    assert message in caught.value.message and len(caught.value.message) < 300


def test_a_request_that_cannot_be_written_is_refused_by_the_client() -> None:
    with pytest.raises(ControlError, match="cannot ask for 'pause'"):
        encode_request("pause", {"disk": Path("/x")})
    with pytest.raises(ControlError, match="longer than"):
        encode_request("pause", {"disk": "x" * MAX_REQUEST_BYTES})


def test_replies_round_trip() -> None:
    assert decode_reply(encode_result({"next": None, "extents": [[0, 1, 2]]})) == {"next": None,
                                                                                  "extents": [[0, 1, 2]]}
    with pytest.raises(ControlError) as caught:
        decode_reply(encode_error(ImageError("cannot open", errno=errno.EACCES, path="/x", offset=7, hint="do y")))
    assert caught.value.message == "/x: cannot open (at byte 7)"
    assert caught.value.errno == errno.EACCES and caught.value.hint == "do y"
    assert str(caught.value) == "/x: cannot open (at byte 7); do y"


@pytest.mark.parametrize("line", [
    b"{}", b'{"ok":true}', b'{"ok":true,"result":[]}', b'{"ok":1,"result":[]}', b'{"ok":false}', b"null",
    b'{"ok":false,"error":"no"}', b'{"ok":false,"error":{"message":1,"errno":1,"hint":null}}',
])
def test_what_is_no_reply_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(line)


# Client


class Scripted:
    """Listens as a tapdisk of the given pid; answers each connection with what `script` makes of its socket."""

    def __init__(self, run_dir: Path, pid: int, script: Callable[[socket.socket], None]) -> None:
        self.path = socket_path(run_dir, pid)
        self._script = script
        self._listener = unixsocket.listen(self.path)
        self._listener.settimeout(20)
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(20)
            self._script(sock)

    def close(self) -> None:
        self.path.unlink()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()


Serve = Callable[..., Scripted]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Serve]:
    started: list[Scripted] = []

    def start(script: Callable[[socket.socket], None], pid: int = 1) -> Scripted:
        started.append(Scripted(tmp_path, pid, script))
        return started[-1]

    yield start
    for server in started:
        server.close()


def replying(*lines: bytes) -> Callable[[socket.socket], None]:
    """Sends `lines` after a request; then waits for the end."""

    def script(sock: socket.socket) -> None:
        if sock.recv(100_000):
            for line in lines:
                sock.sendall(line)
            while sock.recv(100_000):
                pass

    return script


def disks(*names: str) -> Callable[[socket.socket], None]:
    """A tapdisk with these disks, whatever it is asked."""
    line = encode_result({"pid": 1, "disks": [{"name": name} for name in names]})

    def script(sock: socket.socket) -> None:
        while sock.recv(100_000):
            sock.sendall(line)

    return script


def test_a_reply_in_pieces_arrives(script: Serve) -> None:
    line = encode_result({"text": "x" * 200_000})
    server = script(replying(*(line[at : at + 50_000] for at in range(0, len(line), 50_000))))
    with ControlClient(server.path) as client:
        assert client.call("version") == {"text": "x" * 200_000}


def test_an_error_reply_leaves_the_connection_alone(script: Serve) -> None:
    server = script(replying(encode_error(ControlError("no")), encode_result({})))
    with ControlClient(server.path) as client:
        with pytest.raises(ControlError, match=r"^no$"):
            client.call("version")
        assert client.call("version") == {}


@pytest.mark.parametrize("line", [b"garbage\n", b"{}\n", b"\xff\n"])
def test_a_reply_that_makes_no_sense_ends_the_connection(script: Serve, line: bytes) -> None:
    with ControlClient(script(replying(line)).path) as client:
        with pytest.raises(ControlError, match="the tapdisk sent"):
            client.call("version")
        with pytest.raises(ControlError, match="lost the tapdisk"):
            client.call("version")


def test_a_reply_without_an_end_is_not_kept_in_memory(script: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapcore.control.MAX_REPLY_BYTES", 1000)
    with (ControlClient(script(replying(b"x" * 1001)).path) as client,
          pytest.raises(ControlError, match="more than 1000 bytes")):
        client.call("version")


def test_a_server_that_hangs_up_is_an_error(script: Serve) -> None:
    server = script(lambda sock: None if not sock.recv(100) else sock.sendall(b'{"ok":tr'))
    with ControlClient(server.path) as client, pytest.raises(ControlError, match="closed the connection"):
        client.call("version")


def test_a_server_that_says_nothing_is_not_waited_for_long(script: Serve) -> None:
    with ControlClient(script(replying()).path, 0.1) as client:
        with pytest.raises(ControlError, match=r"no answer to 'version' within 0\.1 s") as caught:
            client.call("version")
        assert caught.value.errno == errno.ETIMEDOUT
        with pytest.raises(ControlError, match="lost the tapdisk"):
            client.call("version")


def test_no_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="cannot reach the tapdisk"):
        ControlClient(tmp_path / "none")
    with pytest.raises(ControlError, match="cannot reach the tapdisk"):
        ControlClient(tmp_path / ("long" * 50))


# Processes


def test_only_live_tapdisks_are_found_and_dead_ones_removed(
    tmp_path: Path, script: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    script(disks(), 30)
    script(disks(), 4)
    for name in ("tapdisk-5.ctl", "tapdisk-5.nbd", "other.ctl"):
        unixsocket.listen(tmp_path / name).close()
    (tmp_path / "tapdisk-5.log").write_text("it ran out of luck")
    (tmp_path / "tapdisk-6.ctl").write_text("no socket")
    with caplog.at_level(logging.WARNING):
        assert processes(tmp_path) == [(4, tmp_path / "tapdisk-4.ctl"), (30, tmp_path / "tapdisk-30.ctl")]
    assert "tapdisk-5.ctl: this tapdisk died" in caplog.text and "tapdisk-5.log" in caplog.text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tapdisk-4.ctl", "tapdisk-30.ctl", "tapdisk-6.ctl", "tapdisk-5.log", "other.ctl"}


def test_a_live_nbd_socket_outlives_a_dead_control_socket(tmp_path: Path) -> None:
    unixsocket.listen(tmp_path / "tapdisk-5.ctl").close()
    with unixsocket.listen(tmp_path / "tapdisk-5.nbd"):
        assert processes(tmp_path) == []
        assert [path.name for path in tmp_path.iterdir()] == ["tapdisk-5.nbd"]


def test_a_run_directory_that_is_not_there_has_no_processes(tmp_path: Path) -> None:
    assert processes(tmp_path / "none") == []
    (tmp_path / "file").touch()
    with pytest.raises(ControlError, match="cannot look for tapdisks"):
        processes(tmp_path / "file")


def test_a_disk_is_found_among_processes(tmp_path: Path, script: Serve) -> None:
    script(disks("a", "b"), 1)
    wanted = script(disks("c"), 2)
    with find_disk(tmp_path, "c", 17) as client:
        assert client.path == wanted.path and client.timeout_s == 17
        assert client.call("list")["disks"] == [{"name": "c"}]


def test_a_disk_that_nobody_or_more_than_one_serves_is_not_found(tmp_path: Path, script: Serve) -> None:
    with pytest.raises(ControlError, match="no disk is served there"):
        find_disk(tmp_path, "d")
    script(disks("a", "b"), 1)
    script(disks("b"), 2)
    with pytest.raises(ControlError, match=r"serves a disk 'c'; there are a, b, b") as caught:
        find_disk(tmp_path, "c")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ControlError, match="2 tapdisks serve a disk 'b'"):
        find_disk(tmp_path, "b")


def test_a_process_that_does_not_answer_is_named(tmp_path: Path, script: Serve) -> None:
    script(replying(), 1)
    script(disks("b"), 2)
    find_disk(tmp_path, "b", 0.1).close()
    with pytest.raises(ControlError, match="these do not answer: 1"):
        find_disk(tmp_path, "a", 0.1)
