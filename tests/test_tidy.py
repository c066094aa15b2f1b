"""The laws of the code base that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tapcore.driver import Driver, find_driver

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tapcore", "writelog")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 500
MAX_TEST_FILE_LINES = 800

LAYERS = """
tapcore
tapcore.errors
tapcore.layout
tapcore.text
writelog
--
tapcore.beside
tapcore.bucket
tapcore.durablefile
tapcore.fence
tapcore.logs
tapcore.loop
tapcore.merge
tapcore.nbd.address
tapcore.nbd.client_codec
tapcore.nbd.reply_decoder
tapcore.nbd.tls
tapcore.nbd.wire
tapcore.params
tapcore.reach
tapcore.request
tapcore.restart
tapcore.rundir
tapcore.stats
tapcore.throttle
tapcore.unixsocket
tapcore.watchdog
tapcore.workers
writelog.activity
writelog.bitmap
writelog.control
writelog.dirtymap
writelog.backlog
writelog.forecast
writelog.heat
writelog.pace
writelog.generations
writelog.hashtree
writelog.plan
writelog.planner
writelog.planner_group
writelog.streams
writelog.simulate
writelog.ring
writelog.shm
writelog.sidecar_layout
writelog.wire
--
tapcore.blockcache
tapcore.directio
tapcore.driver
tapcore.drivers
tapcore.formats
tapcore.imagelock
tapcore.nbd.fit
tapcore.nbd.link
tapcore.nbd.remote
tapcore.rawfile
tapcore.ringfile
tapcore.uring
tapcore.writewatch
writelog.client
writelog.keyring
writelog.pair_code
writelog.logconn
writelog.logcontext
writelog.logexport
writelog.logjournal
writelog.logstore
writelog.logstream
writelog.server
writelog.sidecar
--
tapcore.chain
tapcore.formats.qcow2.resize
--
tapcore.img
tapcore.vbd
--
tapcore.control
tapcore.control_server
tapcore.map_reader
tapcore.namelock
tapcore.nbd
--
tapcore.disk
--
tapcore.jobs
tapcore.pausing
--
tapcore.engine
writelog.pair_exchange
writelog.replica_
writelog.migrate_
writelog.sync_
--
tapcore.img.cli
tapcore.img.commands
tapcore.img.legacy
tapcore.img.vhd_util
tapcore.tapctl
tapcore.tapdisk
writelog.cli
writelog.migrate
writelog.pair
writelog.replica
writelog.sync
"""
"""Lowest first, with -- in between; a name ending in '_', or a package, stands for all that begins with it. A
module imports from its own layer and those before it."""

PURE = [
    "tapcore.nbd.wire", "tapcore.nbd.negotiate", "tapcore.nbd.status", "tapcore.nbd.session",
    "tapcore.nbd.replies", "tapcore.nbd.client_codec", "tapcore.nbd.reply_decoder", "tapcore.nbd.fit",
    "writelog.wire", "writelog.hashtree", "writelog.sync_compare",
    "writelog.plan", "writelog.planner", "writelog.planner_group", "writelog.simulate",
    "writelog.backlog", "writelog.heat", "writelog.streams", "writelog.pace", "writelog.forecast",
    "writelog.ring", "tapcore.bucket",
    "writelog.migrate_plan", "writelog.migrate_check", "writelog.migrate_memory", "writelog.migrate_twin",
    "writelog.generations", "writelog.sidecar_layout", "writelog.activity",
    "writelog.control", "writelog.dirtymap", "writelog.bitmap", "tapcore.formats.extents",
    "tapcore.formats.tables", "tapcore.formats.qcow2.layout", "tapcore.formats.qcow2.mapping",
    "tapcore.formats.qcow2.packed", "tapcore.formats.qcow2.refcounts", "tapcore.formats.qcow2.subclusters",
    "tapcore.formats.vmdk.layout", "tapcore.formats.vmdk.descriptor", "tapcore.formats.vmdk.mapping",
    "tapcore.formats.qcow.mapping",
    "tapcore.formats.vhd.layout", "tapcore.formats.vhd.locators", "tapcore.formats.vhd.mapping",
    "tapcore.formats.qcow2.counts",
]
"""Codecs and algorithms: bytes or state in, bytes or decisions out."""
IMPURE_IMPORTS = {"socket", "zmq", "posix_ipc", "select", "threading", "subprocess", "time"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    best, found = -1, -1
    for number, names in enumerate(LAYERS.split("--")):
        for name in names.split():
            matches = module == name or (name.endswith("_") and module.startswith(name)) or (
                module.startswith(name + ".") and name not in PACKAGES)
            if matches and len(name) > best:
                best, found = len(name), number
    assert found >= 0, f"{module} stands in no layer: add it to LAYERS"
    return found


def imports(path: Path) -> list[str]:
    """The modules that a file imports when it is imported (not those inside functions or for type checking)."""
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = {module_name(source) for source in SOURCES}
            found += [full if (full := f"{node.module}.{alias.name}") in known else node.module
                      for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    own = layer_of(module_name(path))
    for name in imports(path):
        if name.split(".")[0] in PACKAGES:
            assert layer_of(name) <= own, f"{module_name(path)} must not import {name}"


@pytest.mark.parametrize("module", PURE)
def test_codecs_and_algorithms_are_pure(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert not IMPURE_IMPORTS & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", TREE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_in_a_head(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= (MAX_TEST_FILE_LINES if "tests" in path.parts else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_structures_are_declared_in_layouts(path: Path) -> None:
    if module_name(path) != "tapcore.layout":
        calls = re.findall(r"(?<![\w.])struct\.(?:pack|unpack|calcsize|Struct|iter_unpack)\w*", path.read_text())
        assert calls == [], "declare a Layout instead"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_driver_documents_its_use() -> None:
    find_driver("log")
    for name, kind in Driver.registry.items():
        if not kind.__module__.startswith("tapcore.drivers."):
            continue
        text = __import__(kind.__module__, fromlist=["x"]).__doc__ or ""
        for section in ("Use:", "Options:", "Limits:"):
            assert section in text, f"{name} lacks {section!r}"


def test_only_tapcore_awaits_nothing() -> None:
    """No coroutine in the engine: a request costs method calls."""
    for path in SOURCES:
        assert not re.search(r"^\s*(async def|import asyncio|from asyncio)", path.read_text(), re.MULTILINE), path


def test_no_test_sleeps() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            assert "time.sleep(" not in path.read_text(), f"{path}: wait for an event"


def test_no_test_leaves_the_folder_for_those_after_it() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            assert "os.chdir(" not in path.read_text(), f"{path}: use monkeypatch.chdir"


def test_the_text_names_no_place_of_this_machine() -> None:
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", "") and path.is_file() and path != Path(__file__):
            assert not re.search(r"(?<![\w.~-])/(work|root|farm)/", path.read_text(errors="replace")), name
