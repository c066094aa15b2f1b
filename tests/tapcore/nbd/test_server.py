"""The NBD server over real sockets: many clients, bad clients, slow clients, clients that vanish."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import cast

import pytest
from support import LoopThread, Manual

from tapcore.driver import Env, OpenFlag
from tapcore.errors import ControlError, UsageError
from tapcore.nbd import server as server_module
from tapcore.nbd import wire
from tapcore.nbd.client import NbdClient, NbdError
from tapcore.nbd.server import NbdServer
from tapcore.request import Request
from tapcore.vbd import Vbd

SIZE = 8 << 20


class Served:
    """Two manual disks, `one` and `two` (read-only), on a UNIX socket."""

    def __init__(self, env: Env, path: Path) -> None:
        self.path = path
        self.exports: dict[str, Vbd] = {}
        for name, flags in (("one", OpenFlag.NONE), ("two", OpenFlag.RDONLY)):
            vbd = Vbd(env, name)
            vbd.open(f"manual:{SIZE}", flags)
            self.exports[name] = vbd
        self.one, self.two = Manual.opened
        self.one.early = self.two.early = True
        self.server = NbdServer(env, self.exports)
        self.address = self.server.listen(f"unix:{path}")
        self.loop = LoopThread(env)

    def client(self, export: str = "one", **options: float) -> NbdClient:
        return NbdClient(f"nbd+unix:///{export}?socket={self.path}", **options)  # type: ignore[arg-type]

    def raw(self) -> socket.socket:
        """A socket that has received the greeting."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.path))
        assert len(sock.recv(100)) == wire.GREETING.size
        return sock


@pytest.fixture
def served(env: Env, tmp_path: Path) -> Iterator[Served]:
    served = Served(env, tmp_path / "nbd")
    yield served
    served.loop.call(served.server.close)
    served.loop.call(lambda: [disk.finish() for disk in Manual.opened])
    served.loop.stop()
    for vbd in served.exports.values():
        vbd.close(lambda: None)
    Manual.opened.clear()


def gone(sock: socket.socket) -> bool:
    """Whether the server closes the connection within 10 s."""
    with contextlib.suppress(ConnectionResetError):
        while select.select([sock], [], [], 10)[0]:
            if not sock.recv(65536):
                return True
        return False
    return True


def test_clients_share_a_disk_and_see_each_other(served: Served) -> None:
    with served.client() as first, served.client() as second, served.client("two") as third:
        first.write(4096, b"shared" * 100)
        assert second.read(4096, 600) == b"shared" * 100
        assert third.read_only and not first.read_only
        assert third.read(4096, 6) == bytes(6)
        with pytest.raises(NbdError) as refused:
            third.write(0, b"x")
        assert refused.value.errno == errno.EPERM
        assert third.read(0, 1) == b"\0"
    served.loop.until(lambda: served.server.connections == 0)


def test_only_the_owner_may_use_the_socket(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


def test_garbage_closes_that_connection_alone(served: Served) -> None:
    with served.client() as good:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(100), b"\xff" * 100):
            with served.raw() as bad:
                bad.sendall(garbage)
                assert gone(bad)
        bad_client = served.client()
        bad_client.sock.sendall(b"\0" * 28)
        assert gone(bad_client.sock)
        bad_client.close()
        good.write(0, b"fine")
        assert good.read(0, 4) == b"fine"


def test_an_unknown_export_is_refused_by_name(served: Served) -> None:
    with pytest.raises(NbdError, match="nosuch"):
        served.client("nosuch")


def test_a_client_that_vanishes_with_requests_in_flight(served: Served) -> None:
    served.one.early = False
    client = served.client()
    for number in range(50):
        client.submit(wire.NBD_CMD_WRITE, number * 8192, 4096, bytes([number]) * 4096)
    served.loop.until(lambda: len(served.one.pending) == 50)
    client.sock.close()
    served.loop.until(lambda: served.server.connections == 0)
    served.loop.call(served.one.finish)
    assert served.one.data[49 * 8192] == 49
    served.one.early = True
    with served.client() as other:
        assert other.read(8192, 1) == b"\1"


def test_a_client_that_does_not_read_waits_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = served.client()
    served.one.data[0] = 1
    request = wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=0, type=wire.NBD_CMD_READ, cookie=1, offset=0,
                                length=1 << 20)
    lazy.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(1000):
            lazy.sock.sendall(request)
    reads = 0

    def settled() -> bool:
        nonlocal reads
        before, reads = reads, len(served.one.log)
        return before == reads > 0

    served.loop.until(settled)
    assert reads <= 24, "replies pile up for a client that does not take them"
    with served.client() as good:
        good.write(0, b"fine")
        assert good.read(0, 4) == b"fine"
    lazy.close()
    served.loop.until(lambda: served.server.connections == 0)


