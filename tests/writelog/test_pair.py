"""`writelog pair`: keys exchanged by files and by a code, and replication with what it leaves."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from processes import read_line
from sync_rig import SIZE_BYTES, Rig

from tapcore.driver import Env
from tapcore.errors import ReplicationError, UsageError
from writelog import pair
from writelog.keyring import Keyring, fingerprint
from writelog.pair_code import (
    CONNECTS,
    LISTENS,
    Offer,
    code_text,
    decode_offer,
    make_code,
    parse_code,
    seed_keys,
)
from writelog.pair_exchange import Exchange

LOOPBACK = "tcp://127.0.0.1:0"
WAIT_S = 20


class Host:
    """A host with its keys, and what the last command there printed."""

    def __init__(self, folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.name = name
        self.folder = folder / name
        self.ring = Keyring(self.folder)
        self._capsys = capsys
        self.out = self.err = ""

    def pair(self, verb: str, *arguments: str, code: int = 0) -> str:
        host = ["--host", self.name] if verb in ("listen", "connect", "export") else []
        assert pair.main(["pair", verb, "--keys", str(self.folder), *host, *arguments]) == code
        self.out, self.err = self._capsys.readouterr()
        return self.out + self.err

    def gives_file_to(self, other: Host, path: Path) -> None:
        shown = re.search(r"fingerprint: (\S+)", self.pair("export", str(path)))
        assert shown
        other.pair("import", str(path), "--fingerprint", shown[1])

    def knows(self, other: Host) -> bool:
        return other.ring.own().public in self.ring.peer(other.name).candidates


@pytest.fixture
def hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Host, Host]:
    return Host(tmp_path, "hosta", capsys), Host(tmp_path, "hostb", capsys)


# The code


@given(st.binary(min_size=16, max_size=16))
def test_codes_are_read_as_people_write_them(code: bytes) -> None:
    text = code_text(code)
    assert re.fullmatch(r"([A-Z2-7]{4}-){6}[A-Z2-7]{4}", text)
    assert parse_code(f" {text.lower().replace('-', ' ')}\n") == parse_code(text) == code


@given(st.binary(min_size=16, max_size=16), st.integers(0, 33), st.sampled_from("ABZ27"))
def test_a_slip_of_the_pen_is_told(code: bytes, at: int, letter: str) -> None:
    """All but one in a thousand, for any one character."""
    text = code_text(code)
    if text[at] in ("-", letter):
        return
    try:
        assert parse_code(text[:at] + letter + text[at + 1 :]) != code
    except UsageError as error:
        assert "mistyped" in str(error)


@pytest.mark.parametrize("text", ["", "AAAA", "AAAA-" * 6 + "AAAA", "ä" * 28, "A" * 29])
def test_what_is_no_code_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="mistyped"):
        parse_code(text)


def test_each_end_and_code_has_its_own_keys() -> None:
    code = make_code()
    pairs = [seed_keys(code, LISTENS), seed_keys(code, CONNECTS), seed_keys(make_code(), LISTENS)]
    assert len({keys.secret for keys in pairs}) == len({keys.public for keys in pairs}) == 3
    assert seed_keys(code, LISTENS) == pairs[0]


@given(st.booleans(), st.sampled_from(["", "hosta"]))
def test_offers_travel_as_text(rotates: bool, host: str) -> None:
    offer = Offer(host, zmq.curve_keypair()[0], zmq.curve_keypair()[0] if rotates else None)
    assert decode_offer(offer.encode()) == offer


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: f'public-key = "{text}"'.encode()))
def test_rubbish_is_no_offer(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_offer(data)


# By files


def test_by_files(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    a.gives_file_to(b, tmp_path / "a.key")
    b.gives_file_to(a, tmp_path / "b.key")
    assert a.knows(b)
    assert b.knows(a)
    assert fingerprint(a.ring.own().public) in b.pair("list")
    listed = json.loads(b.pair("list", "--json"))
    assert listed["peers"] == [{"name": "hosta", "fingerprint": fingerprint(a.ring.own().public), "next": None}]
    b.pair("remove", "hosta")
    assert b.ring.peers() == []


def test_import_wants_the_fingerprint_compared(
    hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = hosts
    path = str(tmp_path / "a.key")
    a.pair("export", path)
    assert "another one" in b.pair("import", path, "--fingerprint", "0000-1111", code=2)
    for answer, text in (("no\n", "nothing was imported"), ("", "no answer"), ("y\n", "nothing was imported")):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert text in b.pair("import", path, code=2)
    assert b.ring.peers() == []
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert fingerprint(a.ring.own().public) in b.pair("import", path)
    assert b.knows(a)


def test_files_that_are_no_public_keys(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    a.ring.make_own()
    assert "SECRET" in b.pair("import", str(a.folder / "own.key_secret"), code=2)
    assert "names no host" in b.pair("import", str(a.folder / "own.key"), code=2)
    (tmp_path / "x").write_bytes(b"x" * 100_000)
    assert "longer than" in b.pair("import", str(tmp_path / "x"), code=2)
    assert "No such file" in b.pair("import", str(tmp_path / "missing"), code=1)
    assert b.ring.peers() == []


# Over the network


class Listening:
    """`writelog pair listen` on a host; `address` and `code` are what it shows."""

    def __init__(self, host: Host, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "writelog.pair", "pair", "listen", "--keys", str(host.folder),
             "--host", host.name, "--listen", LOOPBACK, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.code = read_line(self.process).split()[-1]
        self.port = int(read_line(self.process).rpartition(":")[2])
        self.address = f"127.0.0.1:{self.port}"
        read_line(self.process)

    def end(self) -> tuple[int, str]:
        out, error = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, (out + error).decode()


@pytest.fixture
def listening(hosts: tuple[Host, Host]) -> Iterator[Listening]:
    listening = Listening(hosts[1])
    yield listening
    if listening.process.poll() is None:
        listening.process.kill()
    listening.process.communicate()


def test_by_a_code(hosts: tuple[Host, Host], listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = hosts
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{listening.code}\n"))
    a.pair("connect", listening.address, "--name", "hostb")
    assert listening.end() == (0, f"peer hosta: {fingerprint(a.ring.own().public)}\n")
    assert a.knows(b)
    assert b.knows(a)


def test_a_code_is_good_for_one_try(
    hosts: tuple[Host, Host], listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = hosts
    assert "does not take this code" in a.pair("connect", listening.address, code_text(make_code()), code=1)
    code, text = listening.end()
    assert code == 1
    assert "somebody tried another code" in text
    monkeypatch.setattr("writelog.pair_exchange.ANSWER_S", 0.3)
    assert "nobody listens" in a.pair("connect", listening.address, listening.code, code=1)
    assert a.ring.peers() == b.ring.peers() == []


def test_a_mistyped_code_uses_nothing_up(hosts: tuple[Host, Host], listening: Listening) -> None:
    a, b = hosts
    wrong = ("A" if listening.code[0] != "A" else "B") + listening.code[1:]
    assert "mistyped" in a.pair("connect", listening.address, wrong, code=2)
    a.pair("connect", listening.address, listening.code)
    assert b.knows(a)


def test_who_only_knocks_does_not_use_it_up(hosts: tuple[Host, Host], listening: Listening) -> None:
    a, b = hosts
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n"[:6]):
        with socket.create_connection(("127.0.0.1", listening.port), WAIT_S) as stranger:
            stranger.sendall(greeting)
    a.pair("connect", listening.address, listening.code)
    assert b.knows(a)


def test_a_code_ends(hosts: tuple[Host, Host]) -> None:
    listening = Listening(hosts[1], "--timeout", "0.1")
    code, text = listening.end()
    assert code == 1
    assert "nobody came within 0.1 s" in text


def test_who_knows_only_one_half_of_what_the_code_makes_is_refused() -> None:
    """A client with the listener's public key and a key of its own: the handshake succeeds up to the gate."""
    code, kept = make_code(), list[Offer]()
    address: list[str] = []
    ready = threading.Event()
    failure: list[str] = []

    def listen() -> None:
        with Exchange(True, code, Offer("b", zmq.curve_keypair()[0]), kept.append) as exchange:
            def told(bound: str) -> None:
                address.append(bound)
                ready.set()

            try:
                exchange.listen(LOOPBACK, WAIT_S, told)
            except ReplicationError as error:
                failure.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(WAIT_S)
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger = 0
        client.curve_serverkey = seed_keys(code, LISTENS).public
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.connect(address[0])
        client.send(Offer("mallory", zmq.curve_keypair()[0]).encode())
        thread.join(WAIT_S)
    assert "somebody tried another code" in failure[0]
    assert kept == []


