"""What two hosts tell each other when they are paired, and the one-time code that protects it.

The code is 128 random bits (base32, with two characters that show a slip of the pen). It is the seed of both ends'
CURVE pairs for one connection: each end can compute the other's public key, and expects exactly that one. So the
CURVE handshake (https://rfc.zeromq.org/spec/26) is what proves that both know the code, and what encrypts; nothing
of the code is sent. Who does not know it has to guess 128 bits. Guesses can be tried on a recorded exchange, which
is why the code is that long; but what was exchanged is public anyway.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.utils import z85

from tapcore.errors import UsageError
from writelog.keyring import Keys, check_name, check_public, fingerprint

CODE_BYTES: Final = 16
CODE_CHARACTERS: Final = 26
CHECK_CHARACTERS: Final = 2
LISTENS: Final = b"writelog listens"
CONNECTS: Final = b"writelog connect"
"""BLAKE2's personalization of the seed: which end's key it makes."""
MAX_OFFER_BYTES: Final = 4096


@dataclass(frozen=True)
class Offer:
    """The public key of a host, and the one that is to follow, if any; what the host calls itself."""

    host: str
    public: bytes
    next: bytes | None = None

    @property
    def newest(self) -> bytes:
        return self.next or self.public

    def encode(self) -> bytes:
        """A key file, with two more lines in it."""
        lines = [f"# writelog: the public key of a host; fingerprint {fingerprint(self.newest)}", "metadata",
                 f'    host = "{self.host}"']
        if self.next is not None:
            lines.append(f'    next-public-key = "{self.next.decode()}"')
        return "\n".join([*lines, "curve", f'    public-key = "{self.public.decode()}"', ""]).encode()


def decode_offer(data: bytes) -> Offer:
    """What `Offer.encode` made, or a public key file without a host. ValueError says what is wrong."""
    if len(data) > MAX_OFFER_BYTES:
        raise ValueError(f"it is longer than {MAX_OFFER_BYTES} bytes")
    fields = dict(re.findall(r'^\s*([a-z-]+) = "([^"\n]*)"\s*$', data.decode("ascii"), re.MULTILINE))
    if "secret-key" in fields:
        raise ValueError("it holds a SECRET key, which must not leave its host: `writelog pair export` makes the "
                         "right file")
    if "public-key" not in fields:
        raise ValueError("it holds no public key")
    newer = fields.get("next-public-key")
    return Offer(fields.get("host", ""), check_public(fields["public-key"]),
                 None if newer is None else check_public(newer))


def make_code() -> bytes:
    return secrets.token_bytes(CODE_BYTES)


def code_text(code: bytes) -> str:
    """For people: seven groups of four characters."""
    text = base64.b32encode(code).decode().rstrip("=")
    text += base64.b32encode(hashlib.blake2b(code).digest()).decode()[:CHECK_CHARACTERS]
    return "-".join(text[at : at + 4] for at in range(0, len(text), 4))


def parse_code(text: str) -> bytes:
    """The code. UsageError if it was mistyped: that uses nothing up."""
    plain = re.sub(r"[\s-]", "", text).upper().replace("0", "O").replace("1", "I").replace("8", "B")
    try:
        code = base64.b32decode(plain[:CODE_CHARACTERS] + "======")
    except ValueError:
        code = b""
    if len(code) != CODE_BYTES or code_text(code).replace("-", "") != plain:
        raise UsageError("this is no code: it was mistyped",
                         hint="copy all seven groups that the other host shows")
    return code


def seed_keys(code: bytes, end: bytes) -> Keys:
    """The pair of one end (LISTENS or CONNECTS) for the one connection that the code is for."""
    secret = z85.encode(hashlib.blake2b(code, digest_size=32, person=end).digest())
    return Keys(zmq.curve_public(secret), secret)


def named(offer: Offer, name: str | None) -> str:
    """What to call the peer: `name`, or what it calls itself."""
    if not (name or offer.host):
        raise UsageError("the file names no host", hint="give it a name with --name")
    return check_name(name or offer.host)