def test_a_client_that_hangs_up_while_it_is_blocked_costs_nothing(served: Served) -> None:
    """No event must be reported over and over for a connection that nobody reads from."""
    served.one.early = False
    client = served.client()
    client.sock.settimeout(0.2)
    request = wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=0, type=wire.NBD_CMD_WRITE, cookie=1, offset=0,
                                length=4 << 20) + bytes(4 << 20)
    with pytest.raises(TimeoutError):
        for _ in range(40):
            client.sock.sendall(request)
    client.sock.close()
    turns = 0
    original = served.loop.loop.turn

    def counted(longest_wait_s: float = 3600.0) -> None:
        nonlocal turns
        turns += 1
        original(longest_wait_s)

    served.loop.loop.turn = counted  # type: ignore[method-assign]
    with served.client("two") as other:
        for _ in range(20):
            other.read(0, 512)
    assert turns < 100
    served.loop.call(served.one.finish)
    served.loop.until(lambda: served.server.connections == 0)


def test_pause_lets_clients_wait_and_resume_lets_them_go(served: Served) -> None:
    vbd = served.exports["one"]
    client = served.client()
    served.loop.call(lambda: vbd.pause(lambda: None))
    handle = client.submit(wire.NBD_CMD_WRITE, 0, 4, b"wait")
    served.loop.until(lambda: vbd.waiting == 1)
    served.loop.call(vbd.resume)
    assert client.wait()[:2] == (handle, 0)
    client.close()


def test_what_waits_for_a_client_that_is_gone_is_given_up(served: Served) -> None:
    """Else a client that connects again and again to a paused disk fills the memory, and its old writes undo its
    newer ones."""
    vbd = served.exports["one"]
    served.loop.call(lambda: vbd.pause(lambda: None))
    client = served.client()
    client.submit(wire.NBD_CMD_WRITE, 0, 4, b"old!")
    served.loop.until(lambda: vbd.waiting == 1)
    client.sock.close()
    served.loop.until(lambda: served.server.connections == 0)
    assert vbd.waiting == 0
    served.loop.call(vbd.resume)
    assert served.one.log == []


def test_a_new_connection_waits_for_the_writes_of_one_that_is_gone(served: Served) -> None:
    """They are sent again, and newer ones follow: those in flight from before must not come last."""
    served.one.early = False
    first = served.client()
    first.submit(wire.NBD_CMD_WRITE, 0, 4, b"old!")
    served.loop.until(lambda: len(served.one.pending) == 1)
    first.sock.close()
    served.loop.until(lambda: served.server.connections == 0)
    with served.client() as second, served.client("two") as other:
        second.submit(wire.NBD_CMD_WRITE, 0, 4, b"new!")
        assert other.read(0, 4) == bytes(4)
        assert len(served.one.pending) == 1
        served.one.early = True
        served.loop.call(served.one.finish)
        assert second.wait()[1] == 0
    assert served.one.data[:4] == b"new!"


def test_a_client_with_much_to_do_gives_others_their_turn(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "TURN_S", 0.0)
    turns = 0
    original_turn, original_submit = served.loop.loop.turn, served.exports["one"].submit
    batches: list[int] = []

    def turn(longest_wait_s: float = 3600.0) -> None:
        nonlocal turns
        turns += 1
        original_turn(longest_wait_s)

    def submit(batch: Sequence[Request]) -> list[Request]:
        batches.append(turns)
        return original_submit(batch)

    served.loop.loop.turn = turn  # type: ignore[method-assign]
    served.exports["one"].submit = submit  # type: ignore[method-assign]
    served.one.data[0] = 1
    with served.client() as client:
        one = wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=0, type=wire.NBD_CMD_READ, cookie=1, offset=0,
                                length=128 << 10)
        client.sock.sendall(one * 20)
        left_bytes = 20 * (wire.DATA_CHUNK.size + (128 << 10))
        while left_bytes:
            left_bytes -= len(client.sock.recv(left_bytes))
    assert len(batches) >= 6 and max(Counter(batches).values()) <= 2


