"""Certificates in folders, as QEMU and tapdisk want them."""

from __future__ import annotations

from pathlib import Path

import trustme


def write_credentials(folder: Path, kind: str, authority: trustme.CA, *names: str) -> Path:
    """`folder` with what a server or a client needs."""
    folder.mkdir()
    certificate = authority.issue_cert(*names)
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / f"{kind}-cert.pem")
    certificate.private_key_pem.write_to_path(folder / f"{kind}-key.pem")
    (folder / f"{kind}-key.pem").chmod(0o600)
    return folder
