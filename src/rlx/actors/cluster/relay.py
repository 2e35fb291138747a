"""A node's side: one driver's actors on this machine, whose frames pass between the driver's link and theirs.

Nothing of what passes is unpickled here: that is done in the actors' processes, and by the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlx.actors import machine
from rlx.actors.channel import FOR_OTHERS
from rlx.actors.cluster import project
from rlx.actors.cluster.heartbeat import Heartbeat, Patience
from rlx.actors.cluster.mirrors import Mirrors
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.local import LocalEngine
from rlx.actors.engines.local_actor import LocalActor
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.reactor import READ, WRITE
from rlx.actors.engines.wire import Frame, Lent
from rlx.actors.future import Answer, Err, Future, nothing
from rlx.actors.interface import ActorSpec, Listener, Stall
from rlx.actors.logs import Damper
from rlx.actors.monitor import EventThread, logger
from rlx.errors import ActorError, ObjectMemoryFull

CALL_BITS = 40
"""Bits of a call id that count an actor's calls; those above are the actor's number."""


class NodeEngine(LocalEngine):
    """The local engine, driven from another machine. It ends with the driver's link, and `ended` is called once."""

    def __init__(
        self,
        node: machine.Node,
        sock: Any,
        settings: dict[str, Any],
        ended: Callable[[NodeEngine], None],
        folder: Path | None,
    ) -> None:
        """sock: to the driver, authenticated. settings: what its OPEN frame says: system_timeout_s, patience, preload,
        object_memory, root.

        folder: the driver's project on this machine, whose folder is `root` there.
        """
        preload, timeout_s = settings["preload"], settings["system_timeout_s"]
        patience = Patience(**settings["patience"])  # before there is anything that would be left
        events = EventThread("rlx-node-events")
        super().__init__(events, timeout_s, preload, settings.get("object_memory"), damper=_Forwarder(self._print))
        self._machine, self.where = node, f" on {node.name}"
        self.memory.arena.wait_s = 0.0  # in the thread that serves everybody
        self._orders: deque[tuple[bytes, list[int]]] = deque()  # that the forkserver has not taken yet
        self._held_up: list[Link] = []  # of actors, while the driver leaves much unread
        self.relayed: dict[int, RelayedActor] = {}
        self._asked_for: set[int] = set()  # numbers of all actors, also of those that have ended
        self._ended, self._is_ended = ended, False
        self._project_folder, self._root = folder, settings.get("root")
        self._kept: dict[int, wire.Buffer] = {}  # what calls of the driver refer to, by its number
        self._sock = sock
        self.link = Link(self.reactor, sock, self._take, self._lose_driver, self.memory.allocate)
        self.mirrors = Mirrors(self.reactor, self.channel)
        self._heart = Heartbeat(self.reactor, self.link, patience, self._note_silence, self._lose_driver)

    def begin(self) -> None:
        """Tell the driver that it may send."""
        self.reactor.post(self._begin)

    def _begin(self) -> None:
        self.link.open()
        self.link.write(wire.encode(wire.OPEN))
        self._heart.start()

    def close(self, timeout_s: float) -> None:
        """End all actors, and who hears of them."""
        super().close(timeout_s)
        self.events.close(timeout_s)
        self._sock.close()  # by now nobody reads from it, and the driver has heard all

    def hold_up(self, link: Link) -> None:
        """Read no more of an actor until the driver has read what waits for it."""
        if not self._held_up:
            self.link.when_room(self._read_on)
        if link not in self._held_up:
            self._held_up.append(link)
            link.read_on(False)

    def _read_on(self) -> None:
        links, self._held_up = self._held_up, []
        for link in links:
            link.read_on(True)

    def _take(self, frame: Frame) -> None:
        """Do what a frame asks for. What cannot be done is no reason to end all other actors of the driver."""
        try:
            self._do(frame)
        except Exception as error:
            logger.warning("a frame of kind %d of a driver cannot be dealt with: %s", frame.kind, error)
            if frame.kind in (wire.CALL, wire.STREAM, wire.SEND):
                kind = wire.SEND_FAILED if frame.kind == wire.SEND else wire.ERROR
                text, message = pickling.dump_error(error, f"the node{self.where}")
                self.link.write(wire.encode(kind, frame.call_id, text, message))

    def _do(self, frame: Frame) -> None:
        if frame.kind == wire.PING:
            return
        if frame.kind == wire.PUBLISH:
            self.mirrors.take(frame, self.link)
        elif frame.kind == wire.KEEP:
            self._kept[frame.call_id] = frame.open(None)[0]
        elif frame.kind == wire.DROP:
            self._kept.pop(frame.call_id, None)
        elif frame.kind == wire.SPAWN:
            self._spawn(frame)
        elif frame.kind == wire.READERS:
            readers = self.channel(frame.text).readers()
            found = {name: dataclasses.astuple(how) for name, how in readers.items() if name != FOR_OTHERS}
            self.link.write(wire.encode(wire.READERS, frame.call_id, json.dumps(found)))
        elif (actor := self.relayed.get(frame.call_id >> CALL_BITS)) is not None:
            actor.relay(frame)

    def borrow(self, number: int, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return views of what the driver has sent before; ActorError if it has not."""
        whole = memoryview(self._kept.get(number, b""))
        if any(start + size > len(whole) for start, size in spans):
            raise ActorError(
                f"a frame refers to what was sent as number {number}, and it was not sent (or not {spans})"
            )
        return [whole[start : start + size] for start, size in spans]

    def _order(self, timeout_s: float, descriptors: Sequence[int], **order: Any) -> None:
        """Never wait in the reactor's thread: a forkserver that still imports takes the rest later."""
        if threading.get_ident() != self.reactor.ident:
            super()._order(timeout_s, descriptors, **order)
            return
        copies: list[int] = []
        with contextlib.ExitStack() as undo:  # where descriptors have run out, none may be lost
            for fd in descriptors:
                copies.append(os.dup(fd))
                undo.callback(os.close, copies[-1])
            undo.pop_all()
        self._orders.append((json.dumps(order).encode(), copies))
        self._send_orders()

    def _send_orders(self) -> None:
        while self._orders:
            data, descriptors = self._orders[0]
            try:
                socket.send_fds(self._control, [data], descriptors)
            except BlockingIOError:
                break
            except ConnectionError:
                pass  # it has ended, as the reactor sees
            self._orders.popleft()
            for fd in descriptors:
                os.close(fd)
        self.reactor.watch(self._control.fileno(), READ | (WRITE if self._orders else 0))

    def _on_control(self, events: int) -> None:
        if events & WRITE:
            self._send_orders()
        super()._on_control(events)

    def _spawn(self, frame: Frame) -> None:
        first, asked = frame.call_id, json.loads(frame.text)
        if first in self._asked_for:  # it has come twice, and would run twice
            return
        self._asked_for.add(first)
        name, limits = asked["name"], (asked["threads"], asked["concurrency"])
        spec = ActorSpec(name, object, (), {}, {}, *limits, stall_after_s=asked["stall_after_s"])
        settings = {"threads": asked["threads"], "concurrency": asked["concurrency"]}
        settings |= {
            "env": os.environ | asked["env"] | self._machine.environment(),
            "cwd": self._here(asked["cwd"]),
            "path": self._path(asked["path"]),
        }
        parcel = Parcel(frame.open(self.borrow), tuple(map(self.channel, asked["channels"])))

        def make(number: int) -> RelayedActor:
            actor = self.relayed[first >> CALL_BITS] = RelayedActor(self, number, spec, first)
            return actor

        try:
            for channel in asked["channels"]:
                self.mirrors.add(channel, self.link)
            self.start(name, settings, parcel, make)
        except Exception as error:
            if first >> CALL_BITS not in self.relayed:  # else it is buried, and told of
                self.link.write(wire.encode(wire.EXITED, first, f"{name}{self.where} could not be started: {error}"))
            logger.warning("%s could not be started: %s", name, error)

    def _here(self, cwd: str) -> str:
        """Return the driver's working folder as it is here, or this process' own."""
        cwd = project.translate(cwd, self._root, self._project_folder)
        return cwd if os.path.isdir(cwd) else os.getcwd()

    def _path(self, path: list[str]) -> list[str]:
        """Return where modules are looked for: where the driver does, as far as it is here, then where this does."""
        there = [project.translate(entry, self._root, self._project_folder) for entry in path]
        return list(dict.fromkeys([*(entry for entry in there if not entry or os.path.exists(entry)), *sys.path]))

    def _print(self, name: str, text: str) -> None:
        self.link.write(wire.encode(wire.PRINTED, 0, name, (text.encode("utf-8", "backslashreplace"), ())))

    def _end_without_server(self, actors: Sequence[LocalActor], how: str, is_final: bool) -> None:
        """Then end as well, so that the driver links anew and finds a new forkserver."""
        super()._end_without_server(actors, how, is_final)
        if not is_final:
            self._lose_driver("is given up")

    def _note_silence(self, silent_s: float) -> None:
        logger.warning("the driver has been silent for %.0f s", silent_s)

    def _lose_driver(self, how: str) -> None:
        """There is nobody left to work for."""
        if self._is_ended:
            return
        self._is_ended = True
        self._heart.stop()
        self.link.finish(self.link.close)
        self._ended(self)


class _Forwarder(Damper):
    """Sends what actors print to the driver, who keeps it, and holds back floods."""

    def __init__(self, send: Callable[[str, str], None]) -> None:
        self._send = send

    def feed(self, name: str, lines: Sequence[str]) -> None:
        """Send new lines."""
        self._send(name, "".join(f"{line}\n" for line in lines))

    def skip(self, name: str, count: int) -> None:
        """Say that bytes came too fast to be read."""
        self._send(name, f"({count:,} bytes were printed too fast to be sent to the driver)\n")

    def flush(self, everything: bool = False) -> float | None:
        """Nothing is held back here."""


class RelayedActor(LocalActor):
    """An actor of this machine whose callers are on another one."""

    def __init__(self, engine: NodeEngine, number: int, spec: ActorSpec, first_call: int) -> None:
        self._node, self._first_call, self._newest_call = engine, first_call, first_call
        self._is_full = False  # as the driver knows
        super().__init__(engine, number, spec, Listener(self._tell_end, _never, self._tell_stall))
        self._lend = self._lend_what_fits

    def relay(self, frame: Frame) -> None:
        """Pass on what the driver sends."""
        kind, call_id = frame.kind, frame.call_id
        if kind == wire.KILL:
            self._killed = frame.text
            self._engine.kill(self._number, 1.0)
            return
        if kind == wire.CHANNEL:
            with self._lock:
                self._hand_over([self._node.channel(frame.text)])
            self._node.mirrors.add(frame.text, self._node.link)
            return
        if kind in (wire.CALL, wire.SEND, wire.STREAM):
            if call_id <= self._newest_call:  # it has come before: no call runs twice
                return
            self._newest_call = call_id
        parcel = Parcel(frame.open(self._node.borrow))
        places = self._lend(parcel) if parcel.message[1] else None
        with self._lock:
            if self._end is not None:
                return  # the driver hears of that
            urgent = not self._pending
            if kind in (wire.CALL, wire.STREAM):
                self._next_call()
                method = frame.text.partition(" ")[2] if kind == wire.STREAM else frame.text
                self._pending[call_id] = Future(self._name, method)  # counted and named here; the driver waits for it
            self._link.write(wire.encode(kind, call_id, frame.text, parcel.message, places), urgent)
        if self._link.is_full and not self._is_full:
            self._is_full = True
            self._tell_driver(wire.FULL, self._first_call, "")
            self._link.when_room(self._note_room)

    def _note_room(self) -> None:
        self._is_full = False
        self._tell_driver(wire.ROOM, self._first_call, "")

    def _lend_what_fits(self, parcel: Parcel) -> list[Lent | None] | None:
        """Place the buffers in shared memory; where that is full they wait in this process, and callers at the end."""
        try:
            return self._memory.lend(parcel)
        except ObjectMemoryFull:
            return None

    def on_started(self, pid: int) -> None:
        """The process exists."""
        super().on_started(pid)
        self._tell_driver(wire.STARTED, self._first_call, str(pid))

    def _take(self, frame: Frame) -> None:
        """Pass on what the process sends."""
        kind, self._progress = frame.kind, time.monotonic()
        message = self._open(frame)
        if kind == wire.READY:
            self.ready.settle(nothing)
            self.slot.update(status="alive")  # which elsewhere is noted by the driver's own half
        elif kind in (wire.REPLY, wire.ERROR, wire.CANCELLED):
            with self._lock:
                self._pending.pop(frame.call_id, None)
        self._node.mirrors.look()  # what it has published is there before its answer
        self._tell_driver(kind, frame.call_id or self._first_call, frame.text, message)
        if self._node.link.is_full:
            self._node.hold_up(self._link)

    def _tell_end(self, why: Answer) -> None:
        self._node.relayed.pop(self._first_call >> CALL_BITS, None)
        self.slot.update(status="dead")
        if self._node.closing:  # the link ends as well, and tells that the machine is gone and not this actor only
            return
        outcome = why()
        self._tell_driver(wire.EXITED, self._first_call, str(outcome.error) if isinstance(outcome, Err) else "ended")

    def _tell_stall(self, stall: Stall) -> None:
        self._tell_driver(wire.STALLED, self._first_call, json.dumps(dataclasses.asdict(stall)))

    def _tell_driver(self, kind: int, call_id: int, text: str, message: wire.Message = pickling.EMPTY) -> None:
        self._node.link.write(wire.encode(kind, call_id, text, message), stable=True)  # it is the actor's, lent


def _never(error: Answer) -> None:
    raise ActorError("the failure of a one-way call is the driver's to hear.")
