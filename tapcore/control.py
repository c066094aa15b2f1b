"""The control protocol of a tapdisk: its codec, which does no I/O, and a client that waits for its answers.

A UNIX stream socket, `tapdisk-PID.ctl` in the run directory, for its owner and root alone. One JSON object a line:

    {"op": "pause", "disk": "vm1"}
    {"ok": true, "result": {"state": "paused"}}
    {"ok": false, "error": {"message": "there is no disk 'vm1'", "errno": 2, "hint": "it has vm2"}}

Replies come in the order of the requests of their connection; a request may take as long as it needs, and other
connections do not wait for it. A parameter that is null counts as left out; one that is unknown is refused.

| op       | parameters                  | what it does; its result                                              |
| -------- | --------------------------- | --------------------------------------------------------------------- |
| version  |                             | version of the program, protocol, pid                                 |
| list     |                             | pid; disks: a list of name, state, size, fenced, chain, uris and more |
| open     | chain, name, read_only, nbd | opens a disk (nbd: addresses of its own); as info                     |
| close    | disk, forget                | drains, drops clients, closes (forget: removes its logs); disk        |
| pause    | disk, hold, hold_s          | holds requests back; state, once none is in flight                    |
| unpause  | disk, chain, force          | lets them go, to another chain if one is given; state                 |
| handover | disk, to, state             | makes a held pause permanent and fences the disk; fenced              |
| throttle | disk, rate                  | slows writes down to rate bytes a second (0: not at all); rate        |
| stats    | disk                        | disks: counters and histograms by name, of one disk or of all         |
| info     | disk                        | all about a disk                                                      |
| map      | disk, offset, length        | extents: [offset, length, state bits as in tapcore.request] each;     |
|          |                             | next: the offset to go on at, or null                                 |
| snapshot | disk, path, format, options | a new overlay (format: qcow2) on top; chain, overlay, pause_ms …      |
| commit   | disk, rate                  | begins to move the top image's data into its parent; job              |
| stream   | disk, base, rate            | begins to move the parents' data (above `base`) into the top image    |
| jobs     | disk                        | jobs: the last job of a disk or of each, with its state and progress  |
| cancel   | disk                        | ends the job of a disk; job, once it is over                          |
| shutdown |                             | closes every disk and ends the process; pid                           |
| restart  |                             | as shutdown, then the process begins anew with the same disks; pid    |

A pause with `hold` belongs to its connection: when that ends, without unpause or handover, the disk goes on by
itself. It also goes on `hold_s` seconds after the last such pause, each of which sets the time anew: a holder that
is stopped, or hangs, does not stop the guest with it. A hold that has run out cannot be taken up again, nor can
the disk be handed over, before its connection has sent `unpause`: the guest has run meanwhile. A fenced disk goes
on only by force. A `throttle`, too, ends with its connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn

from tapcore import unixsocket
from tapcore.errors import ControlError, ProtocolError, WritelogError

logger = logging.getLogger(__name__)

PROTOCOL: Final = 1
MAX_REQUEST_BYTES: Final = 64 << 10
MAX_REPLY_BYTES: Final = 16 << 20
MAX_OFFSET: Final = (1 << 63) - 1
MAX_TIME_S: Final = 1_000_000
DEFAULT_TIMEOUT_S: Final = 30.0
LOOK_TIMEOUT_S: Final = 5.0
"""How long a search waits for each process that it asks."""
RECV_BYTES: Final = 256 << 10

PARAMS: Final = {
    "version": "",
    "list": "",
    "open": "chain:text name:text? read_only:flag? nbd:texts?",
    "close": "disk:text forget:flag?",
    "pause": "disk:text hold:flag? hold_s:time?",
    "unpause": "disk:text chain:text? force:flag?",
    "handover": "disk:text to:text state:id?",
    "throttle": "disk:text rate:number",
    "stats": "disk:text?",
    "info": "disk:text",
    "map": "disk:text offset:number? length:number?",
    "snapshot": "disk:text path:text format:text? options:texts?",
    "commit": "disk:text rate:number?",
    "stream": "disk:text base:text? rate:number?",
    "jobs": "disk:text?",
    "cancel": "disk:text",
    "shutdown": "",
    "restart": "",
}
"""The parameters of each op; `?` marks those that may be left out."""


# Codec


def _is_text(value: object) -> bool:
    """A string that the system can take as a name: not every one that JSON can write is."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


ID: Final = re.compile(r"[0-9a-f]{16}")

