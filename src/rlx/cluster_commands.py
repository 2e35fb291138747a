"""What the commands print and do that concern clusters of machines. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.errors import ActorError, ConfigError
from rlx.inspection import columns

if TYPE_CHECKING:
    from rlx.actors.cluster.credentials import ClusterKey
    from rlx.actors.cluster.daemon import Options
    from rlx.actors.cluster.membership import NodeInfo
    from rlx.actors.cluster.notes import Note

NODES_TIMEOUT_S = 300
END_TIMEOUT_S = 30.0
KILLED_TIMEOUT_S = 10.0


def certs(options: argparse.Namespace) -> None:
    """Make a cluster's key, or renew its certificates."""
    from rlx.actors.cluster.credentials import DEFAULT_PATH, VALID_DAYS, ClusterKey

    path, days = options.out or DEFAULT_PATH, options.days or VALID_DAYS
    if options.renew:
        key = ClusterKey.renew(path, days)
        print(f"renewed the certificates in {key.path} for {days} days: copy it to every machine")
    else:
        key = ClusterKey.create(path, days)
        print(f"made {key.path}, whose certificates are good for {days} days; whoever has it owns the cluster")


def start(options: argparse.Namespace) -> int:
    """Start a daemon, as the head or as a node."""
    from rlx.actors.cluster import background, notes, roll_call

    if options.nodes is not None and not options.head:
        raise ConfigError("--nodes goes with --head, which is told who has joined; `rlx status --address` shows them.")
    if options.timeout is not None and options.head and options.nodes is None:
        raise ConfigError("--timeout with --head is how long to wait for --nodes: say how many, or which.")
    key = load_key(options.token_file, may_create=options.head)
    daemon = _daemon_options(options, key)
    if isinstance(options.nodes, list) and daemon.name not in options.nodes:
        raise ConfigError(
            f"--nodes lists {', '.join(options.nodes)} and not the head's own node {daemon.name}, which counts: add "
            "it, or give this one another --name."
        )
    if options.head and (others := _heads(notes.find())):
        print(f"rlx: a cluster of its own, beside that of {_named(others)} on this machine", file=sys.stderr)
    with _interruptible(options.block):
        process, address = background.start(daemon, attached=options.block)
        with _ended_with_us(process) if options.block else contextlib.nullcontext():
            _print_started(daemon, process.pid, address, options.block)
            if options.nodes is not None:
                rest = "ends" if options.block else f"goes on: `rlx stop {daemon.name}` ends it"
                try:
                    nodes = roll_call.wait_for(address, key, options.nodes, options.timeout or NODES_TIMEOUT_S)
                except ActorError as error:
                    raise ActorError(f"{error}; the head {rest}.") from None
                except KeyboardInterrupt:
                    print(f"rlx: nobody waits for nodes any more; the head {rest}", file=sys.stderr)
                    raise
                print_complete(nodes)
            if options.block:
                _stay(daemon, process)
    return 0


def status(options: argparse.Namespace) -> None:
    """Print the nodes of a cluster, or the daemons of this user on this machine."""
    from rlx.actors.cluster import notes, roll_call

    if options.address is None and options.token_file is not None:
        raise ConfigError("--token-file is the key of the cluster at --address: give both, or neither.")
    if options.head and options.json:
        raise ConfigError("--head prints one address for scripts, and no JSON: leave --json out.")
    if options.head:
        print(_only_head(notes.find()).address)
        return
    if options.address is None:
        found: Sequence[Note] | Sequence[NodeInfo] = notes.find()
        text = _table_of_daemons(found) if found else "No daemon of yours runs on this machine: `rlx start` starts one."
    else:
        found = roll_call.present(options.address, load_key(options.token_file))
        text = _table_of_nodes(found)
    print(json.dumps([dataclasses.asdict(one) for one in found], indent=2) if options.json else text)


def stop(options: argparse.Namespace) -> None:
    """End daemons of this user on this machine."""
    from rlx.actors.cluster import background, notes

    running = notes.find()
    chosen = [note for note in running if options.name in (None, note.name, note.address)]
    names = _named(running) or "none"
    if options.name is not None and not chosen:
        raise ConfigError(f"no daemon of yours on this machine is {options.name}; these run: {names}.")
    if len(chosen) > 1 and not options.all:
        raise ConfigError(f"which of your {len(chosen)} daemons? {names}: give a NAME or HOST:PORT, or --all.")
    killed = background.stop(chosen, options.timeout)
    for note in chosen:
        how = f"killed, as it had not ended {options.timeout} s after SIGTERM" if note in killed else "ended"
        print(f"{note.name} ({note.address}, pid {note.pid}): {how}")
    if not chosen:
        print("No daemon of yours runs on this machine.")


def launch(options: argparse.Namespace) -> None:
    """Start a head here, and nodes on other machines."""
    from rlx import cluster_launch

    key = None if options.dry_run else load_key(options.token_file, may_create=True)
    cluster_launch.launch(options, key)


