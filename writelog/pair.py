"""`writelog pair`: makes this host's key, and exchanges public keys with other hosts."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tapcore.errors import UsageError
from writelog.keyring import MAX_KEY_FILE_BYTES, Keyring, PeerKeys, check_name, fingerprint
from writelog.pair_code import Offer, code_text, decode_offer, make_code, named, parse_code
from writelog.pair_exchange import Exchange
from writelog.replica import run_command, some_seconds

DEFAULT_PORT: Final = 5598

DESCRIPTION = """\
Replication is encrypted, and each host lets in only hosts whose keys it knows. Pairing makes a key on both hosts
and tells each the public half of the other's; after it neither writelog-sync nor writelog-replica needs an
option for keys."""

EXAMPLES = """\
over the network, with a one-time code that only you carry from one screen to the other:
  hostb# writelog pair listen
  hosta# writelog pair connect hostb          asks for the code
by files, where the hosts do not reach each other yet (in both directions):
  hosta# writelog pair export > hosta.key     shows a fingerprint
  hostb# writelog pair import hosta.key       asks whether it is the same
to change this host's key while replication goes on:
  hosta# writelog pair rotate                 makes a new key; then pair again with every peer, as above
  hosta# writelog pair rotate --finish        uses it; each peer forgets the old one when it meets the new one
