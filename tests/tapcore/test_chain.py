"""Chains: their text, what happens when a level does not open, and parents."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapcore.chain import MAX_PARENT_DEPTH, Level, open_chain, parse
from tapcore.driver import DiskInfo, Driver, Env, Filter, OpenFlag, ParentId
from tapcore.errors import ChainError, ImageError
from tapcore.formats.qcow2.create import create

LIFE: list[str] = []
"""Opens and closes of the drivers below, in their order."""


@pytest.fixture(autouse=True)
def no_life() -> Iterator[None]:
    LIFE.clear()
    yield
    LIFE.clear()


class Image(Driver):
    """`test-image:NAME[>PARENT…]`: an image whose parents are those named after it; some names fail."""

    name = "test-image"
    flags_of: ClassVar[dict[str, OpenFlag]] = {}

    def open(self) -> None:
        if self.title == "missing":
            raise ImageError("cannot open: No such file", errno=errno.ENOENT, path="/x", hint="make it")
        if self.title == "broken":
            raise OSError(errno.EIO, "the disk is broken")
        self.info = DiskInfo(4096)
        self.flags_of[self.title] = self.flags
        LIFE.append(f"open {self.title}")

    def close(self) -> None:
        LIFE.append(f"close {self.title}")
        if self.title == "sticky":
            raise OSError(errno.EIO, "close failed")

    @property
    def title(self) -> str:
        return self.params.partition(">")[0]

    def get_parent_id(self) -> ParentId | None:
        if self.title == "garbled":
            raise ImageError("the name of the parent is garbled", offset=8)
        if self.title == "endless":
            return ParentId(self.name, f"endless{'>' * (self.params.count('>') + 1)}")
        _, arrow, parent = self.params.partition(">")
        return ParentId("nothing" if parent == "unknown" else self.name, parent) if arrow else None

    def validate_parent(self, parent: Driver) -> None:
        if parent.params == "stranger":
            raise ChainError("the parent has changed since", hint="rebase it")


class Layer(Filter):
    """`test-layer:NAME`: a filter that changes nothing."""

    name = "test-layer"

    def open(self) -> None:
        if self.params == "broken":
            raise ChainError("told not to open")
        LIFE.append(f"open {self.params}")

    def close(self) -> None:
        LIFE.append(f"close {self.params}")


def test_levels_are_read_from_left_to_right() -> None:
    assert parse("test-layer:a|test-layer:|test-image:/a:b,c d") == [
        Level("test-layer", "a"), Level("test-layer", ""), Level("test-image", "/a:b,c d")]
    assert str(Level("aio", "/x")) == "aio:/x"
    assert parse(" log:x|aio:/y")[0] == Level("log", "x")


def test_a_bar_in_a_path_is_quoted() -> None:
    levels = parse(r"test-layer:|test-image:/a\|b\\c\d")
    assert levels == [Level("test-layer", ""), Level("test-image", r"/a|b\c\d")]
    assert parse(str(levels[1])) == levels[1:]


@given(st.lists(st.text(alphabet="\\|/ab", min_size=1), min_size=1))
def test_what_a_level_is_written_as_is_read_as_the_same(params: list[str]) -> None:
    levels = [*(Level("test-layer", text) for text in params[1:]), Level("test-image", params[0])]
    assert parse("|".join(map(str, levels))) == levels


@pytest.mark.parametrize("text, message", [
    ("", "the chain is empty; write it like"),
    ("  ", "the chain is empty"),
    ("|aio:/x", "level 1 of '|aio:/x' is empty"),
    ("log:||aio:/x", "level 2 of 'log:||aio:/x' is empty; levels are separated by one '|'"),
    ("log:|", "level 2 of 'log:|' is empty"),
    ("aio", "level 1 of 'aio', 'aio', has no ':'; a level is driver:params"),
    ("log:|/vm/disk.img", "level 2 of 'log:|/vm/disk.img', '/vm/disk.img', has no ':'"),
    ("log:|oia:/x", "level 2 of 'log:|oia:/x': unknown driver 'oia'; known drivers: aio, "),
    (":/x", "level 1 of ':/x': unknown driver ''"),
    ("log:x", "level 1 of 'log:x': filter 'log' has nothing below it; for example log:x|aio:"),
    ("log:a|log:b", "level 2 of 'log:a|log:b': filter 'log' has nothing below it"),
    ("aio:/x|aio:/y", "level 1 of 'aio:/x|aio:/y': 'aio' takes no level below it; only a filter"),
])
def test_a_bad_text_is_told_where_it_is_bad(text: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("text, message", [
    ("aio:", "level 1 of 'aio:': aio: no path given; for example aio:/path/to/disk.img"),
    ("sync:direct,/x", "level 1 of 'sync:direct,/x': sync: unknown option 'direct'"),
    ("ram:", "level 1 of 'ram:': ram: size '' is not a size"),
    ("delay:later=1|ram:1M", "level 1 of 'delay:later=1|ram:1M': delay: unknown option 'later=1'"),
    ("error:p=2|ram:1M", "level 1 of 'error:p=2|ram:1M': error: p '2' is more than 1"),
])
def test_missing_and_bad_parameters_name_their_level(env: Env, text: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        open_chain(env, text)
    assert str(caught.value).startswith(message)


def test_levels_open_bottom_up_and_close_top_down(env: Env) -> None:
    chain = open_chain(env, "test-layer:a|test-layer:b|test-image:c")
    assert LIFE == ["open c", "open b", "open a"]
    assert [driver.params for driver in chain.drivers] == ["a", "b", "c"]
    assert chain.head is chain.drivers[0] and chain.info is chain.head.info
    assert chain.find("test-layer") == chain.drivers[:2] and chain.find("aio") == []
    LIFE.clear()
    chain.close()
    assert LIFE == ["close a", "close b", "close c"]
    chain.close()
    assert len(LIFE) == 3


def test_the_first_failure_to_close_is_raised_when_all_are_closed(env: Env) -> None:
    chain = open_chain(env, "test-layer:a|test-image:sticky>base")
    LIFE.clear()
    with pytest.raises(OSError, match="close failed"):
        chain.close()
    assert LIFE == ["close a", "close sticky", "close base"]


@pytest.mark.parametrize("text, closed, message", [
    ("test-layer:a|test-layer:broken|test-layer:b|test-image:c", ["close b", "close c"],
     "level 2 of {!r}: test-layer: told not to open"),
    ("test-layer:a|test-image:missing", [],
     "/x: level 2 of {!r}: test-image: cannot open: No such file; make it"),
    ("test-layer:broken|test-image:broken", [], "level 2 of {!r}: test-image: [Errno 5] the disk is broken"),
    ("test-layer:broken|test-image:a>b>c", ["close a", "close b", "close c"],
     "level 1 of {!r}: test-layer: told not to open"),
    ("test-image:a>b>missing", ["close a", "close b"],
     "/x: level 1 of {!r}, parent 2 (missing): test-image: cannot open: No such file; make it"),
    ("test-image:a>unknown", ["close a"],
     "level 1 of {!r}, parent 1 (unknown): nothing: unknown driver 'nothing'; known drivers: aio, "),
    ("test-image:a>stranger", ["close a", "close stranger"],
     "level 1 of {!r}: test-image: the parent has changed since; rebase it"),
    ("test-image:a>b>stranger", ["close a", "close b", "close stranger"],
     "level 1 of {!r}, parent 1 (b>stranger): test-image: the parent has changed since"),
    ("test-layer:a|test-image:b>garbled", ["close b", "close garbled"],
     "level 2 of {!r}, parent 1 (garbled): test-image: the name of the parent is garbled (at byte 8)"),
])
def test_when_a_level_does_not_open_all_are_closed_and_the_error_says_which(
    env: Env, text: str, closed: list[str], message: str
) -> None:
    with pytest.raises(ChainError) as caught:
        open_chain(env, text)
    assert str(caught.value).startswith(message.format(text))
    assert [entry for entry in LIFE if entry.startswith("close")] == closed
    assert sorted(entry.split()[1] for entry in LIFE if entry.startswith("open")) == sorted(
        entry.split()[1] for entry in closed)


def test_errors_keep_their_errno(env: Env) -> None:
    for title, code in (("missing", errno.ENOENT), ("broken", errno.EIO)):
        with pytest.raises(ChainError) as caught:
            open_chain(env, f"test-image:{title}")
        assert caught.value.errno == code


def test_parents_are_opened_below_read_only_and_shareable(env: Env) -> None:
    chain = open_chain(env, "test-layer:top|test-image:a>b>c", OpenFlag.STRICT)
    assert [driver.params for driver in chain.drivers] == ["top", "a>b>c", "b>c", "c"]
    top, a, b, c = chain.drivers
    assert a.backing is b and b.backing is c and c.backing is None and top.backing is None
    assert Image.flags_of["a"] == OpenFlag.STRICT
    for title in "bc":
        assert Image.flags_of[title] == OpenFlag.STRICT | OpenFlag.RDONLY | OpenFlag.SHAREABLE
    chain.close()
    assert LIFE[-4:] == ["close top", "close a", "close b", "close c"]


def test_parents_that_form_a_loop_are_found(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "get_parent_id",
                        lambda image: ParentId("test-image", {"a": "b", "b": "c", "c": "a"}[image.title]))
    with pytest.raises(ChainError, match=r"of 'test-image:a', parent 3 \(a\): the chain of parents is a loop"):
        open_chain(env, "test-image:a")
    assert LIFE[3:] == ["close a", "close b", "close c"]


def test_parents_without_end_are_not_followed_for_ever(env: Env) -> None:
    with pytest.raises(ChainError, match="more than 64 parents; merge some"):
        open_chain(env, "test-image:endless")
    assert len(LIFE) == 2 * (MAX_PARENT_DEPTH + 1)


@pytest.mark.parametrize("spelling", [
    "a.qcow2", "./a.qcow2", "{folder}/a.qcow2", "soft", "hard", "../{name}/a.qcow2"])
def test_an_image_that_leads_back_to_itself_is_found_however_it_is_named(
    env: Env, tmp_path: Path, spelling: str
) -> None:
    (tmp_path / "soft").symlink_to("a.qcow2")
    name = spelling.format(folder=tmp_path, name=tmp_path.name)
    create(str(tmp_path / "a.qcow2"), 1 << 20, backing="b.qcow2", backing_format="qcow2")
    create(str(tmp_path / "b.qcow2"), 1 << 20, backing=name, backing_format="qcow2")
    (tmp_path / "hard").hardlink_to(tmp_path / "a.qcow2")
    with pytest.raises(ChainError, match=r"the chain of parents is a loop: this is .*a.qcow2 again; give the"):
        open_chain(env, f"qcow2:{tmp_path}/a.qcow2")


def test_the_images_of_a_long_chain_share_their_memory(env: Env, tmp_path: Path) -> None:
    for number in range(20):
        create(str(tmp_path / str(number)), 1 << 30, backing=str(number - 1) if number else None,
               backing_format="qcow2" if number else None)
    single = open_chain(env, f"qcow2:{tmp_path}/0")
    alone = single.leaf.mapping.tables.capacity  # type: ignore[attr-defined]
    single.close()
    for top, capacity in ((1, alone), (3, alone // 2), (19, alone // 10)):
        chain = open_chain(env, f"qcow2:{tmp_path}/{top}")
        assert {driver.mapping.tables.capacity for driver in chain.drivers} == {capacity}  # type: ignore[attr-defined]
        chain.close()


def test_filters_stay_while_what_they_stand_on_is_exchanged(env: Env) -> None:
    chain = open_chain(env, "test-layer:a|test-layer:b|test-image:c>d")
    a, b, c, d = chain.drivers
    (other,) = open_chain(env, "test-image:o|p".replace("|", r"\|")).drivers
    LIFE.clear()
    chain.stand_on(other)
    assert chain.drivers == [a, b, other] and chain.leaf is other and chain.head is a
    assert chain.text == r"test-layer:a|test-layer:b|test-image:o\|p" and not LIFE
    assert getattr(a, "queue_read") == other.queue_read  # noqa: B009
    between = Layer(env, "between", OpenFlag.NONE)
    between.attach(other)
    chain.stand_on(between)
    assert chain.drivers == [a, b, between, other] and chain.leaf is other
    assert chain.text == r"test-layer:a|test-layer:b|test-image:o\|p", "what is put between is not in the text"
    chain.stand_on(c)
    assert chain.drivers == [a, b, c, d] and chain.text == "test-layer:a|test-layer:b|test-image:c>d"
    chain.close()


def test_a_failure_to_close_hides_no_failure_to_open(env: Env, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ChainError, match="told not to open"):
        open_chain(env, "test-layer:broken|test-image:sticky")
    assert "closing test-image:sticky failed" in caplog.text


def test_quiesce_asks_each_driver_in_turn(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = open_chain(env, "test-layer:a|test-image:b>c")
    asked: list[str] = []
    later = []

    def quiesce(driver: Image, done: object) -> None:
        asked.append(driver.title)
        later.append(done)

    monkeypatch.setattr(Image, "quiesce", quiesce)
    ended: list[bool] = []
    chain.quiesce(lambda: ended.append(True))
    assert asked == ["b"] and not ended
    later.pop()()  # type: ignore[operator]
    assert asked == ["b", "c"] and not ended
    later.pop()()  # type: ignore[operator]
    assert ended == [True]
    chain.close()
