"""The keyring's folder: own keys, peers, and keys that change."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from tapcore.errors import UsageError
from writelog.keyring import Keyring, PeerKeys, default_folder, fingerprint, load_public_key


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "etc" / "keys")


def public_key() -> bytes:
    return zmq.curve_keypair()[0]


def test_own_key_is_made_once(ring: Keyring) -> None:
    assert not ring.is_there
    with pytest.raises(UsageError, match="writelog pair"):
        ring.own()
    keys = ring.make_own()
    assert ring.make_own() == keys == ring.own()
    assert load_public_key(ring.folder / "own.key") == keys.public
    assert (ring.folder / "own.key_secret").stat().st_mode & 0o777 == 0o600
    assert ring.folder.stat().st_mode & 0o777 == 0o700


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_folder() == Path("/etc/writelog/keys")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "writelog" / "keys"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".config" / "writelog" / "keys"


def test_peers_are_found_by_host_or_if_there_is_one_only(ring: Keyring) -> None:
    with pytest.raises(UsageError, match="no peer yet"):
        ring.peer_at("host-b")
    one, two = public_key(), public_key()
    ring.add("host-b", one)
    assert ring.peer_at("192.0.2.7") == PeerKeys("host-b", one)
    ring.add("192.0.2.7", two)
    assert ring.peer_at("192.0.2.7") == PeerKeys("192.0.2.7", two)
    with pytest.raises(UsageError, match=r"--peer takes one of: 192\.0\.2\.7, host-b"):
        ring.peer_at("192.0.2.9")
    ring.remove("host-b")
    assert [peer.name for peer in ring.peers()] == ["192.0.2.7"]
    assert not ring.authorize(one)
    assert ring.authorize(two)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "-x", "a b", "x" * 65, "a\n"])
def test_a_name_is_no_path(ring: Keyring, name: str) -> None:
    with pytest.raises(UsageError, match="no name for a host"):
        ring.add(name, public_key())
    assert not ring.folder.exists()


def test_one_key_has_one_name(ring: Keyring) -> None:
    key = public_key()
    ring.add("a", key)
    assert ring.add("a", key) == PeerKeys("a", key)
    with pytest.raises(UsageError, match="peer 'a' already"):
        ring.add("b", key)


def test_a_peers_new_key_is_accepted_beside_the_old_one_until_it_is_used(ring: Keyring) -> None:
    old, new = public_key(), public_key()
    ring.add("a", old)
    assert ring.add("a", old, new) == PeerKeys("a", old, new)
    assert ring.authorize(old)
    assert ring.authorize(old)
    assert ring.authorize(new)
    assert not ring.authorize(old)
    assert ring.peers() == [PeerKeys("a", new)]


def test_the_operator_can_end_an_old_key(ring: Keyring) -> None:
    old, new = public_key(), public_key()
    ring.add("a", old)
    with pytest.raises(UsageError, match="one key only"):
        ring.retire_old("a")
    assert ring.add("a", new) == PeerKeys("a", old, new)
    ring.retire_old("a")
    assert ring.peers() == [PeerKeys("a", new)]


def test_own_keys_rotate(ring: Keyring) -> None:
    with pytest.raises(UsageError, match="has no key"):
        ring.rotate()
    old = ring.make_own()
    with pytest.raises(UsageError, match="no new key"):
        ring.finish_rotation()
    new = ring.rotate()
    assert ring.own() == old
    assert ring.next() == new != old
    with pytest.raises(UsageError, match="there already"):
        ring.rotate()
    assert ring.finish_rotation() == ring.own() == new
    assert ring.next() is None
    assert sorted(path.name for path in ring.folder.iterdir()) == ["own.key", "own.key_secret", "peers"]
    assert load_public_key(ring.folder / "own.key") == new.public


def test_a_folder_that_others_can_change_is_refused(ring: Keyring) -> None:
    ring.make_own()
    ring.add("a", public_key())
    for folder in (ring.folder / "peers", ring.folder):
        folder.chmod(0o770)
        for use in (ring.own, ring.peers, ring.rotate):
            with pytest.raises(UsageError, match="other users can change the keys"):
                use()
        folder.chmod(0o700)
    assert ring.own()


def test_fingerprints_are_short_and_differ() -> None:
    assert fingerprint(b"0" * 40) == "6668-7aad-f862-bd77-6c8f-c18b-8e9f-8e20"
    assert fingerprint(public_key()) != fingerprint(public_key())
