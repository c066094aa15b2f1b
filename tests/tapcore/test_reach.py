"""What an image names is opened only where the operator lets it: every format, links, and exchanged paths."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Tapdisk, read_line

from tapcore import reach
from tapcore.chain import open_chain
from tapcore.driver import Env, OpenFlag
from tapcore.errors import ChainError, ImageError, UsageError
from tapcore.formats.probe import parent_of
from tapcore.nbd.client import NbdClient
from tapcore.reach import Reach, folders_of_environment, parse_folders

SIZE_BYTES = 1 << 20
SECRET = b"of another"


def td_img(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tapcore.img.cli", *arguments], capture_output=True, text=True,
                          check=False, timeout=60, env=os.environ | (environment or {}))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A folder for images, and one with a file of somebody else."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
    (other / "secret.raw").write_bytes(SECRET.ljust(SIZE_BYTES, b"\0"))
    return own, other


def overlay(kind: str, path: Path, backing: Path, backing_format: str) -> str:
    made = td_img("create", "-f", kind, "-b", str(backing), "-F", backing_format, str(path))
    assert made.returncode == 0, made.stderr
    return f"{kind}:{path}"


def confined(env: Env, *folders: Path) -> Env:
    return Env(env.loop, env.workers, env.run_dir, Reach(folders))


def opens(env: Env, chain: str) -> None:
    open_chain(env, chain, OpenFlag.NONE).close()


@pytest.mark.parametrize("kind", ["qcow2", "qcow", "vhd", "vmdk"])
def test_a_backing_file_elsewhere_needs_leave(kind: str, env: Env, places: tuple[Path, Path]) -> None:
    own, other = places
    base, backing_format = other / "secret.raw", "raw"
    if kind == "vmdk":  # its parents are of its own kind
        base, backing_format = other / "base.vmdk", "vmdk"
        assert td_img("create", "-f", "vmdk", str(base), str(SIZE_BYTES)).returncode == 0
    chain = overlay(kind, own / "top", base, backing_format)
    opens(env, chain)
    opens(confined(env, other), chain)
    opens(confined(env, Path("/")), chain)
    for folders in ([], [own], [other / "below"]):
        with pytest.raises(ChainError, match="--backing-dirs") as refused:
            opens(confined(env, *folders), chain)
        assert refused.value.errno == errno.EPERM
        assert str(base) in str(refused.value)


def test_own_folder_and_below_are_allowed(env: Env, places: tuple[Path, Path]) -> None:
    own, _ = places
    (own / "below").mkdir()
    for base in (own / "base.raw", own / "below" / "base.raw"):
        base.write_bytes(bytes(SIZE_BYTES))
        opens(confined(env), overlay("qcow2", own / f"{base.parent.name}.qcow2", base, "raw"))


@pytest.mark.parametrize("name", ["link.raw", "folder/secret.raw", "../other/secret.raw"])
def test_links_and_dots_lead_where_they_lead(name: str, env: Env, places: tuple[Path, Path]) -> None:
    own, other = places
    (own / "link.raw").symlink_to(other / "secret.raw")
    (own / "folder").symlink_to(other)
    chain = overlay("qcow2", own / "top.qcow2", Path(name), "raw")
    with pytest.raises(ChainError, match=str(other / "secret.raw")):
        opens(confined(env), chain)


def test_a_format_is_not_even_looked_at(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that does not say what its backing file is would have its first bytes read."""
    own, other = places
    monkeypatch.setattr("tapcore.formats.probe.probe", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ImageError, match="--backing-dirs"):
        parent_of(str(own / "top"), str(other / "secret.raw"), None, Reach([]))


def test_what_the_operator_names_is_allowed(env: Env, places: tuple[Path, Path]) -> None:
    own, other = places
    chain = overlay("qcow2", own / "top.qcow2", other / "secret.raw", "raw")
    limited = confined(env)
    opens(limited, f"aio:{other / 'secret.raw'}")
    opens(limited, chain)