def test_no_descriptor_left_is_no_reason_to_spin(served: Served, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_module, "RETRY_ACCEPT_S", 0.05)
    listener = served.server._listeners[0][0]
    tries = 0
    end_s = monotonic() + 0.12

    class Exhausted:
        """A listener in a process that has used all its descriptors, at first."""

        family = listener.family

        def fileno(self) -> int:
            return listener.fileno()

        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if monotonic() < end_s:
                raise OSError(errno.EMFILE, "Too many open files")
            return listener.accept()

    exhausted = cast(socket.socket, Exhausted())
    served.loop.call(lambda: served.loop.loop.add_reader(
        listener.fileno(), lambda: served.server._accept(exhausted)))
    with served.client() as client:
        assert client.read(0, 1) == b"\0"
    assert 2 <= tries <= 5 and caplog.text.count("Too many open files") == tries - 1


def test_a_goodbye_after_a_large_write_is_no_failure(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = served.client()
    client.write(0, bytes(1 << 20))
    client.disconnect()
    served.loop.until(lambda: served.server.connections == 0)
    assert "dropped" not in caplog.text


def test_a_client_that_is_gone_when_it_is_accepted(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as brief:
            brief.connect(str(served.path))
    with served.client() as client:
        assert client.read(0, 1) == b"\0"
    served.loop.until(lambda: served.server.connections == 0)
    assert "a callback failed" not in caplog.text


def test_drop_disconnects_the_clients_of_one_disk(served: Served) -> None:
    with served.client() as one, served.client("two") as two:
        served.loop.call(lambda: served.server.drop(served.exports["one"]))
        assert gone(one.sock)
        assert two.read(0, 4) == bytes(4)
        assert served.loop.call(lambda: served.server.clients_of(served.exports["two"])) == 1


def test_a_client_that_does_not_negotiate_is_dropped(env: Env, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "NEGOTIATION_TIMEOUT_S", 0.05)
    server = NbdServer(env, {})
    server.listen(f"unix:{tmp_path / 'nbd'}")
    loop = LoopThread(env)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.settimeout(10)
        idle.connect(str(tmp_path / "nbd"))
        assert gone(idle)
    loop.call(server.close)
    loop.stop()


def test_too_many_clients_are_refused_and_others_live(env: Env, tmp_path: Path) -> None:
    vbd = Vbd(env, "one")
    vbd.open(f"manual:{SIZE}")
    Manual.opened[-1].early = True
    server = NbdServer(env, {"one": vbd}, max_connections=2)
    address = server.listen("tcp:127.0.0.1:0")
    port = int(address.rpartition(":")[2])
    loop = LoopThread(env)
    with NbdClient(f"nbd://127.0.0.1:{port}/one") as first, NbdClient(f"nbd://127.0.0.1:{port}/one") as second:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as third:
            assert gone(third)
        assert first.read(0, 1) == second.read(0, 1) == b"\0"
    loop.call(server.close)
    loop.stop()
    vbd.close(lambda: None)
    Manual.opened.clear()


def test_a_hundred_clients_at_once(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.client()) for _ in range(100)]
        for number, client in enumerate(clients):
            client.submit(wire.NBD_CMD_WRITE, number * 512, 512, bytes([number]) * 512)
        for client in clients:
            assert client.wait()[1] == 0
    assert all(served.one.data[number * 512] == number for number in range(100))


def test_a_dead_process_socket_is_replaced_and_a_live_one_is_not(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first, second = NbdServer(env, {}), NbdServer(env, {})
    first.listen(f"unix:{path}")
    with pytest.raises(ControlError, match="another process listens"):
        second.listen(f"unix:{path}")
    first.close()
    assert not path.exists()


def test_a_file_is_never_replaced_by_a_socket(env: Env, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ControlError, match="not a socket"):
        NbdServer(env, {}).listen(f"unix:{path}")
    assert path.read_text() == "data"


def test_tcp_beyond_this_machine_must_be_allowed(env: Env) -> None:
    with pytest.raises(UsageError, match="not a loopback"):
        NbdServer(env, {}).listen("tcp:0.0.0.0:0")


def test_a_bad_callback_does_not_take_the_server_with_it(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug met by one connection closes it; the loop and the other clients go on."""
    vbd = served.exports["one"]
    original: Callable[..., object] = vbd.submit

    def broken(batch: object) -> object:
        raise RuntimeError("a bug")

    with served.client("two") as other:
        victim = served.client()
        monkeypatch.setattr(vbd, "submit", broken)
        victim.sock.sendall(wire.REQUEST.pack(magic=wire.NBD_REQUEST_MAGIC, flags=0, type=0, cookie=1, offset=0,
                                              length=512))
        assert gone(victim.sock)
        monkeypatch.setattr(vbd, "submit", original)
        victim.close()
        assert other.read(0, 1) == b"\0"
    with served.client() as again:
        assert again.read(0, 1) == b"\0"
