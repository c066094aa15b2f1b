"""Keys, addresses and the arguments of writelog-replica."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapcore.errors import UsageError
from writelog import replica, sync, sync_transport
from writelog.keyring import create_keys, load_authorized, load_keys


def test_keys_are_for_the_owner_alone_and_load(tmp_path: Path) -> None:
    public, secret = create_keys(tmp_path / "keys", "one")
    assert secret.stat().st_mode & 0o077 == 0
    keys = load_keys(secret)
    assert load_authorized(public) == load_authorized(tmp_path / "keys") == {keys.public}
    with pytest.raises(UsageError, match="already"):
        create_keys(tmp_path / "keys", "one")
    with pytest.raises(UsageError, match="no secret key"):
        load_keys(public)
    secret.chmod(0o640)
    with pytest.raises(UsageError, match="open to other users"):
        load_keys(secret)


@pytest.mark.parametrize("text", ["", "rubbish", "curve\n    public-key = \"tooshort\"\n"])
def test_bad_key_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.key"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.key"):
        load_keys(path)
    with pytest.raises(UsageError, match=r"missing\.key"):
        load_keys(tmp_path / "missing.key")
    with pytest.raises(UsageError, match=r"no \*\.key"):
        (tmp_path / "empty").mkdir()
        load_authorized(tmp_path / "empty")


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5", "ipc:///tmp/x"])
def test_loopback_can_do_without_keys(endpoint: str) -> None:
    sync_transport.check_endpoint(endpoint, secured=False)


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.7:5", "tcp://*:5", "tcp://0.0.0.0:5", "tcp://[2001:db8::1]:5"])
def test_other_hosts_need_keys(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="writelog pair"):
        sync_transport.check_endpoint(endpoint, secured=False)
    sync_transport.check_endpoint(endpoint, secured=True)
    assert replica.main(["--insecure-loopback-only", "--listen", endpoint, "ram:4096"]) == 2
    assert sync.main(["--insecure-loopback-only", "vm1", endpoint]) == 2
    assert capsys.readouterr().err.count("is not on this machine") == 2


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "tcp://192.0.2.7:5", "ipc:///tmp/x"])
def test_without_keys_nothing_is_replicated(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loopback too, unless --insecure-loopback-only says so."""
    assert replica.main(["--keys", str(tmp_path / "none"), "--listen", endpoint, "ram:4096"]) == 2
    assert sync.main(["--keys", str(tmp_path / "none"), "vm1", endpoint]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert ["there are no keys" in line and "writelog pair" in line for line in lines] == [True, True]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [
    ["--insecure-loopback-only", "--keys", "/x"],
    ["--insecure-loopback-only", "--key", "/x", "--authorized", "/x"],
    ["--keys", "/x", "--key", "/x", "--authorized", "/x"],
    ["--key", "/x"],
])
def test_options_that_contradict_each_other(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        replica.main([*options, "--listen", "tcp://127.0.0.1:5", "ram:4096"])
    assert "exclude each other" in (text := capsys.readouterr().err) or "go together" in text


@pytest.mark.parametrize("endpoint", ["", "host:5", "tcp://host", "tcp://:5", "udp://host:5", "tcp://host:99999999"])
def test_bad_addresses_are_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        sync_transport.check_endpoint(endpoint, secured=True)


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["--insecure-loopback-only", "--listen", "tcp://127.0.0.1:0", "nosuch:x"], 1, "unknown driver"),
    (["--listen", "tcp://127.0.0.1:0", "--key", "/missing", "--authorized", "/x", "ram:4096"], 2, "/missing"),
    (["keygen", "/proc/nowhere"], 2, "/proc/nowhere"),
])
def test_command_says_what_is_wrong(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replica.main(arguments) == code
    line = capsys.readouterr().err
    assert text in line
    assert line.count("\n") == 1