def test_who_exchanges_a_path_before_it_is_opened_wins_nothing(
    env: Env, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = places
    base = own / "base.raw"
    base.write_bytes(bytes(SIZE_BYTES))
    chain = overlay("qcow2", own / "top.qcow2", base, "raw")
    check = Reach.check

    def exchange(self: Reach, image: str, place: str) -> None:
        check(self, image, place)
        base.unlink()
        base.symlink_to(other / "secret.raw")

    monkeypatch.setattr(reach.Reach, "check", exchange)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ChainError, match=str(other / "secret.raw")):
        opens(confined(env), chain)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_loop_of_links_leads_nowhere(env: Env, places: tuple[Path, Path]) -> None:
    own, _ = places
    (own / "a").write_bytes(bytes(SIZE_BYTES))
    chain = overlay("qcow2", own / "top.qcow2", own / "a", "raw")
    (own / "a").unlink()
    (own / "a").symlink_to(own / "b")
    (own / "b").symlink_to(own / "a")
    with pytest.raises(ChainError):
        opens(confined(env), chain)


def test_directories_are_read_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    assert parse_folders(f"{tmp_path}:{tmp_path / 'a'}") == [tmp_path, tmp_path / "a"]
    assert parse_folders("") == []
    with pytest.raises(UsageError, match="no directory"):
        parse_folders(f"{tmp_path}:{tmp_path / 'b'}")
    monkeypatch.delenv(reach.VARIABLE, raising=False)
    assert folders_of_environment() is None
    monkeypatch.setenv(reach.VARIABLE, str(tmp_path))
    assert folders_of_environment() == [tmp_path]


# The programs


def test_tapdisk_keeps_to_it_and_snapshots_go_on(
    places: tuple[Path, Path], serve: Callable[..., Tapdisk]
) -> None:
    own, other = places
    chain = overlay("qcow2", own / "top.qcow2", other / "secret.raw", "raw")
    refused = subprocess.run([sys.executable, "-m", "tapcore.tapdisk", "--run-dir", str(own), chain],
                             capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1
    assert "--backing-dirs" in refused.stderr
    tapdisk = serve(chain, "--backing-dirs", f"{own}:{other}")
    with NbdClient(tapdisk.uri) as client:
        assert client.read(0, len(SECRET)) == SECRET
    tapdisk.stop()
    elsewhere = other / "elsewhere"
    elsewhere.mkdir()
    (own / "disk.raw").write_bytes(SECRET.ljust(SIZE_BYTES, b"\0"))
    tapdisk = serve(f"aio:{own / 'disk.raw'}", "--name", "vm")
    made = subprocess.run([sys.executable, "-m", "tapcore.tapctl", "--run-dir", str(tapdisk.run_dir), "snapshot",
                           "vm", str(elsewhere / "overlay.qcow2")], capture_output=True, text=True, check=False,
                          timeout=60)
    assert made.returncode == 0, made.stderr
    with NbdClient(tapdisk.uri) as client:
        assert client.read(0, len(SECRET)) == SECRET


def test_a_replica_keeps_to_it(places: tuple[Path, Path]) -> None:
    own, other = places
    chain = overlay("qcow2", own / "top.qcow2", other / "secret.raw", "raw")
    command = [sys.executable, "-m", "writelog.replica", "--run-dir", str(own), "--insecure-loopback-only",
               "--listen", "tcp://127.0.0.1:0"]
    refused = subprocess.run([*command, chain], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1 and "--backing-dirs" in refused.stderr
    with subprocess.Popen([*command, "--backing-dirs", str(other), chain], stdout=subprocess.PIPE) as allowed:
        try:
            assert read_line(allowed).startswith("listening on ")
        finally:
            allowed.terminate()


def test_td_img_keeps_to_the_variable(places: tuple[Path, Path]) -> None:
    own, other = places
    overlay("qcow2", own / "top.qcow2", other / "secret.raw", "raw")
    for value, code in ((str(own), 1), (str(other), 0), ("/", 0)):
        out = own / f"{len(value)}.raw"
        done = td_img("convert", "-O", "raw", str(own / "top.qcow2"), str(out),
                      environment={reach.VARIABLE: value})
        assert done.returncode == code, done.stderr
        assert out.exists() == (code == 0)
    assert td_img("convert", "-O", "raw", str(own / "top.qcow2"), str(own / "all.raw")).returncode == 0