def test_nothing_readable_goes_over_the_wire(hosts: tuple[Host, Host], listening: Listening) -> None:
    """A man in the middle that passes everything on sees neither a key nor a name."""
    a, _ = hosts
    seen = bytearray()

    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            seen.extend(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as middle:
        def serve() -> None:
            with middle.accept()[0] as client, socket.create_connection(("127.0.0.1", listening.port)) as server:
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join(WAIT_S)

        thread = threading.Thread(target=serve)
        thread.start()
        a.pair("connect", f"127.0.0.1:{middle.getsockname()[1]}", listening.code)
        thread.join(WAIT_S)
    assert b"CURVE" in seen
    for secret in (b"hosta", b"hostb", a.ring.own().public, b"public-key", listening.code.encode()):
        assert secret not in seen


@pytest.mark.parametrize(("address", "text"), [
    ("", "no address"), ("hostb:x", "no address"), ("a/b", "no name for a host"),
    ("127.0.0.1:1", "nobody listens"),
])
def test_addresses_that_lead_nowhere(
    hosts: tuple[Host, Host], address: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("writelog.pair_exchange.ANSWER_S", 0.3)
    code = 1 if "nobody" in text else 2
    assert text in hosts[0].pair("connect", address, code_text(make_code()), code=code)


# What it is for


class Replica:
    """A writelog-replica that lives on a host."""

    def __init__(self, host: Host, copy: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "writelog.replica", "--keys", str(host.folder), "--listen", LOOPBACK,
             f"aio:{copy}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.endpoint = read_line(self.process).split()[-1]

    def end(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=WAIT_S)[1].decode()


@pytest.fixture
def rig(env: Env, tmp_path: Path) -> Iterator[Rig]:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(7).randbytes(SIZE_BYTES // 4))
    os.truncate(image, SIZE_BYTES)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    rig = Rig(env, image)
    yield rig
    rig.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def paired(hosts: tuple[Host, Host], tmp_path: Path) -> tuple[Host, Host, Path]:
    a, b = hosts
    a.gives_file_to(b, tmp_path / "a.key")
    b.gives_file_to(a, tmp_path / "b.key")
    copy = tmp_path / "kept.img"
    copy.touch()
    os.truncate(copy, SIZE_BYTES)
    return a, b, copy


def test_paired_hosts_replicate_and_strangers_are_named(
    rig: Rig, paired: tuple[Host, Host, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, copy = paired
    running = Replica(b, copy)
    stranger = Host(tmp_path, "stranger", capsys)
    stranger.ring.make_own()
    b.gives_file_to(stranger, tmp_path / "b.key")
    assert rig.sync(f"--keys={stranger.folder}", "vm1", running.endpoint) == 1
    assert "does not know this sync's key" in capsys.readouterr().err
    assert rig.sync(f"--keys={a.folder}", "--keep-running", "vm1", running.endpoint) == 0
    b.pair("remove", "hosta")
    assert rig.sync(f"--keys={a.folder}", "--keep-running", "vm1", running.endpoint) == 1
    log = running.end()
    for host in (stranger, a):
        assert f"unknown key {fingerprint(host.ring.own().public)} was refused" in log
    assert copy.read_bytes() == rig.image.read_bytes()


def test_a_server_that_only_pretends_is_refused(
    rig: Rig, paired: tuple[Host, Host, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, _, copy = paired
    liar = Host(tmp_path, "liar", capsys)
    a.gives_file_to(liar, tmp_path / "a.key")
    liar.ring.make_own()
    running = Replica(liar, copy)
    assert rig.sync(f"--keys={a.folder}", "vm1", running.endpoint) == 1
    assert "it has another key than the one that is known" in capsys.readouterr().err
    running.end()
    assert not any(copy.read_bytes())


@pytest.mark.parametrize("who", ["sync", "replica"])
def test_keys_rotate_without_a_gap(
    rig: Rig, paired: tuple[Host, Host, Path], tmp_path: Path, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every step a sync goes through; after the last one the old key is worth nothing."""
    a, b, copy = paired
    rotating, other = (a, b) if who == "sync" else (b, a)
    old = rotating.ring.own().public

    def works() -> None:
        assert rig.sync(f"--keys={a.folder}", "--keep-running", "vm1", running.endpoint) == 0
        capsys.readouterr()

    running = Replica(b, copy)
    rotating.pair("rotate")
    works()
    rotating.gives_file_to(other, tmp_path / "new.key")
    assert set(other.ring.peer(rotating.name).candidates) > {old}
    works()
    assert old in other.ring.peer(rotating.name).candidates
    rotating.pair("rotate", "--finish")
    works()
    if who == "replica":  # it runs on, and takes the new key up
        for _ in range(100):
            if other.ring.peer(rotating.name).candidates == (rotating.ring.own().public,):
                break
            works()
    assert other.ring.peer(rotating.name).candidates == (rotating.ring.own().public,)
    assert not other.ring.authorize(old)
    running.end()


def test_a_peer_that_is_removed_loses_its_connection(
    rig: Rig, paired: tuple[Host, Host, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """While it syncs; and the replica serves others on."""
    a, b, copy = paired
    running = Replica(b, copy)
    ended: list[int] = []
    sync = threading.Thread(target=lambda: ended.append(subprocess.run(
        [sys.executable, "-m", "writelog.sync", "--run-dir", str(rig.env.run_dir), f"--keys={a.folder}", "--hold",
         "vm1", running.endpoint], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=WAIT_S).returncode))
    sync.start()
    for _ in range(2000):
        if copy.read_bytes()[:4096] == rig.image.read_bytes()[:4096]:
            break
        threading.Event().wait(0.01)
    b.pair("remove", "hosta")
    sync.join(WAIT_S)
    assert ended == [1]
    assert rig.guest_goes_on()
    assert rig.sync(f"--keys={a.folder}", "vm1", running.endpoint) == 1
    a_file = b.folder.parent / "again.key"
    a.gives_file_to(b, a_file)
    assert rig.sync(f"--keys={a.folder}", "vm1", running.endpoint) == 0
    assert "knows this sync's key no more" in running.end()
