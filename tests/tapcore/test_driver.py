"""The registry, the defaults of a driver, and what a filter passes on."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from support import Manual

from tapcore.driver import VERBS, DiskInfo, Driver, Env, Feature, Filter, OpenFlag, find_driver
from tapcore.errors import ChainError
from tapcore.request import DISCARD, FLUSH, READ, STATUS, WRITE, ZEROES, Request


class Halved(Filter):
    """Shows half of the disk, and counts writes."""

    name = "test-halved"
    writes = 0

    def open(self) -> None:
        self.info = self.info.with_changes(size_bytes=self.info.size_bytes // 2)

    def queue_write(self, request: Request) -> bool:
        self.writes += 1
        return self.next.queue_write(request)


class Bare(Driver):
    """Overrides nothing; has no name."""


def opened(env: Env) -> Manual:
    leaf = Manual(env, "8192", OpenFlag.NONE)
    leaf.open()
    Manual.opened.remove(leaf)
    return leaf


def test_a_name_is_the_registration() -> None:
    assert find_driver("test-halved") is Halved
    assert find_driver("aio").name == "aio"
    assert "" not in Driver.registry and Bare not in Driver.registry.values()


def test_a_driver_is_found_without_loading_the_others() -> None:
    program = ("import sys; from tapcore.driver import find_driver; find_driver('aio'); "
               "print(*(name for name in sys.modules if name.startswith('tapcore.formats.')))")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "qcow2" not in found.stdout and "vmdk" not in found.stdout
    assert find_driver("vhdsync").name == "vhdsync"


def test_an_unknown_driver_gets_the_list_of_known_ones() -> None:
    with pytest.raises(ChainError) as caught:
        find_driver("aoi")
    text = str(caught.value)
    assert text.startswith("unknown driver 'aoi'; known drivers: ")
    assert {"aio", "delay", "error", "log", "ram", "sync", "verify"} <= set(text.split(": ")[1].split(", "))


def test_what_a_driver_does_not_do_it_refuses(env: Env) -> None:
    driver = Bare(env, "", OpenFlag.RDONLY)
    for op in (READ, WRITE, FLUSH, DISCARD, ZEROES):
        request = Request(op, 0, 512)
        assert getattr(driver, VERBS[op])(request) is True
        assert request.error == errno.EOPNOTSUPP
    status = Request(STATUS, 0, 512)
    assert driver.queue_status(status) and status.extents == [(512, 0)] and status.error == 0
    driver.submit()
    assert driver.read_only and driver.get_parent_id() is None and driver.backing is None
    with pytest.raises(NotImplementedError):
        driver.open()


def test_a_filter_passes_on_all_but_its_own(env: Env) -> None:
    leaf = opened(env)
    halved = Halved(env, "", OpenFlag.NONE)
    halved.attach(leaf)
    halved.open()
    assert halved.info == DiskInfo(4096, leaf.info.features)
    for verb in VERBS:
        if verb != "queue_write":
            assert getattr(halved, verb) == getattr(leaf, verb), "bound to the level below, at no cost"
    leaf.early = True
    halved.queue_write(Request(WRITE, 0, 3, [memoryview(b"abc")]))
    assert halved.writes == 1 and leaf.data[:3] == b"abc"


def test_info_is_changed_by_copy() -> None:
    info = DiskInfo(4096, Feature.FLUSH)
    assert info.with_changes(read_only=True) == DiskInfo(4096, Feature.FLUSH, read_only=True)
    assert not info.read_only