"""

ROTATED = """\
This host still uses its old key, {old}.
Give the new one to every peer (writelog pair listen, connect or export), then: writelog pair rotate --finish"""

FINISHED = """\
A writelog-replica that runs here uses the new key as soon as it has no connection. Peers accept both keys until
they have met the new one."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="writelog", description="Keys for replication: `writelog pair --help`.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pair = commands.add_parser("pair", help="make and exchange keys", description=DESCRIPTION, epilog=EXAMPLES,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = pair.add_subparsers(required=True, metavar="COMMAND")

    def verb(run: Callable[[Keyring, argparse.Namespace], None], name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EXAMPLES,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
        added.add_argument("--keys", type=Path, metavar="DIR",
                           help="where the keys are (default: /etc/writelog/keys for root, "
                                "$XDG_CONFIG_HOME/writelog/keys for others)")
        added.set_defaults(run=run)
        return added

    def host_option(added: argparse.ArgumentParser) -> None:
        added.add_argument("--host", default=socket.gethostname(), metavar="NAME",
                           help="what the peer shall call this host (default: %(default)s)")

    def name_option(added: argparse.ArgumentParser, default: str) -> None:
        added.add_argument("--name", help=f"what to call the peer here (default: {default})")

    added = verb(run_listen, "listen", "show a one-time code, and wait for the host where it is entered")
    added.add_argument("--listen", default=f"tcp://0.0.0.0:{DEFAULT_PORT}", metavar="tcp://HOST:PORT",
                       help="default: %(default)s")
    added.add_argument("--timeout", type=some_seconds, default=300.0, metavar="S",
                       help="how long the code is good (default: %(default)g s)")
    name_option(added, "what it calls itself")
    host_option(added)
    added = verb(run_connect, "connect", "exchange keys with the host that listens")
    added.add_argument("address", metavar="HOST[:PORT]", help=f"default port: {DEFAULT_PORT}")
    added.add_argument("code", nargs="?", metavar="CODE",
                       help="what the other host shows; asked for if it is not given (other users of this machine "
                            "can see arguments)")
    name_option(added, "HOST, so that writelog-sync finds it by its address")
    host_option(added)
    added = verb(run_export, "export", "write this host's public key, for `writelog pair import`")
    added.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: standard output")
    host_option(added)
    added = verb(run_import, "import", "accept the public key in a file, once its fingerprint was compared")
    added.add_argument("file", type=Path, metavar="FILE")
    added.add_argument("--fingerprint", metavar="TEXT", help="what `export` showed; asked for if it is not given")
    name_option(added, "what the file says")
    added = verb(run_list, "list", "show this host's key and those of its peers")
    added.add_argument("--json", action="store_true", help="as JSON")
    added = verb(run_remove, "remove", "refuse a peer; a replica that runs ends its connection within a second")
    added.add_argument("name", metavar="NAME")
    added.add_argument("--old", action="store_true", help="only the older of its two keys")
    added = verb(run_rotate, "rotate", "make a new key for this host, beside the old one")
    added.add_argument("--finish", action="store_true", help="use the new key from now on, and forget the old one")
    return parser.parse_args(arguments)


def own_offer(ring: Keyring, options: argparse.Namespace) -> Offer:
    """This host's keys, made if there are none."""
    host = check_name(options.host)
    own, newer = ring.make_own(), ring.next()
    return Offer(host, own.public, newer.public if newer else None)


def keeper(ring: Keyring, name: str | None) -> Callable[[Offer], None]:
    """What keeps an offer in the ring and says so."""

    def keep(offer: Offer) -> None:
        print(told(ring.add(named(offer, name), offer.public, offer.next)), flush=True)

    return keep


def told(peer: PeerKeys) -> str:
    if peer.next is None:
        return f"peer {peer.name}: {fingerprint(peer.public)}"
    return f"peer {peer.name}: {fingerprint(peer.next)}, and until it is used {fingerprint(peer.public)}"


def run_listen(ring: Keyring, options: argparse.Namespace) -> None:
    code, offer = make_code(), own_offer(ring, options)
    if options.name:
        check_name(options.name)

    def ready(endpoint: str) -> None:
        print(f"code: {code_text(code)}\non the other host: writelog pair connect {offer.host}:"
              f"{endpoint.rpartition(':')[2]}\nwaiting for it for {options.timeout:g} s", flush=True)

    with Exchange(True, code, offer, keeper(ring, options.name)) as exchange:
        exchange.listen(options.listen, options.timeout, ready)


def run_connect(ring: Keyring, options: argparse.Namespace) -> None:
    host, colon, port = options.address.rpartition(":")
    if not colon or options.address.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = options.address, str(DEFAULT_PORT)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    if not (host and port.isdecimal()):
        raise UsageError(f"{options.address!r} is no address", hint="write it like hostb or 192.0.2.7:5598")
    name = check_name(options.name or host.strip("[]"))
    code = parse_code(options.code or ask("code: "))
    with Exchange(False, code, own_offer(ring, options), keeper(ring, name)) as exchange:
        exchange.connect(f"tcp://{host}:{port}")


def run_export(ring: Keyring, options: argparse.Namespace) -> None:
    offer = own_offer(ring, options)
    if options.file is None:
        sys.stdout.write(offer.encode().decode())
    else:
        options.file.write_bytes(offer.encode())
    print(f"fingerprint: {fingerprint(offer.newest)}", file=sys.stderr)


def run_import(ring: Keyring, options: argparse.Namespace) -> None:
    with options.file.open("rb") as file:
        data = file.read(MAX_KEY_FILE_BYTES)
    try:
        offer = decode_offer(data)
    except ValueError as error:
        raise UsageError(f"this is no public key: {error}", path=str(options.file)) from None
    name, shown = named(offer, options.name), fingerprint(offer.newest)
    if options.fingerprint is None:
        answer = ask(f"fingerprint: {shown}\nIs it what `writelog pair export` showed on {name}? [yes/no] ")
        if answer.strip().lower() != "yes":
            raise UsageError("nothing was imported")
    elif options.fingerprint.strip().lower() != shown:
        raise UsageError(f"the fingerprint is another one, {shown}: nothing was imported", path=str(options.file),
                         hint="this may be another host's key, or a forged one")
    keeper(ring, name)(offer)


def ask(question: str) -> str:
    """A line from standard input; the question goes to stderr."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise UsageError("no answer", hint="give it as an argument where there is no terminal")
    return line


def run_list(ring: Keyring, options: argparse.Namespace) -> None:
    own, newer = (ring.own(), ring.next()) if ring.is_there else (None, None)
    if options.json:
        print(json.dumps({
            "folder": str(ring.folder), "own": fingerprint(own.public) if own else None,
            "next": fingerprint(newer.public) if newer else None,
            "peers": [{"name": peer.name, "fingerprint": fingerprint(peer.public),
                       "next": fingerprint(peer.next) if peer.next else None} for peer in ring.peers()]}))
        return
    print(f"this host: {fingerprint(own.public) if own else 'no key yet'}")
    if newer:
        print(f"  to follow: {fingerprint(newer.public)}")
    for peer in ring.peers():
        print(told(peer))


def run_remove(ring: Keyring, options: argparse.Namespace) -> None:
    if options.old:
        ring.retire_old(options.name)
    else:
        ring.remove(options.name)


def run_rotate(ring: Keyring, options: argparse.Namespace) -> None:
    if options.finish:
        print(f"this host: {fingerprint(ring.finish_rotation().public)}\n{FINISHED}")
    else:
        print(f"to follow: {fingerprint(ring.rotate().public)}")
        print(ROTATED.format(old=fingerprint(ring.own().public)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        options.run(Keyring(options.keys), options)
        return 0

    return run_command(command, "writelog")


if __name__ == "__main__":
    sys.exit(main())
