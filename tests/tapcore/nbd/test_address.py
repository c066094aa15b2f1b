"""The forms of an NBD address."""

from __future__ import annotations

import pytest

from tapcore.errors import UsageError
from tapcore.nbd.address import NbdAddress, parse_address


@pytest.mark.parametrize(("text", "address"), [
    ("unix:/a/b", NbdAddress(path="/a/b")),
    ("nbd+unix:///?socket=/a/b", NbdAddress(path="/a/b")),
    ("nbd+unix:///disk?socket=/a/b%20c", NbdAddress("disk", path="/a/b c")),
    ("tcp:127.0.0.1:1234", NbdAddress(host="127.0.0.1", port=1234)),
    ("tcp:[::1]:1234", NbdAddress(host="::1", port=1234)),
    ("tcp:localhost", NbdAddress(port=10809)),
    ("nbd://127.0.0.1:0", NbdAddress(host="127.0.0.1", port=0)),
    ("nbd://host", NbdAddress(host="host")),
    ("nbd://host:99/disk%20a", NbdAddress("disk a", host="host", port=99)),
    ("nbd:///disk", NbdAddress("disk")),
    ("nbd://host//abs/name", NbdAddress("/abs/name", host="host")),
])
def test_forms(text: str, address: NbdAddress) -> None:
    assert parse_address(text) == address
    assert parse_address(address.uri) == address
    assert parse_address(str(address)) == NbdAddress(path=address.path, host=address.host, port=address.port)


@pytest.mark.parametrize("text", [
    "", "unix:", "tcp:", "tcp:host:port", "tcp:h:99999", "nbd+unix:///", "/a/b", "x:y", "nbd://[::1", "http://a/b",
    "nbd+unix:///?socket=/a&socket=/b", "nbd://host:port/"])
def test_what_is_none_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match="write it like"):
        parse_address(text)


@pytest.mark.parametrize("text", ["unix:/a", "tcp:127.0.0.9:1", "tcp:[::1]:1", "nbd://localhost"])
def test_loopback(text: str) -> None:
    assert parse_address(text).loopback


@pytest.mark.parametrize("text", ["tcp:0.0.0.0:1", "nbd://example.org", "tcp:10.0.0.1:1"])
def test_beyond_this_machine(text: str) -> None:
    assert not parse_address(text).loopback
