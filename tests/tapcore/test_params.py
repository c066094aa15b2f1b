"""The text after a level's colon."""

from __future__ import annotations

import pytest

from tapcore.errors import UsageError
from tapcore.params import decimal, options, path_params, size_bytes, whole


@pytest.mark.parametrize("text, path", [
    ("/a", "/a"), ("./a", "./a"), ("../a", "../a"), ("/with, comma=1,/and: colon", "/with, comma=1,/and: colon"),
])
def test_a_path_alone_is_a_path_whatever_is_in_it(text: str, path: str) -> None:
    assert path_params("aio", text, ("direct",)) == ({}, path)


def test_options_come_before_the_path() -> None:
    assert path_params("aio", "direct,/a,b", ("direct",)) == ({"direct": ""}, "/a,b")
    assert path_params("aio", "x=1, direct ,./a", ("direct", "x")) == ({"x": "1", "direct": ""}, "./a")


@pytest.mark.parametrize("text, message", [
    ("", "no path given; for example aio:/path/to/disk.img; a path begins with / or ./"),
    ("disk.img", "no path in 'disk.img'; for example aio:/path"),
    ("direct", "no path in 'direct'"),
    ("direkt,/a", "unknown option 'direkt'; options of aio: direct"),
    ("direct,direct,/a", "option 'direct' is given twice"),
    ("direct,,/a", "unknown option ''"),
    ("/a\0b", "NUL byte"),
])
def test_a_bad_path_says_how_to_write_it(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        path_params("aio", text, ("direct",))
    assert message in str(caught.value)


def test_options_without_a_path() -> None:
    assert options("delay", "", ("all",)) == {}
    assert options("delay", " all = 5 ,seed=1", ("all", "seed")) == {"all": "5", "seed": "1"}
    with pytest.raises(UsageError, match="unknown option 'some=1'; options of sync: it has none"):
        options("sync", "some=1", ())


@pytest.mark.parametrize("text, value", [
    ("0", 0), ("512", 512), ("64K", 65536), ("10m", 10 << 20), (" 2G ", 2 << 30), ("1T", 1 << 40),
])
def test_sizes(text: str, value: int) -> None:
    assert size_bytes("size", text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "10MB", "G", "1 G", "0x10", "٣", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; a number of bytes"):
        size_bytes("size", text)


def test_numbers() -> None:
    assert whole("count", "12") == 12 and decimal("p", "0.25") == 0.25 and decimal("p", "3") == 3
    for text in ("", "-1", "1.5", "nan"):
        with pytest.raises(UsageError, match=r"count .* is not a whole number"):
            whole("count", text)
    for text in ("", "-1", "inf", "1e3", ".5"):
        with pytest.raises(UsageError, match=r"p .* is not a number"):
            decimal("p", text)