_KINDS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "text": ("a text", _is_text),
    "texts": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "id": ("16 hexadecimal digits", lambda value: isinstance(value, str) and ID.fullmatch(value) is not None),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "time": ("seconds, more than 0", lambda value: type(value) in (int, float) and 0 < value <= MAX_TIME_S),
    "number": ("a whole number, not negative", lambda value: type(value) is int and 0 <= value <= MAX_OFFSET),
}


class Lines:
    """Bytes in, lines out; a line may come in pieces, or many at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._searched_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_line(self) -> bytes | None:
        """The next line, without its end, or None if it is not complete yet. ProtocolError if it is longer than
        `max_bytes`; everything received is forgotten then, for where the next one begins is not known."""
        end = self._buffer.find(b"\n", self._searched_bytes)
        length_bytes = len(self._buffer) if end < 0 else end
        if length_bytes > self._max_bytes:
            self._buffer.clear()
            self._searched_bytes = 0
            raise ProtocolError(f"a line of more than {self._max_bytes} bytes")
        if end < 0:
            self._searched_bytes = length_bytes
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched_bytes = 0
        return line


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def _decode(line: bytes) -> dict[str, Any]:
    """ProtocolError if the line is not a JSON object."""
    try:
        message = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a line that is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a line that is {type(message).__name__}, not a JSON object")
    return message


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def encode_request(op: str, params: dict[str, Any]) -> bytes:
    """ControlError if the parameters cannot be written as JSON, or are too long for a request."""
    try:
        line = _encode({"op": op} | {key: value for key, value in params.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise ControlError(f"cannot ask for {op!r}: {error}", errno=errno.EINVAL) from None
    if len(line) > MAX_REQUEST_BYTES:
        raise ControlError(f"the request is longer than {MAX_REQUEST_BYTES} bytes", errno=errno.E2BIG)
    return line


def decode_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """The op and its parameters, complete and of the right types. ProtocolError if it is no request, ControlError
    if it makes no sense."""
    message = _decode(line)
    op = message.pop("op", None)
    if not isinstance(op, str) or op not in PARAMS:
        raise ControlError(f"unknown op {op!r:.80}", errno=errno.EOPNOTSUPP, hint=f"known: {', '.join(PARAMS)}")
    params = {key: value for key, value in message.items() if value is not None}
    known = [declaration.rstrip("?").split(":") for declaration in PARAMS[op].split()]
    for key in params.keys() - {name for name, _ in known}:
        names = ", ".join(name for name, _ in known)
        raise ControlError(f"{op}: unknown parameter {key!r:.80}", errno=errno.EINVAL,
                           hint=f"it has {names}" if names else "it has none")
    for name, kind in known:
        title, fits = _KINDS[kind]
        if name not in params:
            if f"{name}:{kind}?" not in PARAMS[op].split():
                raise ControlError(f"{op}: parameter {name!r} is missing", errno=errno.EINVAL)
        elif not fits(params[name]):
            raise ControlError(f"{op}: {name!r} must be {title}, not {params[name]!r:.80}", errno=errno.EINVAL)
    return op, params


def encode_result(result: dict[str, Any]) -> bytes:
    return _encode({"ok": True, "result": result})


def encode_error(error: WritelogError) -> bytes:
    """A failure's line; where it happened is part of the message."""
    message = str(error)
    if error.hint is not None:
        message = message.removesuffix(f"; {error.hint}")
    return _encode({"ok": False, "error": {"message": message, "errno": error.errno, "hint": error.hint}})


def decode_reply(line: bytes) -> dict[str, Any]:
    """The result. ControlError if the request failed, ProtocolError if the line is no reply."""
    reply = _decode(line)
    match reply:
        case {"ok": True, "result": dict() as result}:
            return result
        case {"ok": False, "error": {"message": str() as message, "errno": int() as code, "hint": hint}}:
            raise ControlError(message, errno=code, hint=hint if isinstance(hint, str) else None)
    raise ProtocolError("a reply that is neither a result nor an error")


# Client


