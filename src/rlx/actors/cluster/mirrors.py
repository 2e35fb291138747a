"""Channels on many machines: a version crosses to a node once, and is shared there by all its actors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from rlx.actors.channel import FOR_OTHERS, Channel, Staleness
from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.reactor import Reactor
from rlx.actors.engines.wire import Frame
from rlx.actors.monitor import logger
from rlx.errors import ActorError, ObjectMemoryFull

LOOK_EVERY_S = 0.002  # at one number a channel


class MirroredChannel(Channel):
    """A channel that other machines have as well."""

    readers_elsewhere: Callable[[str], dict[str, Staleness]]
    """Of a channel's name, how far behind the readers on other machines are."""

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is, on every machine, by its name."""
        readers = super().readers()
        readers.pop(FOR_OTHERS, None)
        return readers | self.readers_elsewhere(self.name)


class Mirrors:
    """The channels of this machine that others have as well.

    Who publishes does so on its own machine's channel; from there the newest version goes to all others. It is sent
    before anything that was said after it: a call, or the answer of the actor that has published it.
    """

    def __init__(self, reactor: Reactor, channel: Callable[[str], Channel]) -> None:
        """channel: returns this machine's channel of a name."""
        self._reactor, self._channel = reactor, channel
        self._lock = threading.Lock()  # of the order of versions on a link, too
        self._links: dict[str, dict[Link, int]] = {}  # by channel: how many versions the machine behind it knows of
        self._late: dict[str, tuple[int, Frame, Link]] = {}  # the newest version that there is no room for, its source
        self._refused: set[str] = set()  # channels that another process of this machine publishes on, as was said

    def add(self, name: str, link: Link) -> None:
        """Have the machine behind the link hear of versions, beginning with the newest."""
        with self._lock:
            if self._note(name, link):
                self._look_at(name)

    def remove(self, link: Link) -> None:
        """The machine is gone."""
        with self._lock:
            for links in self._links.values():
                links.pop(link, None)

    def look(self) -> None:
        """Send what has been published since the last look."""
        if self._links:
            with self._lock:
                for name in self._links:
                    self._look_at(name)

    def take(self, frame: Frame, source: Link) -> None:
        """Publish here, and to the others, what was published behind `source`."""
        said = json.loads(frame.text)
        name = said["channel"]
        with self._lock:
            self._note(name, source)
            self._look_at(name)
            self._publish(name, said["version"], frame, source)

    def _publish(self, name: str, version: int, frame: Frame, source: Link) -> None:
        """Publish here, or try again later: this may be the thread that serves all, which never waits for readers."""
        channel = self._channel(name)
        was_late = self._late.pop(name, None)
        try:
            channel.publish_message(frame.open(None), version, wait_s=0.0)
        except ObjectMemoryFull as error:
            self._late[name] = version, frame, source
            if not was_late:
                logger.warning("readers of channel %r have to wait for its newest version: %s", name, error)
        except ActorError as error:
            if name not in self._refused:
                self._refused.add(name)
                logger.error("what another machine publishes on channel %r is not heard here: %s", name, error)
        else:
            if source in self._links[name]:
                self._links[name][source] = channel.count
            self._look_at(name)

    def _note(self, name: str, link: Link) -> bool:
        """Note that the machine behind the link has this channel; False if that is known."""
        if not self._links:
            self._reactor.post(self._look_around)
        links = self._links.setdefault(name, {})
        if link in links:
            return False
        links[link] = 0
        return True

    def _look_around(self) -> None:
        self._reactor.set_deadline(self, LOOK_EVERY_S, self._look_around)
        with self._lock:
            for name, late in list(self._late.items()):
                self._publish(name, *late)
            for name in self._links:
                self._look_at(name, in_a_hurry=False)

    def _look_at(self, name: str, in_a_hurry: bool = True) -> None:
        """Send the newest version to whom it is new. Without hurry a link that is busy gets it, or a newer one, later.

        So versions do not pile up where they are published faster than a link takes them.
        """
        channel = self._channel(name)
        count, links = channel.count, self._links[name]
        behind = [link for link, known in links.items() if known != count and (in_a_hurry or not link.is_backlogged)]
        newest = channel.latest_message() if behind else None
        if newest is None:
            return
        version, message = newest
        parts = wire.encode(wire.PUBLISH, 0, json.dumps({"channel": name, "version": version}), message)
        for link in behind:
            links[link] = count  # as read before: a version that came in between is looked at once more
            link.write(parts)
