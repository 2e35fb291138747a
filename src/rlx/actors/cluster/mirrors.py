"""Channels on many machines: a version crosses to a node once, and is shared there by all its actors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable

from rlx.actors.channel import FOR_OTHERS, Channel, Staleness
from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.pickling import Message
from rlx.actors.engines.reactor import Reactor
from rlx.actors.engines.wire import Frame

LOOK_EVERY_S = 0.002  # at one number a channel


class MirroredChannel(Channel):
    """A channel that other machines have as well."""

    readers_elsewhere: Callable[[str], dict[str, Staleness]] | None = None

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is, on every machine, by its name."""
        readers = super().readers()
        readers.pop(FOR_OTHERS, None)
        return readers | (self.readers_elsewhere(self.name) if self.readers_elsewhere is not None else {})


class Mirrors:
    """The channels of this machine that others have as well.

    Who publishes does so on its own machine's channel; from there the newest version goes to all others. It is sent
    before anything that was said after it: a call, or the answer of the actor that has published it.
    """

    def __init__(self, reactor: Reactor, channel: Callable[[str], Channel]) -> None:
        """channel: returns this machine's channel of a name."""
        self._reactor, self._channel = reactor, channel
        self._lock = threading.Lock()  # of the order of versions on a link, too
        self._links: dict[str, list[Link]] = {}
        self._seen: dict[str, int] = {}  # how many versions the others know of

    def add(self, name: str, link: Link) -> None:
        """Have the machine behind the link hear of versions, beginning with the newest."""
        with self._lock:
            self._look_at(name)
            if self._note(name, link):
                newest = self._channel(name).latest_message()
                if newest is not None:
                    self._send(name, *newest, [link])

    def remove(self, link: Link) -> None:
        """The machine is gone."""
        with self._lock:
            for links in self._links.values():
                if link in links:
                    links.remove(link)

    def look(self) -> None:
        """Send what has been published since the last look."""
        if self._links:
            with self._lock:
                for name in self._links:
                    self._look_at(name)

    def take(self, frame: Frame, source: Link) -> None:
        """Publish here, and to the others, what was published behind `source`."""
        label = json.loads(frame.text)
        name, message = label["channel"], frame.open(None)
        channel = self._channel(name)
        with self._lock:
            self._note(name, source)
            self._look_at(name)
            channel.publish_message(message, label["version"])
            self._seen[name] = channel.count
            others = [link for link in self._links[name] if link is not source]
            self._send(name, label["version"], message, others)

    def _note(self, name: str, link: Link) -> bool:
        """Note that the machine behind the link has this channel; False if that is known."""
        if not self._links:
            self._reactor.post(self._look_around)
        links = self._links.setdefault(name, [])
        if link in links:
            return False
        links.append(link)
        return True

    def _look_around(self) -> None:
        self._reactor.set_deadline(self, LOOK_EVERY_S, self._look_around)
        self.look()

    def _look_at(self, name: str) -> None:
        channel = self._channel(name)
        count = channel.count
        if count == self._seen.get(name, 0):
            return
        newest = channel.latest_message()
        self._seen[name] = count  # as read before: a version that came in between is looked at once more
        if newest is not None:
            self._send(name, *newest, self._links.get(name, ()))

    def _send(self, name: str, version: int, message: Message, links: Iterable[Link]) -> None:
        text = json.dumps({"channel": name, "version": version})
        for link in links:
            link.write(wire.encode(wire.PUBLISH, 0, text, message))
