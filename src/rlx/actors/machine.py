"""What this machine lends to this process: CPUs, memory and GPUs, also inside a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
NAMESPACES = ("mnt", "net", "pid")
LOOPBACK = "127.0.0.1"
NODE = "RLX_NODE"
"""The environment variable that tells an actor of a cluster which of its machines this is: NAME@HOST."""


class Node(NamedTuple):
    """A machine, as the others of its cluster know it."""

    name: str
    host: str
    """Its IP address, at which the others reach it."""

    def __str__(self) -> str:
        return f"{self.name} ({self.host})"

    def environment(self) -> dict[str, str]:
        """Return the variable by which actors here know."""
        return {NODE: f"{self.name}@{self.host}"}


def node() -> Node:
    """Return the machine that this process is on; with loopback as its address where it is of no cluster."""
    name, _, host = os.environ.get(NODE, "").rpartition("@")
    return Node(name, host) if host else Node("here", LOOPBACK)


def cpu_count() -> float:
    """Return how many CPUs this process may use: a quota may be less than one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [int(quota) / int(period) for quota, period in _cpu_quotas() if quota not in ("max", "-1")]
    return min([float(count), *quotas])


def identity() -> str:
    """Return what processes have in common that may share memory, process ids and files: machine, namespaces, user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, str(os.getuid()), *(os.readlink(f"/proc/thread-self/ns/{kind}") for kind in NAMESPACES)])


def memory_bytes() -> int:
    """Return how much memory this process may use: that of the machine, or the limit of its cgroup."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_cgroup_values("memory", "memory.limit_in_bytes"), *_cgroup_values("", "memory.max")]
    return min([total, *(int(limit) for limit in limits if limit != "max")])


def gpus() -> tuple[list[str], str]:
    """Return the GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; and if none, why."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # the package, the library or the driver: all mean that there is no GPU to be had
        return [], f"NVML finds no NVIDIA driver: {error}"
    try:
        count = pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()
    visible = visible_gpus()
    if visible is None:
        return [str(index) for index in range(count)], "this machine has no NVIDIA GPU"
    usable = []
    for name in visible:
        if name.lstrip("-").isdigit() and not 0 <= int(name) < count:
            break  # as CUDA reads it: what follows an invalid device is invisible
        usable.append(name)
    return usable, f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides them"


def visible_gpus() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES lists, None if it is not set."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]


def _cpu_quotas() -> Iterator[tuple[str, str]]:
    for line in _cgroup_values("", "cpu.max"):
        quota, period = line.split()
        yield quota, period
    yield from zip(_cgroup_values("cpu", "cpu.cfs_quota_us"), _cgroup_values("cpu", "cpu.cfs_period_us"), strict=False)


def _cgroup_values(controller: str, file: str) -> Iterator[str]:
    """Yield the file's content in this process's cgroup and in all above it; version 2 has the controller ""."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / file).is_file():
                yield (folder / file).read_text().strip()
