"""nbd: a disk that an NBD server exports, of whatever make: qemu-nbd, nbdkit, another tapdisk.

Use: nbd:unix:/run/disk.nbd
     nbd:nbd://127.0.0.1:10809/export
     nbd:nbd+unix:///export?socket=/run/disk.nbd
     nbd:connections=4,timeout=30,unix:/run/disk.nbd
     nbd:tls-creds=/etc/tapdisk/tls,nbds://host/export

Options:
    connections=N   so many connections, 1 (the default) to 16, if the server says that they show one disk; else 1
    timeout=S       connect again to a server that owes a reply and is silent for S seconds; 60 without, 0: never
    tls-creds=DIR   with an nbds: address: the folder with ca-cert.pem, whose servers alone are taken, and, if the
                    server asks for them, client-cert.pem and client-key.pem
    fua             every change durable before it is acknowledged: nothing is lost if the server crashes
They stand in front of the address, which begins with unix:, tcp:, nbd:, nbds: or nbd+unix: and goes to the level's
end. A short address (unix:, tcp:) names the server's default export. In a URI, write what has a meaning there (and
'|') as %XX.

A connection that ends is made again, for as long as it takes, after 0.1 s at first and 5 s at last. Requests wait
meanwhile, and those that were under way are sent again: none fails, each completes once. If the server comes back
with another size, read-only, or with less than it could do, they fail with ENXIO until the right one is back.

Requests larger than the server takes are split; those that do not fit its blocks are widened, writes by reading
the rest of the block. Discard, write-zeroes and block status are what the server has of them.

Limits: without TLS not encrypted, not authenticated: over a network one trusts. What a server acknowledged and
lost before a flush, because it crashed, is not noticed when it is back (the option fua prevents it). A server that
is slow but alive should not be given up: it could carry out a write of the former connection late, over a newer
one; let the timeout be longer than its longest pause, or 0. The disk's size is a multiple of 512 bytes. Opening
resolves host names and waits up to 10 s.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Final

from tapcore.driver import SECTOR_BYTES, VERBS, DiskInfo, Driver, Feature, OpenFlag
from tapcore.errors import ImageError, UsageError
from tapcore.nbd import wire
from tapcore.nbd.address import HINT, NbdAddress, parse_address
from tapcore.nbd.client_codec import ServerOffer
from tapcore.nbd.fit import Split, Verbs, Widen
from tapcore.nbd.remote import Remote, allocation_id, max_payload_bytes
from tapcore.nbd.tls import load_client_credentials
from tapcore.params import decimal, options, whole
from tapcore.request import Request, fail

DEFAULT_TIMEOUT_S: Final = 60.0
MAX_CONNECTIONS: Final = 16
MAX_MIN_BLOCK_BYTES: Final = 64 << 10
"""The largest smallest block that the NBD specification allows."""


class Nbd(Driver):
    name = "nbd"

    def open(self) -> None:
        """UsageError for a bad option or address; ImageError if the server cannot be reached, has no such export,
        or one that cannot be used in this way."""
        chosen, address = _parse(self.name, self.params)
        writing = not self.flags & (OpenFlag.RDONLY | OpenFlag.QUERY)
        self._remote = remote = Remote(
            self.env, address, writing=writing, fua="fua" in chosen,
            connections=_connections(chosen.get("connections", "1")),
            timeout_s=decimal("timeout", chosen["timeout"]) if "timeout" in chosen else DEFAULT_TIMEOUT_S,
            tls=load_client_credentials(Path(chosen["tls-creds"])) if address.tls else None)
        remote.open()
        try:
            self.info = _info(address, remote.offer, writing=writing, fua="fua" in chosen)
        except ImageError:
            remote.close()
            raise
        self._bind(remote, remote.offer)

    def close(self) -> None:
        """What still waits for the server fails with ESHUTDOWN."""
        self._remote.close()

    def _bind(self, remote: Remote, offer: ServerOffer) -> None:
        """Take the verbs of the levels that this server needs."""
        features = self.info.features
        head: Verbs = Split(remote, max_bytes=max_payload_bytes(offer),
                            fua=bool(offer.flags & wire.NBD_FLAG_SEND_FUA),
                            fast_zeroes=bool(features & Feature.FAST_ZEROES))
        if offer.min_block > 1:
            head = Widen(head, offer.min_block)
        for verb in VERBS:
            setattr(self, verb, getattr(head, verb))
        missing = {"queue_flush": Feature.FLUSH, "queue_discard": Feature.DISCARD, "queue_zeroes": Feature.ZEROES,
                   "queue_status": Feature.STATUS}
        for verb, feature in missing.items():
            if not features & feature:
                delattr(self, verb)
        if self.info.read_only:
            for verb in ("queue_write", "queue_discard", "queue_zeroes"):
                setattr(self, verb, _refuse)
            if not features & Feature.FLUSH:
                self.__dict__["queue_flush"] = _nothing_to_flush


def _parse(driver: str, params: str) -> tuple[dict[str, str], NbdAddress]:
    start = re.search(r"(?:^|,)(?=(?:unix|tcp|nbds?|nbd\+unix):)", params)
    if start is None:
        raise UsageError(f"no NBD address in {params!r}", hint=HINT)
    chosen = options(driver, params[: start.start()], ("connections", "timeout", "fua", "tls-creds"))
    if chosen.get("fua"):
        raise UsageError(f"the option fua takes no value, not {chosen['fua']!r}")
    address = parse_address(params[start.end() :])
    if address.tls != bool(chosen.get("tls-creds")):
        raise UsageError("tls-creds=DIR and an address that begins with nbds: go together",
                         hint="write it like nbd:tls-creds=/etc/tapdisk/tls,nbds://host/export")
    return chosen, address


def _connections(text: str) -> int:
    count = whole("connections", text)
    if not 1 <= count <= MAX_CONNECTIONS:
        raise UsageError(f"{count} connections", hint=f"1 to {MAX_CONNECTIONS} are possible")
    return count


def _info(address: NbdAddress, offer: ServerOffer, *, writing: bool, fua: bool) -> DiskInfo:
    """What the export is as a disk. ImageError if it cannot be used."""
    where = f"{address}, export {address.export!r}"
    flags = offer.flags
    if writing and flags & wire.NBD_FLAG_READ_ONLY:
        raise ImageError(f"{where} is read-only", errno=errno.EROFS,
                         hint="open the disk read-only, or export it for writing")
    if fua and writing and not flags & wire.NBD_FLAG_SEND_FUA:
        raise ImageError(f"{where} has no FUA", errno=errno.EOPNOTSUPP, hint="leave out the option fua")
    block_bytes = offer.min_block
    if (not 1 <= block_bytes <= min(offer.max_block, MAX_MIN_BLOCK_BYTES)
            or block_bytes & (block_bytes - 1)):
        raise ImageError(f"{where} has impossible block sizes: {block_bytes} to {offer.max_block} bytes",
                         errno=errno.EPROTO)
    if offer.size_bytes % max(block_bytes, SECTOR_BYTES) or offer.size_bytes >= 1 << 63:
        raise ImageError(f"{where}: its size, {offer.size_bytes} bytes, is not a multiple of "
                         f"{max(block_bytes, SECTOR_BYTES)}, or is impossible", errno=errno.EINVAL)
    features = Feature.NONE
    for flag, feature in ((wire.NBD_FLAG_SEND_FLUSH, Feature.FLUSH), (wire.NBD_FLAG_SEND_TRIM, Feature.DISCARD),
                          (wire.NBD_FLAG_SEND_WRITE_ZEROES, Feature.ZEROES)):
        if flags & flag:
            features |= feature
    if features & Feature.ZEROES and flags & wire.NBD_FLAG_SEND_FAST_ZERO:
        features |= Feature.FAST_ZEROES
    if allocation_id(offer) is not None:
        features |= Feature.STATUS
    preferred_bytes = min(max(offer.preferred_block, block_bytes), 1 << 25)
    return DiskInfo(offer.size_bytes, features, min_block_bytes=block_bytes, preferred_block_bytes=preferred_bytes,
                    read_only=not writing)


def _refuse(request: Request) -> bool:
    return fail(request, errno.EROFS)


def _nothing_to_flush(request: Request) -> bool:
    return True
