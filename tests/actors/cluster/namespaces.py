"""A cluster whose machines are really apart: network namespaces behind a router whose cables can be pulled.

The router is a namespace of its own, so nothing of this is seen in the machine's own network, and test processes that
run at once may use the same addresses. Whatever happens to a test, deleting the namespaces removes all.
"""

import collections
import contextlib
import ctypes
import fcntl
import functools
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class PoorCable:
    """A cable that delays what goes through it, and loses some; the kernel's own (netem) is not everywhere."""

    def __init__(self, ends, delay_s, loss=0.0):
        """ends: the descriptors of two TUN devices. loss: the share of packets."""
        self.loss, self._ends, self._delay_s = loss, ends, delay_s
        self._random, self._wake = random.Random(0), os.eventfd(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        """Cut it."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for fd in (*self._ends, self._wake):
            os.close(fd)

    def _run(self):
        here, there = self._ends
        under_way = collections.deque()
        while True:
            wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            ready = select.select([here, there, self._wake], [], [], wait_s)[0]
            if self._wake in ready:
                return
            for end in ready:
                packet = os.read(end, 65536)
                if self._random.random() >= self.loss:
                    under_way.append((time.monotonic() + self._delay_s, there if end == here else here, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, end, packet = under_way.popleft()
                with contextlib.suppress(OSError):  # it is pulled
                    os.write(end, packet)


class Network:
    """Machines by name, each at one address, 10.77.N.2, behind one router."""

    def __init__(self, *machines, delays_s=None):
        """delays_s: by machine, of a cable that delays packets, each way."""
        self._delays_s = delays_s or {}
        self.poor_cables = {}
        """By machine."""
        self._prefix = f"rlx-{os.getpid()}-{next(_numbers)}-"
        self._index = {name: number for number, name in enumerate(machines, 1)}
        try:
            _ip("netns", "add", self._prefix + "router")
            self._on_router("ip", "link", "set", "lo", "up")
            self._on_router("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            for name, number in self._index.items():
                self._add(name, number)
        except BaseException:
            self.close()
            raise

    def address(self, name):
        """Return the machine's IP address."""
        return f"10.77.{self._index[name]}.2"

    def command(self, name):
        """Return what to put before a command, to run it on the machine."""
        return ["ip", "netns", "exec", self._prefix + name]

    @contextlib.contextmanager
    def on(self, name):
        """Have this thread, and the threads that it starts within, open their sockets on the machine."""
        with open(f"/proc/self/task/{threading.get_native_id()}/ns/net") as home:
            with open(f"/run/netns/{self._prefix}{name}") as there:
                _enter(there)
            try:
                yield
            finally:
                _enter(home)

    def pull(self, name):
        """Pull the machine's cable, at the router's end."""
        self._on_router("ip", "link", "set", f"v{self._index[name]}", "down")

    def plug(self, name):
        """Put the cable back, and return when both ends have noticed, which takes the kernel up to a second."""
        self._on_router("ip", "link", "set", f"v{self._index[name]}", "up")
        ends = [(self._prefix + name, "eth0"), (self._prefix + "router", f"v{self._index[name]}")]
        while any("state UP" not in _run(["ip", "-n", where, "link", "show", device]) for where, device in ends):
            time.sleep(0.02)
        for where, device in ends:  # who did not answer meanwhile counts as unreachable for a while
            _ip("-n", where, "neigh", "flush", "dev", device)

    @contextlib.contextmanager
    def deaf(self, source, target):
        """Have the router drop what `source` sends to `target`; the other way stays open."""
        rule = ["from", self.address(source), "to", self.address(target), "blackhole"]
        self._on_router("ip", "rule", "add", *rule)
        try:
            yield
        finally:
            self._on_router("ip", "rule", "del", *rule)

    def close(self):
        """Remove all machines, and the cables with them."""
        for cable in self.poor_cables.values():
            cable.close()
        for name in [*self._index, "router"]:
            subprocess.run(["ip", "netns", "del", self._prefix + name], stderr=subprocess.DEVNULL, check=False)

    def _add(self, name, number):
        space, gateway = self._prefix + name, f"10.77.{number}.1"
        _ip("netns", "add", space)
        if name in self._delays_s:
            ends = [self._tun(name, "eth0"), self._tun("router", f"v{number}")]
            self.poor_cables[name] = PoorCable(ends, self._delays_s[name])
        else:
            _ip(*f"-n {space} link add eth0 type veth peer name v{number} netns {self._prefix}router".split())
        for where, device, address in (
            (space, "eth0", self.address(name)),
            (self._prefix + "router", f"v{number}", gateway),
        ):
            _ip("-n", where, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", where, "link", "set", device, "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "route", "add", "default", "via", gateway)

    def _tun(self, name, device):
        """Make a device whose packets this process carries; return its descriptor."""
        with self.on(name):
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
        return fd

    def _on_router(self, *command):
        _run(["ip", "netns", "exec", self._prefix + "router", *command])


@functools.cache
def why_not():
    """Return why this machine has no network namespaces for tests, None if it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        network = Network("probe")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine makes no network namespaces ({getattr(error, 'stderr', None) or error})"
    try:
        with network.on("probe"), network.deaf("probe", "probe"):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine has no policy routing ({getattr(error, 'stderr', None) or error})"
    finally:
        network.close()


def _ip(*arguments):
    _run(["ip", *arguments])


def _run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _enter(file):
    if _libc.setns(file.fileno(), CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")
