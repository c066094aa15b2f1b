"""Which keys a sync and a replica use: the keyring's, or files that options name, or none, on one machine."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tapcore.errors import UsageError
from writelog.keyring import PAIR_HINT, Keyring, Keys, load_authorized, load_keys, load_public_key
from writelog.replica_keys import KeySource
from writelog.sync_link import Credentials, Peer
from writelog.sync_transport import check_endpoint, endpoint_host


@dataclass(frozen=True)
class Door:
    """A replica's own pair, and who is let in; None for anyone on this machine. Both come from `source`."""

    keys: Keys | None
    authorize: Callable[[bytes], bool]
    source: KeySource | None = None


def add_key_options(parser: argparse.ArgumentParser, theirs: str, theirs_help: str) -> None:
    """--keys, --key and what goes with it, --insecure-loopback-only."""
    parser.add_argument("--keys", type=Path, metavar="DIR",
                        help="where `writelog pair` keeps the keys (default: /etc/writelog/keys for root, "
                             "$XDG_CONFIG_HOME/writelog/keys for others)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="instead: the secret key of this end")
    parser.add_argument(theirs, type=Path, metavar="PATH", help=f"with --key: {theirs_help}")
    parser.add_argument("--insecure-loopback-only", action="store_true",
                        help="no keys: every user of this machine can read and change the disk; addresses of "
                             "others are refused")


def check_key_options(parser: argparse.ArgumentParser, options: argparse.Namespace, theirs: str) -> None:
    """Ends the program if they contradict each other."""
    named = getattr(options, theirs.removeprefix("--").replace("-", "_"))
    if (options.key is None) != (named is None):
        parser.error(f"--key and {theirs} go together")
    if (options.keys is not None) + (options.key is not None) + options.insecure_loopback_only > 1:
        parser.error("--keys, --key and --insecure-loopback-only exclude each other")


def find_peer(endpoint: str, options: argparse.Namespace) -> Peer:
    """The replica at `endpoint`, with the keys that a sync uses for it. UsageError if there are none."""
    check_endpoint(endpoint, not options.insecure_loopback_only)
    timeout_s = options.peer_timeout
    if options.insecure_loopback_only:
        return Peer(endpoint, None, timeout_s)
    if options.key is not None:
        fixed = Credentials(load_keys(options.key), (load_public_key(options.server_key),))
        return Peer(endpoint, lambda: fixed, timeout_s)
    ring = _keyring(options)
    host = "" if endpoint.startswith("ipc://") else endpoint_host(endpoint)
    name = (ring.peer(options.peer) if options.peer else ring.peer_at(host)).name

    def credentials() -> Credentials:
        """Asked at each connection: either end may have changed its key since the last one."""
        return Credentials(ring.own(), ring.peer(name).candidates, ring.used)

    return Peer(endpoint, credentials, timeout_s)


def open_door(endpoint: str, options: argparse.Namespace) -> Door:
    """The keys of a replica that listens at `endpoint`. UsageError if there are none."""
    check_endpoint(endpoint, not options.insecure_loopback_only)
    if options.insecure_loopback_only:
        return Door(None, lambda key: True)
    if options.key is not None:
        keys, _ = load_keys(options.key), load_authorized(options.authorized)

        def is_authorized(key: bytes) -> bool:
            return key in load_authorized(options.authorized)

        return Door(keys, is_authorized, KeySource(lambda: load_keys(options.key), is_authorized))
    ring = _keyring(options)
    return Door(ring.own(), ring.authorize, KeySource(ring.own, ring.knows))


def _keyring(options: argparse.Namespace) -> Keyring:
    ring = Keyring(options.keys)
    if not ring.is_there:
        raise UsageError("there are no keys, without which anyone on the way could read and change the disk",
                         path=str(ring.folder), errno=errno.EPERM,
                         hint=f"{PAIR_HINT}; or, where both ends run on one machine that is yours alone, "
                              "--insecure-loopback-only")
    return ring
