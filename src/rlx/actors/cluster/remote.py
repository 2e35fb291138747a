"""The driver's side of a node: its link, and the actors behind it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlx.actors.channel import Channel, Staleness
from rlx.actors.cluster.heartbeat import Heartbeat
from rlx.actors.cluster.membership import NodeInfo
from rlx.actors.cluster.relay import CALL_BITS
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.arena import Block
from rlx.actors.engines.death import describe
from rlx.actors.engines.link import Link
from rlx.actors.engines.local_actor import LocalActor
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.process_actor import ProcessActor
from rlx.actors.engines.wire import Frame, Lent
from rlx.actors.future import Err, Future, Ok, nothing, wait
from rlx.actors.interface import ActorSpec, Listener, Stall
from rlx.actors.monitor import logger
from rlx.errors import ActorDied, CallTimeout, ObjectMemoryFull

if TYPE_CHECKING:
    from rlx.actors.cluster.engine import ClusterEngine


class Node:
    """One machine of the cluster. All but `spawn` and `close` runs in the reactor's thread."""

    def __init__(self, engine: ClusterEngine, info: NodeInfo, sock: Any) -> None:
        """sock: to its daemon, which has answered the OPEN frame."""
        self.info, self.name, self.address = info, info.name, info.address
        self.actors: dict[int, LocalActor | RemoteActor | None] = {}
        """By number; None: on its way."""
        self._questions, self._asked = itertools.count(), dict[int, Future[dict[str, Staleness]]]()
        self.lost: str | None = None
        """Why it takes no more actors."""
        self._engine = engine
        self._keeping = threading.Lock()  # of the order in which a buffer and what refers to it are written
        self._kept: dict[weakref.ref[Block], int] = {}  # what has crossed to it and is still alive here
        self._kept_count = itertools.count()
        self.link = Link(engine.reactor, sock, self._take, self.lose, engine.memory.allocate)
        self._heart = Heartbeat(engine.reactor, self.link, engine.patience, self._note_silence, self.lose)
        engine.reactor.post(self._begin)

    def spawn(self, number: int, spec: ActorSpec, parcel: Parcel, listener: Listener) -> LocalActor | RemoteActor:
        """Have the node start an actor."""
        actor = None
        try:
            self.actors[number] = actor = RemoteActor(self._engine, self, number, spec, listener)
            actor.start(spec, parcel)
        except BaseException as error:
            if actor is None:
                self.remove(number)
            else:
                actor.abandon(error)
            raise
        self._end_if_lost(actor)
        return actor

    def lend(self, parcel: Parcel) -> list[Lent | None] | None:
        """Have the large buffers be on the node, where they cross to once however many calls bring them.

        In the frame go small parts of a block, such as a slice of what an actor has returned, and all of it where the
        driver's object memory is full.
        """
        if not parcel.message[1]:
            return None
        try:
            places = parcel.place(self._engine.memory.arena, 0.0)
        except ObjectMemoryFull:
            return None
        sizes = Counter[Block]()
        for block, (_, size) in filter(None, places):
            sizes[block] += size
        kept = {block: self._keep(block) for block, size in sizes.items() if 2 * size >= block.extent}
        return [
            (place[1][1], place[1][0] - place[0].offset, kept[place[0]]) if place and place[0] in kept else None
            for place in places
        ]

    def readers(self, channel: str) -> Future[dict[str, Staleness]]:
        """Ask who reads the channel on this machine."""
        number = next(self._questions)
        answer: Future[dict[str, Staleness]] = Future(self.name, "readers")
        self._asked[number] = answer
        self.link.write(wire.encode(wire.READERS, number, channel))
        if self.lost is not None:
            answer.settle(lambda: Ok({}))
        return answer

    def remove(self, number: int) -> None:
        """An actor has ended."""
        self.actors.pop(number, None)

    def lose(self, how: str) -> None:
        """Nothing more comes from it; whatever it still does, nobody hears of it."""
        if self.lost is None:
            self.lost = how
            self._heart.stop()
            self.link.finish(self._bury)

    def _begin(self) -> None:
        self.link.open()
        self._heart.start()

    def _bury(self) -> None:
        self.link.close()
        self._engine.forget(self)
        for actor in list(self.actors.values()):
            if actor is not None:
                actor.lose(self._how())
        for answer in list(self._asked.values()):
            answer.settle(lambda: Ok({}))

    def _keep(self, block: Block) -> int:
        """Return the number by which the node knows the block; it forgets it when the block dies here."""
        with self._keeping:
            number = self._kept.get(weakref.ref(block))
            if number is None:
                number = next(self._kept_count)
                try:
                    self.link.write(wire.encode(wire.KEEP, number, message=(b"", [block.view()])), stable=True)
                    self._kept[weakref.ref(block, self._drop)] = number
                except BaseException:  # an interrupt: the node may have it, and would never hear of its death
                    self._kept.pop(weakref.ref(block), None)
                    self._engine.reactor.post(partial(self.link.write, wire.encode(wire.DROP, number)))
                    raise
            return number

    def _drop(self, block: weakref.ref[Block]) -> None:
        """Perhaps in the middle of anything: no lock is taken here."""
        number = self._kept.pop(block, None)
        if number is not None:
            self._engine.reactor.post(partial(self.link.write, wire.encode(wire.DROP, number)))

    def _end_if_lost(self, actor: LocalActor | RemoteActor) -> None:
        """It may have been on its way when the node was lost, or before."""
        if self.lost is not None:
            self._engine.reactor.post(partial(actor.lose, self._how()))

    def _how(self) -> str:
        return f"was lost with its node {self.name} ({self.address}), which {self.lost}"

    def _take(self, frame: Frame) -> None:
        if frame.kind == wire.PING:
            return
        if frame.kind == wire.PUBLISH:
            self._engine.mirrors.take(frame, self.link)
        elif frame.kind == wire.READERS:
            found = {name: Staleness(*how) for name, how in json.loads(frame.text).items()}
            if (answer := self._asked.get(frame.call_id)) is not None:
                answer.settle(lambda: Ok(found))  # first: after an interrupt the frame comes again
                self._asked.pop(frame.call_id, None)
        elif frame.kind == wire.PRINTED:
            self._keep_lines(frame)
        elif isinstance(actor := self.actors.get(frame.call_id >> CALL_BITS), RemoteActor):
            actor.take(frame)

    def _keep_lines(self, frame: Frame) -> None:
        """Put what an actor has printed into its log, which is followed like that of an actor of this machine."""
        for actor in list(self.actors.values()):  # others are started meanwhile
            if isinstance(actor, RemoteActor) and actor.name == frame.text:
                actor.keep_lines(bytes(frame.open(None)[0]))

    def _note_silence(self, silent_s: float) -> None:
        logger.warning(
            "node %s (%s) has been silent for %.0f s; after %g s it counts as lost, with its actors",
            *(self.name, self.address, silent_s, self._engine.patience.dead_s),
        )


