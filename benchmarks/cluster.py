"""rlx's cluster engine beside Ray, between two machines that are network namespaces of this one. Linux, as root.

    python benchmarks/cluster.py --rounds 3 --out docs

The driver and the head are on the first, the actors on the second. rlx's links have TLS; Ray's have none. Each round
starts both clusters anew, one after the other. A child process is the driver: this file with --drive.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import busy_cores, describe, machine, markdown_table, publish

HEAD, NODE = "10.78.0.1", "10.78.0.2"
RAY_PORT = 6379
WITHOUT_PROOF = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
ROWS = {
    "join_s": ("node's command to first answer of an actor there, s", "{:.2f}"),
    "call_us": ("call between machines, answer awaited, µs", "{:,.0f}"),
    "echo_ms": ("10 MiB there and back, ms", "{:.1f}"),
    "bulk_ms": ("100 MiB to an actor there, until it has read it, ms", "{:.0f}"),
    "weights_ms": ("25 MiB to 4 actors there, until all have read it, ms", "{:.0f}"),
    "death_ms": ("SIGKILL of a machine's processes to the error of a call, ms", "{:,.0f}"),
}
PATIENCE_S = 120.0


class Worker:
    """What both engines run; `weights` is what a channel or an object reference brings."""

    def nothing(self) -> None:
        """Answer."""

    def echo(self, data: np.ndarray) -> np.ndarray:
        """Return it."""
        return data

    def total(self, weights: Any) -> float:
        """Read all weights, an array or a channel of arrays."""
        array = weights.latest().value if hasattr(weights, "latest") else weights
        return float(array[::1024].sum())

    def wait(self) -> None:
        """Never answer."""
        time.sleep(PATIENCE_S)


def main() -> None:
    """Measure, and write the table."""
    options = _parse()
    if options.drive:
        print(json.dumps(DRIVERS[options.drive](json.loads(options.given))), flush=True)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("not measured: two machines on one take network namespaces, which need root and iproute2")
        return
    busy = busy_cores()
    rows: dict[str, list[dict[str, float]]] = {"rlx": [], "ray": []}
    for _ in range(options.rounds):
        for engine, found in rows.items():
            with two_machines() as prefix:
                found.append(CLUSTERS[engine](prefix))
            print(engine, found[-1], flush=True)
    table = []
    for key, (title, form) in ROWS.items():
        ours, rays = ([round_[key] for round_ in rows[engine]] for engine in rows)
        cells = [
            f"{form.format(statistics.median(of))} ({form.format(min(of))} to {form.format(max(of))})"
            for of in (ours, rays)
        ]
        table.append([title, *cells, f"{statistics.median(rays) / statistics.median(ours):.1f}x"])
    import ray

    facts, rates = machine(), link_rates(8 * options.rounds)
    text = (
        f"{markdown_table(['', 'rlx, with TLS', f'Ray {ray.__version__}', 'Ray / rlx'], table)}\n\n"
        f"Medians of {options.rounds} rounds, lowest and highest. Over TLS alone, frames of 64 MiB go from one process "
        f"into the memory of another at {statistics.median(rates):.2f} GB/s ({min(rates):.2f} to {max(rates):.2f}). "
        f"{describe(facts)} Others kept {busy:.2f} cores busy."
    )
    publish(options.out, "cluster", {"rows": rows, "link_gbs": rates, "machine": facts}, text)


def link_rates(frames: int, size: int = 64 * 2**20) -> list[float]:
    """Return how many GB a second a link carries, frame by frame, between two processes and without actors."""
    from rlx.actors.cluster.credentials import ClusterKey
    from rlx.actors.cluster.secure_socket import SecureSocket
    from rlx.actors.engines.wire import FrameReader, Outbox, encode

    def end(sock: socket.socket, tls: Any, is_server: bool) -> tuple[SecureSocket, Callable[[], object]]:
        secure, poll = SecureSocket(sock, tls, is_server), select.poll()
        poll.register(sock.fileno(), select.POLLIN if is_server else select.POLLOUT)
        while secure.negotiate():
            select.select([sock], [], [])
        return secure, poll.poll

    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        key, sender = ClusterKey.create(Path(folder) / "cluster.key"), os.fork()
        data = memoryview(np.ones(size, np.uint8))
        if sender == 0:
            secure, wait = end(socket.create_connection(listener.getsockname()), key.client_context(), False)
            outbox = Outbox(secure)  # type: ignore[arg-type]
            for _ in range(frames + 1):
                outbox.add(encode(0, message=(b"", [data])))
                while not outbox.flush():
                    wait()
            os._exit(0)
        secure, wait = end(listener.accept()[0], key.server_context(), True)
        reader, times = FrameReader(secure, allocate=lambda _: [(data, data)]), list[float]()  # type: ignore[arg-type]
        while len(times) <= frames:
            try:
                reader.read()
            except BlockingIOError:
                wait()
            if reader.frames:
                reader.frames.pop()
                times.append(time.perf_counter())
        os.waitpid(sender, 0)
    return [size / 1e9 / (after - before) for before, after in itertools.pairwise(times)]


@contextlib.contextmanager
def two_machines() -> Iterator[Callable[[int], list[str]]]:
    """Yield a function that returns what to put before a command, for machine 0 or 1."""
    names = [f"rlxbench{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "-n", names[0], "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", names[1])
        for name, address in zip(names, (HEAD, NODE), strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "v0")
            for device in ("lo", "v0"):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield lambda number: ["ip", "netns", "exec", names[number]]
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, found):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name])


def of_rlx(prefix: Callable[[int], list[str]]) -> dict[str, float]:
    """Start a head and a node, and measure."""
    from rlx.actors.cluster.credentials import ClusterKey

    with tempfile.TemporaryDirectory() as folder:
        key = ClusterKey.create(Path(folder) / "cluster.key")
        env = os.environ | {"RLX_HOME": folder}

        def start(number: int, **settings: Any) -> str:
            asked = json.dumps({"key": str(key.path), **settings})
            command = [*prefix(number), sys.executable, "-m", "rlx.actors.cluster.daemon", asked]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
            assert process.stdout is not None
            return json.loads(process.stdout.readline())["address"]

        head = start(0, name="head", host=HEAD, labels={"at": "head"})
        began = time.time()
        start(1, name="node", host=NODE, head=head)
        return _drive(prefix, "rlx", {"address": head, "key": str(key.path), "began": began})


def of_ray(prefix: Callable[[int], list[str]]) -> dict[str, float]:
    """The same with Ray."""
    ray = str(Path(sys.executable).with_name("ray"))
    temp = tempfile.mkdtemp(prefix="r")  # Ray's sockets are in it, whose paths are short
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    env = os.environ | WITHOUT_PROOF
    small = ["--num-cpus=4", "--object-store-memory=300000000", "--disable-usage-stats"]
    try:
        head = [*prefix(0), ray, "start", "--head", f"--node-ip-address={HEAD}", f"--port={RAY_PORT}", *small]
        subprocess.run([*head, "--include-dashboard=false", f"--temp-dir={temp}"], env=env, **quiet)
        began = time.time()
        node = [*prefix(1), ray, "start", f"--address={HEAD}:{RAY_PORT}", f"--node-ip-address={NODE}", *small]
        subprocess.run([*node, '--resources={"there": 100}'], env=env, **quiet)
        return _drive(prefix, "ray", {"address": f"{HEAD}:{RAY_PORT}", "began": began})
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _drive(prefix: Callable[[int], list[str]], engine: str, given: dict[str, Any]) -> dict[str, float]:
    command = [*prefix(0), sys.executable, __file__, "--drive", engine, "--given", json.dumps(given)]
    with tempfile.TemporaryDirectory() as elsewhere:  # so that no project is sent
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE_S, check=True, cwd=elsewhere
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def drive_rlx(given: dict[str, Any]) -> dict[str, float]:
    """Be the driver."""
    from rlx import actors
    from rlx.actors import Resources

    there = Resources(labels={"node": "node"})
    with actors.runtime("cluster", address=given["address"], token_file=given["key"], preload=("numpy",)) as rt:
        workers = [rt.spawn(Worker, resources=there) for _ in range(4)]
        workers[0].nothing.call().result(PATIENCE_S)
        join_s = time.time() - given["began"]
        for worker in workers:
            worker.ready(PATIENCE_S)
        found = _measure(
            lambda: workers[0].nothing.call().result(PATIENCE_S),
            lambda data: workers[0].echo.call(data).result(PATIENCE_S),
            lambda data: workers[0].total.call(data).result(PATIENCE_S),
        )
        channel = rt.channel("weights")

        def weights(array: np.ndarray) -> list[float]:
            channel.publish(array)
            return [future.result(PATIENCE_S) for future in [worker.total.call(channel) for worker in workers]]

        found |= _measure_weights(weights)
        call = workers[1].wait.call()
        workers[0].nothing.call().result(PATIENCE_S)
        killed = _kill_the_other_machine()
        assert call.exception(PATIENCE_S) is not None
        return found | {"join_s": join_s, "death_ms": (time.monotonic() - killed) * 1e3}


def drive_ray(given: dict[str, Any]) -> dict[str, float]:
    """Be the driver."""
    import ray

    ray.init(address=given["address"], _node_ip_address=HEAD, log_to_driver=False, logging_level="ERROR")
    remote = ray.remote(Worker)
    workers = [remote.options(num_cpus=0, resources={"there": 1}).remote() for _ in range(4)]
    ray.get(workers[0].nothing.remote())
    join_s = time.time() - given["began"]
    ray.get([worker.nothing.remote() for worker in workers])
    found = _measure(
        lambda: ray.get(workers[0].nothing.remote()),
        lambda data: ray.get(workers[0].echo.remote(data)),
        lambda data: ray.get(workers[0].total.remote(data)),
    )

    def weights(array: np.ndarray) -> list[float]:
        reference = ray.put(array)
        return ray.get([worker.total.remote(reference) for worker in workers])

    found |= _measure_weights(weights)
    call = workers[1].wait.remote()
    ray.get(workers[0].nothing.remote())
    killed = _kill_the_other_machine()
    try:
        ray.get(call, timeout=PATIENCE_S)
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError:
        return found | {"join_s": join_s, "death_ms": (time.monotonic() - killed) * 1e3}
    raise SystemExit("a call on a machine that is dead was answered")


def _measure(
    call: Callable[[], Any], echo: Callable[[np.ndarray], np.ndarray], total: Callable[[np.ndarray], float]
) -> dict[str, float]:
    for _ in range(100):
        call()
    began = time.perf_counter()
    for _ in range(1000):
        call()
    call_us = (time.perf_counter() - began) / 1000 * 1e6
    data = np.arange(10 * 2**20, dtype=np.uint8)
    times = []
    for number in range(8):
        data[0] = number
        began = time.perf_counter()
        back = echo(data)
        times.append(time.perf_counter() - began)
        assert back[0] == number and len(back) == len(data)
    echo_ms = statistics.median(times[3:]) * 1e3
    data, times = np.zeros(100 * 2**20, np.uint8), []
    for number in range(8):
        data[0] = number
        began = time.perf_counter()
        assert total(data) == number
        times.append(time.perf_counter() - began)
    return {"call_us": call_us, "echo_ms": echo_ms, "bulk_ms": statistics.median(times[3:]) * 1e3}


def _measure_weights(send: Callable[[np.ndarray], list[float]]) -> dict[str, float]:
    array, times = np.ones(25 * 2**18, np.float32), []
    for number in range(8):
        array[:] = number
        began = time.perf_counter()
        assert send(array) == [number * len(array) / 1024] * 4
        times.append(time.perf_counter() - began)
    return {"weights_ms": statistics.median(times[3:]) * 1e3}


def _kill_the_other_machine() -> float:
    """Kill all of its processes; return when, on the monotonic clock."""
    own = subprocess.run(["ip", "netns", "identify", str(os.getpid())], capture_output=True, text=True).stdout.strip()
    other = own[:-1] + "1"
    pids = list(map(int, subprocess.run(["ip", "netns", "pids", other], capture_output=True, text=True).stdout.split()))
    killed = time.monotonic()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return killed


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of benchmarks.md and benchmarks.json")
    parser.add_argument("--drive", choices=list(DRIVERS), help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)
    return parser.parse_args()


CLUSTERS = {"rlx": of_rlx, "ray": of_ray}
DRIVERS = {"rlx": drive_rlx, "ray": drive_ray}

if __name__ == "__main__":
    main()
