"""The units in packaging/systemd, read by systemd itself. They are not run here: that needs a host with it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import need

from tapcore import tapdisk
from writelog import replica, sync

UNITS = sorted((Path(__file__).parents[2] / "packaging" / "systemd").glob("*.service"))
MAX_EXPOSURE = 20
"""Tenths, as `systemd-analyze security` counts: 0 is a locked box, 100 an open one; 16 when this was written."""


def analyze(*arguments: str) -> str:
    need("systemd-analyze")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False,
                          timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(params=UNITS, ids=lambda path: path.name)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One of the units, of a disk called vm1, with the programs where they are here."""
    source: Path = request.param
    path = tmp_path / source.name.replace("@", "@vm1")
    path.write_text(source.read_text().replace("/usr/bin/", f"{sys.prefix}/bin/"))
    return path


def test_there_are_units() -> None:
    assert [path.name for path in UNITS] == ["tapdisk@.service", "writelog-replica@.service",
                                                "writelog-sync@.service"]


def test_systemd_takes_them(unit: Path) -> None:
    assert unit.name not in analyze("verify", str(unit))


def test_they_are_sandboxed(unit: Path) -> None:
    analyze("security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", str(unit))


def test_the_example_in_each_is_a_command_that_works(unit: Path) -> None:
    """What `%i.conf` in the comment says, put into ExecStart."""
    text = unit.read_text()
    values = dict(re.findall(r'(CHAIN|OPTIONS)="(.*)"', text))
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command
    words = shlex.split(command[1].replace("%i", "vm1").replace("$OPTIONS", values["OPTIONS"])
                        .replace("${CHAIN}", shlex.quote(values.get("CHAIN", ""))))
    if Path(words[0]).name == "writelog-sync":
        assert list(sync.disks_of(sync.parse_arguments(words[1:]))) == ["vm1", "vm1-data"]
    elif Path(words[0]).name == "tapdisk":
        words = [word if word != "/var/lib/writelog/base" else str(unit.parent) for word in words]
        assert tapdisk.parse_arguments(words[1:]).disks == [("vm1", values["CHAIN"])]
    else:
        assert replica.parse_arguments(words[1:]).chain == values["CHAIN"]