class RemoteActor(ProcessActor):
    """An actor on another machine."""

    def __init__(self, engine: ClusterEngine, node: Node, number: int, spec: ActorSpec, listener: Listener) -> None:
        first = number << CALL_BITS
        super().__init__(engine, spec, listener, node.link, first)
        self._cluster, self._node, self._number, self._first_call = engine, node, number, first
        self._channels: set[str] = set()  # those that it knows
        self._where = f" on {node.name}"
        self.name, self._log = spec.name, engine.logs.open(spec.name)
        engine.follow(spec.name)
        self.slot = spec.slot or engine.slot(spec.name)
        self.slot.update(pid=0, sent=0, elsewhere=True)

    def start(self, spec: ActorSpec, parcel: Parcel) -> None:
        """Send what it is made of."""
        if self._link.is_full:
            self._wait_for_room()
        self._reactor.set_deadline(self.ready, self._engine.system_timeout_s, self._on_no_start)
        self.ready.lead = self._link.lead
        self.slot.sent()
        names = [channel.name for channel in parcel.channels]
        asked = {"name": spec.name, "threads": spec.threads, "concurrency": spec.concurrency, "channels": names}
        places = self._node.lend(parcel)
        asked |= {"stall_after_s": spec.stall_after_s, **self._cluster.surroundings(spec)}
        with self._lock:
            self._note_channels(parcel.channels)
            self._link.write(wire.encode(wire.SPAWN, self._first_call, json.dumps(asked), parcel.message, places))

    def abandon(self, error: BaseException) -> None:
        """The spawn has failed: have the reactor clean up."""
        self._reactor.post(partial(self._give_up, f"could not be started ({error})"))

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """Have the node kill the process and return when it is gone."""
        if self.gone.done():
            return
        self._tell(wire.KILL, self._first_call, how)
        if not wait([self.gone], 1, timeout_s)[0]:
            raise CallTimeout(
                f"actor {self._name} (pid {self.pid} on {self._node.name}) is not gone {timeout_s:g} s after kill()."
            )

    def stop(self) -> bool:
        """Ask the process to end behind all that was sent to it; False if it has calls to answer or never started."""
        with self._lock:
            if self.pid is None or self._pending or self._end is not None:
                return False
            self._link.write(wire.encode(wire.STOP, self._first_call))
            return True

    def take(self, frame: Frame) -> None:
        """A frame has come from it, or of it."""
        self._take(frame)
        with self._lock:
            if self._end is None:  # else the slot is the next incarnation's
                self.slot.update(sent=len(self._pending))  # what is done is counted on the other machine

    def lose(self, how: str) -> None:
        """Its node is given up."""
        self.die(how)

    def keep_lines(self, lines: bytes) -> None:
        """It has printed these."""
        with contextlib.suppress(OSError):  # the disk is full, say: a run does not end for its log
            os.write(self._log, lines)

    def die(self, how: str) -> None:
        """It has ended, and nobody there can say more."""
        if not self.gone.done():
            tail = self._cluster.bury(0, self.name)
            with self._lock:
                method, waiting = self._current_method(), len(self._pending) - 1
            self._end_with(describe(self.name, self.pid, how, method, waiting, 0, tail, f" on {self._node.name}"))

    def _end_with(self, text: str) -> None:
        """Tell everybody. Perhaps in a caller's thread; where an interrupt cuts it short the reactor does it again."""
        try:
            if not self.gone.done():
                self._tell_end(text)
        except BaseException:
            self._reactor.post(partial(self._end_with, text))
            raise

    def _tell_end(self, text: str) -> None:
        log, self._log = self._log, -1
        if log >= 0:
            os.close(log)
        self._reactor.clear_deadline(self.ready)
        self._node.remove(self._number)
        died: Callable[[], Err] = lambda: Err(ActorDied(text))  # noqa: E731  a fresh error for each caller's traceback
        self._listener.exited(self._end or died)  # first: who hears of the death from a call may call again at once
        with self._lock:
            self._fail_all(died)
        self.gone.settle(nothing)

    def _take_news(self, kind: int, text: str, message: pickling.Message) -> None:
        if kind == wire.STARTED:
            self.pid = int(text)
            self._reactor.clear_deadline(self.ready)
        elif kind == wire.FULL:
            self._room = self._room or Future(self._name, "room")
        elif kind == wire.ROOM:
            self._make_room()
        elif kind == wire.STALLED:
            self._listener.stalled(Stall(**json.loads(text)))
        elif kind == wire.EXITED:
            if self._engine.closing:
                self.die("was closed with its runtime")
            elif not self.gone.done():
                self._cluster.bury(0, self.name)
                self._end_with(text)
        else:
            super()._take_news(kind, text, message)

    def _before_frame(self) -> None:
        self._engine.memory.arena.check_owner()
        self._cluster.mirrors.look()  # what was published before a call is there before it

    def _lend(self, parcel: Parcel) -> Sequence[Lent | None] | None:
        return self._node.lend(parcel)

    def _open(self, frame: Frame) -> pickling.Message:
        return frame.open(None)

    def _hand_over(self, channels: Sequence[Channel]) -> None:
        new = [channel for channel in channels if channel.name not in self._channels]
        for channel in new:
            self._link.write(wire.encode(wire.CHANNEL, self._first_call, channel.name))
        self._note_channels(new)

    def _note_channels(self, channels: Sequence[Channel]) -> None:
        for channel in channels:
            self._channels.add(channel.name)
            self._cluster.mirrors.add(channel.name, self._link)

    def _on_no_start(self) -> None:
        self._give_up(f"was not started within {self._engine.system_timeout_s:g} s")

    def _give_up(self, how: str) -> None:
        """Its node may have it all the same, or get it later."""
        self._tell(wire.KILL, self._first_call, how)
        self._reactor.post(partial(self.die, how))
