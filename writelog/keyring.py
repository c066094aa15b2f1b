"""The CURVE keys of this host and its peers: files in a folder that belongs to one user.

    own.key_secret, own.key     this host's pair
    next.key_secret, next.key   the pair that follows it, from `writelog pair rotate` to `rotate --finish`
    peers/NAME.key              the public key of a peer
    peers/NAME.next             a newer one of the same peer: either is accepted, until this one is used

Key files are those of pyzmq and czmq (https://rfc.zeromq.org/spec/26 has the handshake): lines of `name = "value"`
with keys in z85. Every change is one rename, so that a reader, which asks anew at each connection, sees the former
state or the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq
import zmq.auth
from zmq.utils import z85

from tapcore.durablefile import remove_file, replace_file
from tapcore.errors import UsageError

logger = logging.getLogger(__name__)

KEY_BYTES: Final = 32
MAX_KEY_FILE_BYTES: Final = 16384
MAX_NAME_CHARACTERS: Final = 64
OWN, NEXT = "own", "next"
SYSTEM_FOLDER: Final = Path("/etc/writelog/keys")
PAIR_HINT: Final = "pair the two hosts with `writelog pair` (--help shows how)"


@dataclass(frozen=True)
class Keys:
    """One end's CURVE pair, z85."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class PeerKeys:
    """What is known of a peer: its public key, and one that it is about to use, if any; z85."""

    name: str
    public: bytes
    next: bytes | None = None

    @property
    def candidates(self) -> tuple[bytes, ...]:
        return (self.public,) if self.next is None else (self.next, self.public)


def fingerprint(public: bytes) -> str:
    """Of a public key in z85: what two people compare. 128 bits of SHA-256."""
    digits = hashlib.sha256(z85.decode(public)).hexdigest()[:32]
    return "-".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def check_public(text: str | bytes) -> bytes:
    """A public key in z85, as bytes. ValueError if it is none."""
    key = text.encode("ascii") if isinstance(text, str) else text
    try:
        raw = z85.decode(key)
    except (KeyError, struct.error):
        raise ValueError("a key is not in z85") from None
    if len(raw) != KEY_BYTES:
        raise ValueError(f"a key is not {KEY_BYTES} bytes long")
    return key


def check_name(name: str) -> str:
    """The name of a host, which becomes a file's name. UsageError if it cannot be one."""
    if len(name) > MAX_NAME_CHARACTERS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", name):
        raise UsageError(f"{name!r} is no name for a host", hint="give letters, digits, '.', ':', '-' and '_', up "
                         f"to {MAX_NAME_CHARACTERS}, with --name")
    return name


def load_keys(path: Path) -> Keys:
    """The pair in a secret certificate file. UsageError names the file, which others must not be able to read."""
    public, secret = _load(path)
    if secret is None:
        raise UsageError("the file holds no secret key", path=str(path),
                         hint="give the .key_secret file that writelog-replica keygen wrote")
    if path.stat().st_mode & 0o077:
        raise UsageError("the secret key is open to other users", path=str(path), hint=f"chmod 600 {path}")
    return Keys(public, secret)


def load_public_key(path: Path) -> bytes:
    """The public key in a certificate file; UsageError names the file."""
    return _load(path)[0]


def load_authorized(path: Path) -> frozenset[bytes]:
    """The public keys in a certificate file, or in every `*.key` of a directory."""
    files = sorted(path.glob("*.key")) if path.is_dir() else [path]
    if not files:
        raise UsageError("the directory holds no *.key file", path=str(path))
    return frozenset(load_public_key(file) for file in files)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        if path.stat().st_size > MAX_KEY_FILE_BYTES:
            raise ValueError("it is too large")
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None:
                check_public(key)
        return public, secret
    except OSError as error:
        raise UsageError(f"cannot read the key: {error.strerror or error}", path=str(path)) from None
    except ValueError as error:
        raise UsageError(f"this is no key file: {error}", path=str(path)) from None


