"""What QEMU's monitor and the command line say about a migration: is it possible, and how far is it? No I/O.

QEMU's commands and answers: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tapcore.errors import ReplicationError, UsageError, WritelogError
from tapcore.nbd.address import NbdAddress, parse_address

CAPABILITIES: Final = ("events", "pause-before-switchover", "return-path")
"""What QEMU's migration must be able to do. The last: the destination says whether it runs."""
THROTTLE_CAPABILITY: Final = "auto-converge"
UNCHECKED: Final = "--no-disk-check"
ENDED_BADLY: Final = frozenset({"failed", "cancelled", "cancelling"})
STOPPED: Final = "pre-switchover"
UNDER_WAY: Final = frozenset({"setup", "active", "device", STOPPED, "cancelling", "wait-unplug",
                              "postcopy-active", "postcopy-paused", "postcopy-recover", "colo"})


def capabilities_to_set(answer: Iterable[Mapping[str, Any]], may_throttle: bool) -> dict[str, bool]:
    """Of the answer to query-migrate-capabilities: those that are off and to be on. ReplicationError if this QEMU
    lacks one."""
    states = {str(item["capability"]): bool(item["state"]) for item in answer}
    wanted = [*CAPABILITIES, *([THROTTLE_CAPABILITY] if may_throttle else [])]
    missing = [name for name in wanted if name not in states]
    if missing:
        raise ReplicationError(f"this QEMU's migration lacks {', '.join(missing)}",
                               hint="QEMU 4.0 or newer has it")
    return {name: True for name in wanted if not states[name]}


def check_memory_uri(uri: str, may_leave: bool) -> None:
    """UsageError unless `uri` is tcp:HOST:PORT or unix:/path, and on this machine if it may not leave it."""
    kind, _, place = uri.partition(":")
    host, _, port = place.rpartition(":")
    if kind == "unix" and place:
        return
    if kind != "tcp" or not host or not port.isdecimal():
        raise UsageError(f"{uri!r} is no place to migrate to", hint="write it like tcp:192.0.2.7:4444")
    if not may_leave and not NbdAddress(host=host.strip("[]")).loopback:
        raise UsageError(f"{uri} is not on this machine, and without TLS anyone on the way can read and change "
                         "the guest's memory", hint="give both QEMUs a tls-creds object, and its id "
                                                    "with --tls-creds; or --insecure-memory")


def address_of(filename: str) -> NbdAddress | None:
    """The NBD export that QEMU means by the name of an image, if it is one."""
    try:
        if not filename.startswith("json:"):
            return parse_address(filename) if filename.startswith("nbd") else None
        options: Any = json.loads(filename.removeprefix("json:"))
    except (WritelogError, ValueError):
        return None
    while isinstance(options, dict) and isinstance(options.get("file"), dict):
        options = options["file"]
    if not isinstance(options, dict) or options.get("driver") != "nbd":
        return None
    server = options.get("server")
    if not isinstance(server, dict):
        server = {key.removeprefix("server."): value for key, value in options.items()}
    export, path, host = str(options.get("export") or ""), server.get("path"), server.get("host")
    if path:
        return NbdAddress(export, path=str(path))
    port = str(server.get("port") or NbdAddress.port)
    return NbdAddress(export, host=str(host), port=int(port)) if host and port.isdecimal() else None


def check_disks(blocks: Iterable[Mapping[str, Any]], exports: Mapping[str, Iterable[str]]) -> None:
    """Of the answer to query-block: is each disk's export (`exports` has its URIs) one of the guest's, and every
    writable disk of the guest one of them? ReplicationError if not."""
    ours = {name: {_key(parse_address(uri)) for uri in uris} for name, uris in exports.items()}
    found: set[str] = set()
    strangers: list[str] = []
    for block in blocks:
        inserted = block.get("inserted")
        if not isinstance(inserted, dict):
            continue
        filename = str(inserted.get("file", ""))
        address = address_of(filename)
        names = {name for name, keys in ours.items() if address is not None and _key(address) in keys}
        found |= names
        if not names and not inserted.get("ro"):
            strangers.append(f"{block.get('device') or block.get('qdev') or '?'} ({filename})")
    for name in ours:
        if name not in found:
            raise ReplicationError(f"the guest has no disk on the export of {name!r}",
                                   hint="is it another guest's? query-block in QEMU's monitor shows its own; if "
                                        f"it has this one under another name: {UNCHECKED}")
    if strangers:
        raise ReplicationError(f"the guest also writes to {', '.join(strangers)}",
                               hint="give each with --disk; or, if the destination has it already, such as on "
                                    f"shared storage: {UNCHECKED}")


def _key(address: NbdAddress) -> tuple[str, str]:
    host = "127.0.0.1" if address.host == "localhost" else address.host
    return address.export, os.path.realpath(address.path) if address.path is not None else f"{host}:{address.port}"
