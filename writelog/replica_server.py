"""The replica's socket: takes connections in, gives messages to the one session, applies nothing itself.

One sync at a time. A zmq ROUTER names each connection by an identity; the monitor says when a connection ends, by
its descriptor, which every message carries too. So a sync that was killed makes room at once, and one whose link
dropped comes back with its session's id and goes on.

The zmq descriptor is edge-triggered: it tells once that something happened, and every call on the socket can use
that up. So the socket is drained until it has nothing more, whenever the descriptor shows and after every send.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import Final

import zmq

from tapcore.driver import Env, leaf_of
from tapcore.drivers.log import Log
from tapcore.errors import ProtocolError, ReplicationError, UsageError, WritelogError
from tapcore.loop import Timer
from tapcore.vbd import Vbd
from writelog.keyring import PAIR_HINT, Keys, fingerprint
from writelog.replica_copy import Copy
from writelog.replica_doorman import LOOK_INTERVAL_S, Doorman
from writelog.replica_facts import room
from writelog.replica_keys import KeySource, KeyWatch
from writelog.replica_session import OPEN, WAITING, Session
from writelog.replica_state import StateStore
from writelog.sync_transport import Gate, monitor_events, prepare, serve_curve
from writelog.wire import (
    VERSION,
    Epoch,
    Facts,
    Failure,
    Hello,
    Kept,
    Message,
    Refusal,
    Refused,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

BATCH_MESSAGES: Final = 64
"""Messages taken before the loop serves others."""
SEND_QUEUE_MESSAGES: Final = 1000
LAST_ANSWER_MS: Final = 500
"""How long a socket that is closed still tries to deliver the last answer."""


class ReplicaServer:
    """Serves syncs for `vbd`, which is open and paused; `export` is what PROMOTED tells.

    `on_end(succeeded)` is called when a session ended for good: released, promoted or failed, or gone for
    `peer_timeout_s` after its link dropped. `copy` must have recovered; without, nothing outlives the process.
    With `keys`, a sync is let in by `authorize(its public key)`, which is called in a thread; with a `key_source`
    they may change meanwhile. A disk with a `log` is changed below that, and logged from its promotion on: so the
    log knows what the former primary lacks. With `may_discard` any copy may be overwritten, once.
    """

    def __init__(self, env: Env, vbd: Vbd, export: str = "", *, keys: Keys | None = None,
                 authorize: Callable[[bytes], bool] = lambda key: False, key_source: KeySource | None = None,
                 peer_timeout_s: float = 10.0, on_end: Callable[[bool], None] | None = None,
                 copy: Copy | None = None, log: Log | None = None, may_discard: bool = False) -> None:
        self.promoted = False
        self.endpoint = ""
        self._env = env
        self._vbd = vbd
        self._export = export
        self._on_end = on_end
        self._peer_timeout_s = peer_timeout_s
        self._copy = copy or Copy(env, vbd.chain.head, StateStore())
        self._copy.on_ready = self._wake
        self._applier = self._copy.applier
        self._log = log
        self._may_discard = may_discard
        self._promotions: list[Callable[[str | WritelogError], None]] = []
        """Who waits for the promotion that is under way."""
        self._disk = ""
        self._in_place = False
        self._session: Session | None = None
        self._identity = b""
        self._fd = -1
        self._connections: set[int] = set()
        """Their descriptors, also of those that have no session."""
        self._session_id = b""
        self._confirmed: bytes | None = None
        self._is_resumed = False
        """Whether the sync makes good what the copy lacks, or a new one."""
        self._draining = False
        self._wake_due = False
        self._held_back = False
        self._waits_for_idle = False
        self._gone_timer: Timer | None = None
        self._context = zmq.Context()
        self._gate = Gate(self._context, authorize) if keys is not None else None
        self._socket = self._context.socket(zmq.ROUTER)
        if keys is not None:
            serve_curve(self._socket, keys)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._doorman: Doorman | None = None
        self._look_timer: Timer | None = None
        self._key_watch = None
        if keys is not None and key_source is not None:
            self._key_watch = KeyWatch(env, keys, key_source, self._use_keys, self._drop_removed)

    def listen(self, endpoint: str) -> str:
        """Bind; returns the address with the port that was bound. UsageError if it cannot be."""
        prepare(self._socket, endpoint, self._peer_timeout_s, SEND_QUEUE_MESSAGES)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot listen on {endpoint}: {zmq.strerror(error.errno or 0)}",
                             errno=error.errno) from None
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        if self.endpoint.startswith("tcp://"):
            self._doorman = Doorman(int(self.endpoint.rsplit(":", 1)[1]))
            self._look_around()
        self._env.loop.add_reader(self._socket.fileno(), self._drain)
        self._env.loop.add_reader(self._monitor.fileno(), self._watch)
        self._wake()
        if self._key_watch is not None:
            self._key_watch.start()
        return self.endpoint

    def close(self, done: Callable[[], None]) -> None:
        """Stop listening, then `done()` when the chain has nothing of this server in flight."""
        if self._session is not None:
            self._session.end()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._key_watch is not None:
            self._key_watch.stop()
        loop = self._env.loop
        for socket in (self._socket, self._monitor):
            loop.remove(socket.fileno())
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(LAST_ANSWER_MS)
        self._copy.close(lambda: self._close_context(done))

    def _close_context(self, done: Callable[[], None]) -> None:
        if self._gate is not None:
            self._gate.close()
        self._context.term()
        done()

    # The socket

    def _wake(self) -> None:
        """Drain at the end of this turn."""
        if not self._wake_due:
            self._wake_due = True
            self._env.loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._wake_due = False
        if self._socket.closed:
            return
        self._hold_back(self._has_enough)
        for _ in range(BATCH_MESSAGES):
            if self._has_enough:
                self._hold_back(True)
                break
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._on_message(frames)
        else:
            self._wake()
        self._applier.start()

    @property
    def _has_enough(self) -> bool:
        """A journal that is applied stops a session, but not the greeting of a new one."""
        return self._applier.is_full or (self._copy.is_busy and self._session is not None)

    def _hold_back(self, hold: bool) -> None:
        """Leave the socket alone until there is room. As soon as there is, the answers of the session wake it; if
        there is no session any more, the end of all that is in flight does."""
        if hold == self._held_back:
            return
        self._held_back = hold
        self._env.loop.add_reader(self._socket.fileno(), None if hold else self._drain)
        if hold and not self._waits_for_idle:
            self._waits_for_idle = True
            self._applier.when_idle(self._idle)

    def _idle(self) -> None:
        self._waits_for_idle = False
        self._wake()

    def _send(self, identity: bytes, message: Message) -> None:
        """Send what fits the queue: a peer that takes no answers is not worth more, and finds out by itself."""
        if self._socket.closed:
            return
        try:
            self._socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("the sync does not take answers; one was dropped")
        self._wake()

    def _watch(self) -> None:
        """Notice connections that began or ended."""
        if self._socket.closed:
            return
        for event, fd in monitor_events(self._monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._connections.add(fd)
                if self._doorman is not None:
                    self._doorman.accepted(fd, self._fd)
                continue
            self._connections.discard(fd)
            if self._doorman is not None:
                self._doorman.closed(fd)
            if fd == self._fd:
                self._disconnected()

    def _look_around(self) -> None:
        assert self._doorman is not None
        self._doorman.look()
        self._look_timer = self._env.loop.call_later(LOOK_INTERVAL_S, self._look_around)

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        contents = [frame.buffer for frame in frames[1:]]
        session = self._session
        is_of_session = session is not None and identity == self._identity
        if self._doorman is not None:
            self._doorman.heard(self._fd if is_of_session else int(frames[1].get(zmq.SRCFD)))
        if session is not None and is_of_session:
            session.handle(contents)
            return
        try:
            message, _ = decode(contents)
        except WritelogError as error:
            logger.warning("a connection without a session sent garbage: %s", error)
            self._send(identity, Failure(error.errno, error.message, ""))
            return
        if isinstance(message, Hello):
            self._watch()
            if self._key_watch is not None and not self._is_known(key := str(frames[1].get("User-Id")).encode()):
                logger.warning("a client whose key %s was removed was refused", fingerprint(key))
                self._send(identity, Failure(errno.EACCES, "the replica knows this sync's key no more", PAIR_HINT))
                return
            self._hello(identity, int(frames[1].get(zmq.SRCFD)), message)
            if self._key_watch is not None and identity == self._identity:
                self._key_watch.client = key

    # Keys

    def _is_known(self, key: bytes) -> bool:
        """Asked again at each HELLO: the handshake may be long ago."""
        assert self._key_watch is not None
        try:
            return self._key_watch.source.knows(key)
        except (WritelogError, OSError) as error:
            logger.error("a client was refused, for its key cannot be looked up: %s", error)
            return False

    def _use_keys(self, keys: Keys) -> bool:
        """Listen anew, with new keys; that ends connections. False as long as there are some, or the address is
        still taken."""
        self._watch()
        if self._connections:
            return False
        with contextlib.suppress(zmq.ZMQError):  # it may have been done the last time
            self._socket.unbind(self.endpoint)
        serve_curve(self._socket, keys)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError:
            return False
        logger.warning("connections are made with this host's new key %s from now on", fingerprint(keys.public))
        self._wake()
        return True

    def _drop_removed(self) -> None:
        """The key of the sync that is connected was removed."""
        if self._session is not None and not self.promoted and not self._promotions:
            self._session.refuse(ReplicationError("the replica knows this sync's key no more", errno=errno.EACCES,
                                                  hint=PAIR_HINT))

    # Sessions

    def _hello(self, identity: bytes, fd: int, hello: Hello) -> None:
        refused = self._reason_to_refuse(hello)
        if hello.is_inquiry:
            self._tell_facts(identity, hello, refused or Refused(0, "", ""))
            return
        if refused is not None:
            logger.warning("a sync of disk %r was refused: %s", hello.disk, refused.message)
            self._send(identity, refused)
            return
        if self._session is not None:
            self._session.end()
        if self._gone_timer is not None:
            self._gone_timer.cancel()
        self._applier.drop_queued()
        known = hello.session == self._session_id
        held = self._held(hello)
        self._session_id, self._disk, self._in_place = hello.session, hello.disk, hello.in_place
        session = Session(self._env.loop, self._applier, self._vbd.info.size_bytes,
                          lambda message: self._send(identity, message), self)
        if not (known and held):
            self._confirmed = None
        elif self._confirmed is not None:
            session.resume_confirmed()
        self._is_resumed = held != 0
        self._session, self._identity, self._fd = session, identity, fd
        logger.info("disk %r is replicated to here%s", hello.disk, ", again" if held else "")
        self._copy.when_ready(lambda: self._begin(session, held))
        session.stay_alive()

    def _begin(self, session: Session, held: int) -> None:
        if session.state != WAITING or self.promoted:
            session.welcome(held, None)
            return

        def begun(error: WritelogError | None) -> None:
            if error is not None:
                session.refuse(error)
            else:
                session.welcome(held, self._copy.journal_bytes if self._copy.is_journaled else None)

        self._copy.begin(self._in_place, held != 0, begun)

    def _held(self, hello: Hello) -> int:
        """The name in the HELLO that the copy here goes by; 0 if it is none."""
        base = self._copy.state.base
        return base if base in (hello.base, hello.former) else 0

    def _tell_facts(self, identity: bytes, hello: Hello, refused: Refused) -> None:
        found: list[tuple[int, int]] = []
        image = leaf_of(self._vbd.chain.head).path

        def tell() -> None:
            self._send(identity, Facts(refused.reason, refused.message, refused.hint, self._held(hello),
                                       self._vbd.info.size_bytes, *found[0]))

        self._env.workers.submit(lambda: found.append(room(image)), tell)

    def _reason_to_refuse(self, hello: Hello) -> Refused | None:
        size_bytes = self._vbd.info.size_bytes
        if hello.version != VERSION:
            return Refused(Refusal.VERSION, f"the replica speaks version {VERSION} of the protocol, the sync "
                           f"version {hello.version}", "install the same version of writelog on both hosts")
        if self.promoted and hello.session != self._session_id:
            return Refused(Refusal.PROMOTED, "the replica was promoted: it is the primary now",
                           "start a fresh writelog-replica to replicate again")
        if hello.size_bytes != size_bytes:
            return Refused(Refusal.SIZE, f"the disk has {hello.size_bytes} bytes, the replica {size_bytes}",
                           f"make the replica's image the same size: truncate -s {hello.size_bytes} IMAGE")
        if self._vbd.read_only:
            return Refused(Refusal.READ_ONLY, "the replica is read-only", "open its image for writing")
        state = self._copy.state
        is_same = hello.session == self._session_id or self._held(hello)
        if self._session is not None and not is_same:
            return Refused(Refusal.BUSY, "the replica is busy with another sync", "wait for it, or stop it")
        if not state.base or self._held(hello) or hello.overwrite or self._may_discard:
            return None
        if hello.base in state.history:
            return Refused(Refusal.STRANGER, f"the write log of disk {hello.disk!r} is older than the copy here: "
                           "it does not know all that was changed since",
                           "was it restored from a backup, or its host cloned? --overwrite sends a full copy over "
                           "what the replica holds")
        return Refused(Refusal.STRANGER, f"the replica holds a copy of disk {state.disk!r}, but none that the "
                       "write log here knows of",
                       "is it the right replica? --overwrite sends a full copy over what it holds")

    def _disconnected(self) -> None:
        self._fd = -1
        session, self._session = self._session, None
        if session is None or session.state not in (WAITING, OPEN):
            return
        session.end()
        self._applier.drop_queued()
        self._wake()
        if self.promoted:
            return
        logger.warning("the connection to the sync ended; it may come back")
        session_id = self._session_id
        self._gone_timer = self._env.loop.call_later(self._peer_timeout_s, lambda: self._gone(session_id))

    def _gone(self, session_id: bytes) -> None:
        """The time for a sync to come back is over."""
        if self._session is None and self._session_id == session_id and not self.promoted:
            self._session_over(False)

    def _session_over(self, succeeded: bool) -> None:
        self._session = None
        self._session_id = b""
        self._applier.drop_queued()
        if self._on_end is not None:
            self._on_end(succeeded)

    # What a session tells

    @property
    def kept(self) -> Kept:
        return Kept(self._copy.kept_epoch, self._copy.is_journaled)

    def session_based(self, base: int) -> None:
        if self._is_resumed and base == self._copy.state.base:
            return
        if self.promoted or self._promotions:
            raise ReplicationError("the replica was promoted: it gets no other name", errno=errno.EPERM)
        if not self._is_resumed:
            self._copy.based(base, self._disk)
        elif base in self._copy.state.history:
            raise ProtocolError("a message was doubled on the way: the copy had that BASE before",
                                errno=errno.EBADMSG)
        else:
            self._copy.renamed(base, self._disk)
        self._is_resumed, self._may_discard = True, False

    def session_writes(self) -> None:
        self._copy.touched()

    def session_epoch(self, message: Epoch, done: Callable[[WritelogError | None], None]) -> None:
        self._must_name_the_confirmed("EPOCH", message.digest)
        self._copy.epoch(message.at_ms, done)

    def why_full(self) -> WritelogError | None:
        return self._copy.why_full()

    def session_confirmed(self, digest: bytes | None) -> None:
        self._confirmed = digest

    def promote(self, digest: bytes, done: Callable[[str | WritelogError], None]) -> None:
        self._must_name_the_confirmed("PROMOTE", digest)
        if self.promoted:
            done(self._export)
            return
        self._promotions.append(done)
        if len(self._promotions) > 1:
            return
        if self._log is None:
            self._log_began(0)
        else:
            self._log.start_over(self._copy.state.base, self._log_began)

    def _log_began(self, code: int) -> None:
        """What is written from now on is known to be what the former primary lacks."""
        outcome: str | WritelogError = self._export
        try:
            if code:
                raise ReplicationError(f"the log's side-car cannot be written: {os.strerror(code)}", errno=code)
            self._copy.promoted()
            self.promoted = True
            self._applier.turn_to(self._vbd.chain.head)
            self._vbd.resume()
            logger.warning("promoted: this disk is the primary now")
        except WritelogError as error:
            outcome = error
        waiting, self._promotions = self._promotions, []
        for done in waiting:
            done(outcome)
        if self.promoted and self._on_end is not None:
            self._on_end(True)

    def _must_name_the_confirmed(self, what: str, digest: bytes) -> None:
        if digest != self._confirmed:
            raise ReplicationError(f"{what} does not name the state that the replica confirmed",
                                   hint="nothing was promoted")

    def session_released(self) -> None:
        logger.info("the sync is done; the copy is consistent, and this stays a replica")
        self._session_over(True)

    def session_failed(self, error: WritelogError) -> None:
        logger.error("the sync failed: %s", error)
        self._session_over(False)