def key_text(public: bytes, secret: bytes | None = None) -> bytes:
    """The content of a key file."""
    lines = [f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    kind = "a public key" if secret is None else "a SECRET key: show it to nobody"
    return "\n".join([f"# writelog: {kind}; fingerprint {fingerprint(public)}", "curve", *lines, ""]).encode()


def create_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.key (public) and `name`.key_secret (for the owner alone); UsageError if one exists already."""
    paths = directory / f"{name}.key", directory / f"{name}.key_secret"
    for path in paths:
        if path.exists():
            raise UsageError("there is a key of this name already", path=str(path),
                             hint="choose another --name, or remove both files")
    public, secret = zmq.curve_keypair()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(paths[1], key_text(public, secret))
        replace_file(paths[0], key_text(public))
    except OSError as error:
        raise UsageError(f"cannot write a key: {error.strerror}", path=str(directory)) from None
    return paths


def default_folder() -> Path:
    """/etc/writelog/keys for root, $XDG_CONFIG_HOME/writelog/keys for others."""
    if os.geteuid() == 0:
        return SYSTEM_FOLDER
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "writelog" / "keys"


class Keyring:
    """The folder, or the default one. Nothing is read before it is asked for; the folder is made when there is
    something to keep. UsageError from all of it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self._peers = self.folder / "peers"

    # This host

    @property
    def is_there(self) -> bool:
        """Whether this host has a key of its own."""
        return (self.folder / f"{OWN}.key_secret").exists()

    def own(self) -> Keys:
        """This host's pair."""
        if not self.is_there:
            raise UsageError("this host has no key", path=str(self.folder), hint=PAIR_HINT)
        self._check_folder()
        return load_keys(self.folder / f"{OWN}.key_secret")

    def make_own(self) -> Keys:
        """This host's pair, made if there is none yet."""
        with self._locked():
            if not self.is_there:
                self._make(OWN)
        return self.own()

    def next(self) -> Keys | None:
        """The pair that will follow the own one, if there is one."""
        path = self.folder / f"{NEXT}.key_secret"
        return load_keys(path) if path.exists() else None

    def rotate(self) -> Keys:
        """Make the pair that will follow."""
        self.own()
        with self._locked():
            if self.next() is not None:
                raise UsageError("a new key is there already", path=str(self.folder),
                                 hint="give it to every peer, then `writelog pair rotate --finish`")
            self._make(NEXT)
        keys = self.next()
        assert keys is not None
        return keys

    def finish_rotation(self) -> Keys:
        """Use the new pair from now on; the old one is gone."""
        with self._locked():
            if self.next() is None:
                raise UsageError("there is no new key", path=str(self.folder),
                                 hint="`writelog pair rotate` makes one")
            # The secret half counts, and holds both; a crash in between is made good by the next call.
            (self.folder / f"{NEXT}.key_secret").replace(self.folder / f"{OWN}.key_secret")
            keys = self.own()
            replace_file(self.folder / f"{OWN}.key", key_text(keys.public))
            remove_file(self.folder / f"{NEXT}.key")
        return keys

    def _make(self, name: str) -> None:
        public, secret = zmq.curve_keypair()
        replace_file(self.folder / f"{name}.key", key_text(public))
        replace_file(self.folder / f"{name}.key_secret", key_text(public, secret))

    # Peers

    def peers(self) -> list[PeerKeys]:
        """All that are known, by name."""
        if not self._peers.is_dir():
            return []
        self._check_folder()
        return [self._peer(path.stem) for path in sorted(self._peers.glob("*.key"))]

    def _peer(self, name: str) -> PeerKeys:
        # The newer one first: it may become the other one meanwhile.
        path = self._peers / f"{name}.next"
        newer = load_public_key(path) if path.exists() else None
        return PeerKeys(name, load_public_key(self._peers / f"{name}.key"), newer)

    def peer(self, name: str) -> PeerKeys:
        """The peer of this name."""
        for known in self.peers():
            if known.name == name:
                return known
        raise UsageError(f"there is no peer {name!r}", path=str(self.folder), hint=self._names_hint())

    def peer_at(self, host: str) -> PeerKeys:
        """The peer that is called like `host`, or else the only one there is."""
        known = self.peers()
        for peer in known:
            if peer.name == host:
                return peer
        if len(known) == 1:
            return known[0]
        raise UsageError(f"none of the peers is called {host!r}" if known else "there is no peer yet",
                         path=str(self.folder), hint=self._names_hint())

    def _names_hint(self) -> str:
        names = ", ".join(peer.name for peer in self.peers())
        return f"--peer takes one of: {names}" if names else PAIR_HINT

    def add(self, name: str, public: bytes, newer: bytes | None = None) -> PeerKeys:
        """Accept a peer's keys. One that is known by another key keeps it: the new one goes beside it, and it
        ends when the new one is used."""
        check_name(name)
        with self._locked():
            known = self._peer(name) if (self._peers / f"{name}.key").exists() else None
            for other in self.peers():
                if other.name != name and {public, newer} & set(other.candidates):
                    raise UsageError(f"this key belongs to the peer {other.name!r} already", path=str(self.folder),
                                     hint="one key has one name: `writelog pair remove` forgets a peer")
            if known is None:
                self._write(f"{name}.key", public)
            else:
                newer = newer or public
            if newer is not None and newer != (known.public if known else public):
                self._write(f"{name}.next", newer)
        return self.peer(name)

    def _write(self, file: str, public: bytes) -> None:
        replace_file(self._peers / file, key_text(public))

    def remove(self, name: str) -> None:
        """Forget a peer: it is let in no more."""
        self.peer(name)
        with self._locked():
            remove_file(self._peers / f"{name}.next")
            remove_file(self._peers / f"{name}.key")

    def retire_old(self, name: str) -> None:
        """Forget a peer's old key; the newer one stays."""
        if self.peer(name).next is None:
            raise UsageError(f"the peer {name!r} has one key only", path=str(self.folder))
        with self._locked():
            (self._peers / f"{name}.next").replace(self._peers / f"{name}.key")

    def used(self, public: bytes) -> None:
        """A peer has proved that it holds the key: if it is a newer one, the old one ends. Where the folder cannot
        be changed from here, both stay."""
        for peer in self.peers():
            if peer.next == public:
                try:
                    self.retire_old(peer.name)
                    logger.warning("%s uses its new key %s: the old one is not accepted any more",
                                   peer.name, fingerprint(public))
                except (OSError, UsageError) as error:
                    logger.warning("the old key of %s stays: %s", peer.name, error)

    def knows(self, public: bytes) -> bool:
        """Whether it is the key of a peer."""
        return any(public in peer.candidates for peer in self.peers())

    def authorize(self, public: bytes) -> bool:
        """Whether a client with this key, which it has proved to hold, is let in. Asked anew for each."""
        if not self.knows(public):
            return False
        self.used(public)
        return True

    # The folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._peers.mkdir(mode=0o700, exist_ok=True)
            self._check_folder()
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)
        except OSError as error:
            raise UsageError(f"cannot change the keys: {error.strerror or error}",
                             path=str(self.folder)) from None

    def _check_folder(self) -> None:
        """Whoever can write there can let himself in."""
        for path in (self.folder, self._peers):
            status = path.stat() if path.exists() else None
            if status is not None and (status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid())):
                raise UsageError("other users can change the keys", path=str(path),
                                 hint="it must belong to you or root, with mode 0700")
