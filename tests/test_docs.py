"""What the documents show works."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from contract.runner import Runner
from formats_model import History, drive
from recording import SECTOR, Journal, RecordingFile
from support import Manual, Owner

from tapcore.driver import Driver, Env, OpenFlag
from tapcore.errors import ChainError
from tapcore.request import READ, WRITE, ZEROES
from tapcore.vbd import Vbd

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("early", [True, False])
def test_the_driver_in_write_a_driver_works(env: Env, early: bool) -> None:
    text = (ROOT / "docs" / "write-a-driver.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 75
    exec(compile(code, "write-a-driver.md", "exec"), {"__name__": "xor"})
    try:
        vbd = Vbd(env, "disk")
        with pytest.raises(ChainError, match="not a byte"):
            vbd.open("xor:300|manual:4096")
        vbd.open("xor:42|manual:4096")
        disk = Manual.opened[-1]
        disk.early = early
        owner = Owner(vbd)
        write, read = owner.make(WRITE, 0, b"plain" * 100), owner.make(READ, 0, 500)
        for request in (write, read):
            done = vbd.submit([request])
            disk.finish()
            assert [*done, *owner.late][-1] is request and request.error == 0
        assert bytes(read.iov[0]) == b"plain" * 100
        assert disk.data[:5] == bytes(letter ^ 42 for letter in b"plain")
        assert vbd.submit([owner.make(ZEROES, 0, 512)])[0].error
        vbd.close(lambda: None)
    finally:
        del Driver.registry["xor"]
        Manual.opened.clear()


def test_the_format_in_write_a_format_works_and_survives_crashes(env: Env, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "write-a-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 110
    names: dict[str, Any] = {"__name__": "slots"}
    exec(compile(code, "write-a-format.md", "exec"), names)
    names["Slots"].file_kind = RecordingFile
    RecordingFile.journal = journal = Journal()
    path, size = tmp_path / "a", 4 * 65536 + 512
    path.write_bytes(names["HEADER"].pack(magic=b"SLOTS v1", size=size))
    try:
        before = path.read_bytes()
        runner = Runner(env, f"slots:{path}")
        history = History(bytearray(size), [(0, bytes(size))])
        drive(runner, journal, history, random.Random(1), 80)
        runner.close()
        for cut in range(0, len(journal.entries) + 1, 3):
            path.write_bytes(journal.crash(before, cut, random.Random(cut)))
            runner = Runner(env, f"slots:{path}", OpenFlag.RDONLY)
            disk, allowed = runner.read(0, size), history.allowed(cut)
            assert all(disk[at : at + SECTOR] in allowed[at // SECTOR] for at in range(0, size, SECTOR)), cut
            runner.close()
        path.write_bytes(b"SLOTS v2")
        with pytest.raises(ChainError, match="no slots image"):
            Runner(env, f"slots:{path}")
    finally:
        del Driver.registry["slots"]


DOCUMENTS = ["README.md", "ARCHITECTURE.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{name} links to {target}"


def test_named_modules_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`((?:tapcore|writelog|tests|tools)/[\w/.*]+)`", text):
        assert list(ROOT.glob(name)), f"ARCHITECTURE.md names {name}"


@pytest.mark.parametrize("document", ["reliability.md", "security.md"])
def test_each_claim_names_a_test_that_there_is(document: str) -> None:
    tables = re.split(r"\n\n", (ROOT / "docs" / document).read_text())
    rows = [line.split("|") for table in tables if table.startswith("| claim |") for line in table.splitlines()]
    claims = [(row[1].strip(), row[2]) for row in rows if row[1].strip() not in ("claim", "---")]
    assert claims
    for claim, text in claims:
        names = re.findall(r"`(tests/[^`]+)::(\w+)`", text)
        assert names, claim
        for path, name in names:
            assert re.search(rf"^(def |class )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)