def k8s_render(options: argparse.Namespace) -> None:
    """Print the objects of Kubernetes."""
    from rlx import kubernetes

    if options.rayjob:
        _check_ray_job(options)
    elif options.ray_version is not None:
        raise ConfigError("--ray-version is of the cluster that a RayJob has: give --rayjob, or leave it out.")
    if options.port == 0:
        raise ConfigError("--port 0 is no address that others can know beforehand: give one above 0.")
    options.port = options.port or kubernetes.PORT
    key = None if options.secret or options.rayjob else load_key(options.token_file, may_create=True)
    print(kubernetes.render(options, None if key is None else key.path.read_text()), end="")


def _check_ray_job(options: argparse.Namespace) -> None:
    given = {"--port": options.port, "--secret": options.secret, "--token-file": options.token_file}
    if alien := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{' and '.join(alien)}: a RayJob has Ray's ports, and no key of rlx; leave it out.")
    if options.run is None:
        raise ConfigError(
            "--rayjob needs what the head is to run, such as --command 'rlx train big.yaml --set runtime.engine=ray "
            "--set runtime.address=auto'."
        )


def load_key(path: Path | None, *, may_create: bool = False) -> ClusterKey:
    """Return the cluster's key; where there is none it is made, if it may."""
    from rlx.actors.cluster.credentials import DEFAULT_PATH, ClusterKey

    path = (path or DEFAULT_PATH).expanduser()
    if may_create and not path.exists():
        key = ClusterKey.create(path)
        print(f"made {key.path}; whoever has it owns the cluster", file=sys.stderr)
        return key
    return ClusterKey.load(path)


def print_complete(nodes: Sequence[NodeInfo]) -> None:
    """Say who is there."""
    print(f"{len(nodes)} nodes are there: {', '.join(node.name for node in nodes)}", flush=True)


def join_command(address: str, key: Path) -> list[str]:
    """Return what is typed on another machine to join."""
    return ["rlx", "start", "--address", address, "--token-file", str(key)]


def _heads(running: Sequence[Note]) -> list[Note]:
    return [note for note in running if note.head is None]


def _named(daemons: Sequence[Note]) -> str:
    return ", ".join(f"{note.name} ({note.address})" for note in daemons)


def _only_head(running: Sequence[Note]) -> Note:
    heads = _heads(running)
    if len(heads) != 1:
        found = _named(heads) or "none"
        raise ConfigError(f"--head needs one head of yours on this machine, and there are: {found}.")
    return heads[0]


def _daemon_options(options: argparse.Namespace, key: ClusterKey) -> Options:
    from rlx.actors.cluster import notes
    from rlx.actors.cluster.daemon import Options

    name = options.name or socket.gethostname()
    return Options(
        *(name, str(key.path.absolute()), options.host, options.port, options.address),
        *(options.cpu, options.gpu, options.memory, dict(options.label), options.apart),
        wait_for_head_s=0.0 if options.head else float(options.timeout or 0),
        log="" if options.block else str(notes.folder() / f"{name}.log"),
    )


def _print_started(daemon: Options, pid: int, address: str, block: bool) -> None:
    from rlx.actors.cluster.daemon import parse_address

    what = "head of a new cluster" if daemon.head is None else f"joined the cluster of {daemon.head}"
    print(f"{daemon.name}: {what}, at {address} (pid {pid})")
    if not block:
        print(f"log: {daemon.log}")
    if daemon.head is None:
        print(f"key: {daemon.key}")
        if parse_address(address)[0] in ("127.0.0.1", "::1"):
            print("other machines cannot reach this address: give --host to have them join, too")
        print("on other machines, once the key is there, type:")
        print(f"  {shlex.join(join_command(address, Path(daemon.key)))}")
    sys.stdout.flush()


def _stay(daemon: Options, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # it ends as it should
        if code := process.wait():
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise ActorError(f"the daemon {daemon.name} (pid {process.pid}) has ended {how}; its log is above.")


@contextlib.contextmanager
def _interruptible(wanted: bool) -> Iterator[None]:
    """Have the signals that end a process do what Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if wanted else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the daemon in the end, if it has not ended before."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(KILLED_TIMEOUT_S)


def _table_of_nodes(nodes: Sequence[Any]) -> str:
    rows = [
        (
            *(node.name, node.address, f"{node.cpu:g}", str(node.gpu), f"{node.memory / 2**30:.1f} GiB"),
            *(f"{node.silent_s:.0f} s" if node.silent_s >= 1 else "-", _labels(node.labels)),
        )
        for node in nodes
    ]
    names = ("node", "address", "CPUs", "GPUs", "memory", "silent", "labels")
    return columns(names, rows, left=("node", "address", "labels"))


def _table_of_daemons(found: Sequence[Any]) -> str:
    rows = [
        (note.name, note.address, f"of {note.head}" if note.head else "head", str(note.pid), note.key, note.log or "-")
        for note in found
    ]
    names = ("node", "address", "role", "pid", "key", "log")
    return columns(names, rows, left=("node", "address", "role", "key", "log"))


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items()) or "-"
