"""Sockets for their owner alone."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from tapcore import unixsocket
from tapcore.errors import ControlError


def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    with unixsocket.listen(tmp_path / "s") as listener:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            server, _ = listener.accept()
            with server:
                allowed, who = unixsocket.peer_allowed(server)
                assert allowed and "process" in who


def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    unixsocket.listen(tmp_path / "s").close()
    assert not unixsocket.is_alive(tmp_path / "s")
    unixsocket.listen(tmp_path / "s").close()


def test_a_live_one_is_not(tmp_path: Path) -> None:
    with unixsocket.listen(tmp_path / "s"):
        assert unixsocket.is_alive(tmp_path / "s")
        with pytest.raises(ControlError, match="another process listens"):
            unixsocket.listen(tmp_path / "s")


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ControlError, match="not a socket"):
        unixsocket.listen(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


@pytest.mark.parametrize("name", ["nodir/s", "x" * 200])
def test_where_no_socket_can_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ControlError):
        unixsocket.listen(tmp_path / name)