class ControlClient:
    """A connection to one tapdisk. One thread at a time; a call that gets no answer ends the connection."""

    def __init__(self, socket_path: Path, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """`timeout_s` is how long connecting and each call wait. ControlError if no tapdisk listens there."""
        self.path = socket_path
        self.timeout_s = timeout_s
        self._lines = Lines(MAX_REPLY_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(socket_path))
        except OSError as error:
            self._socket.close()
            raise ControlError(f"cannot reach the tapdisk: {error.strerror or error}", errno=error.errno,
                               path=str(socket_path)) from error

    def call(self, op: str, **params: Any) -> dict[str, Any]:
        """The result of `op`. ControlError if it fails, or there is no answer within `timeout_s`."""
        request = encode_request(op, params)
        deadline_s = time.monotonic() + self.timeout_s
        try:
            self._socket.settimeout(self.timeout_s)
            self._socket.sendall(request)
            return decode_reply(self._receive_line(deadline_s))
        except TimeoutError:
            failure = ControlError(f"no answer to {op!r} within {self.timeout_s:g} s", errno=errno.ETIMEDOUT)
        except OSError as error:
            failure = ControlError(f"lost the tapdisk during {op!r}: {error.strerror}", errno=error.errno)
        except ProtocolError as error:
            failure = ControlError(f"the tapdisk sent {error.message}", errno=error.errno)
        self.close()
        failure.path = str(self.path)
        raise failure

    def _receive_line(self, deadline_s: float) -> bytes:
        while (line := self._lines.next_line()) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
            data = self._socket.recv(RECV_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
            self._lines.feed(data)
        return line

    def close(self) -> None:
        """A disk that is held over this connection goes on."""
        self._socket.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has been, or a call was left without an answer."""
        return self._socket.fileno() < 0

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Processes


class Process(NamedTuple):
    """A running tapdisk."""

    pid: int
    path: Path
    """Its control socket."""


def socket_path(run_dir: Path, pid: int) -> Path:
    """The control socket of the tapdisk `pid`."""
    return run_dir / f"tapdisk-{pid}.ctl"


def processes(run_dir: Path) -> list[Process]:
    """The tapdisks that run, by pid. What dead ones left behind is reported and removed. ControlError if the
    directory cannot be read; one that does not exist has none."""
    found = []
    try:
        entries = list(run_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ControlError(f"cannot look for tapdisks: {error.strerror}", errno=error.errno,
                           path=str(run_dir)) from error
    for path in entries:
        if match := re.fullmatch(r"tapdisk-([0-9]+)\.ctl", path.name):
            if unixsocket.is_alive(path):
                found.append(Process(int(match[1]), path))
            elif path.is_socket():
                _remove_dead(path)
    return sorted(found)


def _remove_dead(path: Path) -> None:
    log = path.with_suffix(".log")
    hint = f"; what it last said is in {log}" if log.exists() else ""
    logger.warning("%s: this tapdisk died, its sockets are removed%s", path, hint)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        if not unixsocket.is_alive(path.with_suffix(".nbd")):
            path.with_suffix(".nbd").unlink(missing_ok=True)


def find_disk(run_dir: Path, name: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> ControlClient:
    """A connection to the tapdisk that serves the disk `name`. ControlError if none does, or several do."""
    found: list[ControlClient] = []
    known: list[str] = []
    silent: list[str] = []
    try:
        for process in processes(run_dir):
            try:
                names = _ask_names(process, name, min(timeout_s, LOOK_TIMEOUT_S), found)
            except ControlError:
                silent.append(str(process.pid))
            else:
                known += names
        if len(found) != 1:
            raise _not_one(run_dir, name, found, known, silent)
    except BaseException:
        for client in found:
            client.close()
        raise
    found[0].timeout_s = timeout_s
    return found[0]


def _ask_names(process: Process, name: str, timeout_s: float, found: list[ControlClient]) -> list[str]:
    """The disks of a process; the connection is added to `found` if `name` is one of them, or else closed."""
    client = ControlClient(process.path, timeout_s)
    try:
        names = [str(disk["name"]) for disk in client.call("list")["disks"]]
    except BaseException:
        client.close()
        raise
    if name in names:
        found.append(client)
    else:
        client.close()
    return names


def _not_one(
    run_dir: Path, name: str, found: list[ControlClient], known: list[str], silent: list[str]
) -> ControlError:
    if found:
        where = ", ".join(str(client.path) for client in found)
        return ControlError(f"{len(found)} tapdisks serve a disk {name!r}", errno=errno.EEXIST, hint=where)
    if silent:
        return ControlError(f"no tapdisk that answers in {run_dir} serves a disk {name!r}", errno=errno.EAGAIN,
                            hint=f"these do not answer: {', '.join(silent)}")
    hint = f"there are {', '.join(sorted(known))}" if known else "no disk is served there"
    return ControlError(f"no tapdisk in {run_dir} serves a disk {name!r}", errno=errno.ENOENT, hint=hint)
