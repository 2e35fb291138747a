"""`rlx launch`: a head on this machine, and a node on each of others, which ssh or srun starts.

The key goes to them over stdin, and lies in a file of mode 0600 from its first byte on; no command line holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rlx.cluster_commands import print_complete
from rlx.errors import ActorError, ConfigError

if TYPE_CHECKING:
    from rlx.actors.cluster.credentials import ClusterKey

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
"""Nobody is there to type a password."""
UNKNOWN_ADDRESS = "HEAD:PORT"
LAST_LINES_BYTES = 4096
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Starter:
    """A command that starts nodes elsewhere, with the key as its stdin."""

    command: tuple[str, ...]
    nodes: tuple[str, ...]
    """Names of the nodes that it starts."""
    stays: bool = False
    """Whether it runs for as long as they do."""


def launch(options: argparse.Namespace, key: ClusterKey | None) -> None:
    """Start the cluster; key: None prints the commands only. ActorError names the nodes that have not joined."""
    python = options.python or sys.executable
    name, others = _allocation(os.environ) if options.slurm else (socket.gethostname(), options.hosts)

    def starters(address: str, fingerprint: str) -> list[Starter]:
        if options.slurm:
            return [by_srun(others, python, address, fingerprint)] if others else []
        return [by_ssh(host, python, address, fingerprint) for host in others]

    if key is None:
        from rlx.actors.cluster.credentials import DEFAULT_PATH

        path = (options.token_file or DEFAULT_PATH).expanduser()
        for starter in starters(UNKNOWN_ADDRESS, "KEY"):
            print(f"{shlex.join(starter.command)} < {shlex.quote(str(path))}")
        return
    expected = [name, *(name_of(host) for host in others)]
    if len(set(expected)) < len(expected):
        raise ConfigError(f"--hosts names {name}, which is this machine: the head starts its node, leave it out.")
    program = "srun" if options.slurm else "ssh"
    if shutil.which(program) is None:
        raise ConfigError(f"there is no {program} on this machine's PATH, and it is what starts the other nodes.")
    address = _start_head(options, name, key)
    _start_others(starters(address, _fingerprint(key)), key, address, expected, options.timeout)


def by_ssh(host: str, python: str, address: str, fingerprint: str) -> Starter:
    """Return what starts a node on a host, and returns once it has joined."""
    name = name_of(host)
    remote = shlex.join(["sh", "-c", _script(python, address, fingerprint, shlex.quote(name))])
    return Starter((*SSH, host, remote), (name,))


def by_srun(nodes: Sequence[str], python: str, address: str, fingerprint: str) -> Starter:
    """Return what starts the other nodes of a job, and stays for as long as they: Slurm ends what a step leaves behind.

    srun sends its stdin to all of its tasks.
    """
    count = str(len(nodes))
    # The tasks of this step are no ranks of one program: each has its whole machine, and outlives the others.
    each = ("--overlap", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0")
    where = ("--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--nodelist", ",".join(nodes))
    script = _script(python, address, fingerprint, '"$SLURMD_NODENAME"', "--block")
    return Starter(("srun", *each, *where, "sh", "-c", script), tuple(nodes), stays=True)


def name_of(host: str) -> str:
    """Return the name of the node on USER@HOST."""
    return host.rpartition("@")[2]


def _script(python: str, address: str, fingerprint: str, name: str, *more: str) -> str:
    """Return what a shell does on another machine; name: as the shell is to read it."""
    start = [python, "-m", "rlx.cli", "start", "--address", address, *more]
    return (
        'umask 077; d="${RLX_HOME:-$HOME/.rlx}"; '
        'mkdir -p "$d" && t=$(mktemp "$d/.key-XXXXXX") && cat > "$t" && '
        f'k="$d/cluster-{fingerprint}.key" && mv "$t" "$k" && '
        f'exec {shlex.join(start)} --token-file "$k" --name {name} < /dev/null'
    )


def _allocation(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the name of this node, and the others of the job of Slurm that this process belongs to."""
    listed = environment.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ConfigError(
            "--slurm needs an allocation (SLURM_JOB_NODELIST is not set): run it by sbatch, or in salloc."
        )
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ActorError(f"`scontrol show hostnames {listed}` has failed: {error}.") from None
    names = shown.stdout.split()
    host = socket.gethostname()
    own = environment.get("SLURMD_NODENAME") or (short if (short := host.partition(".")[0]) in names else host)
    return own, [name for name in names if name != own]


def _start_head(options: argparse.Namespace, name: str, key: ClusterKey) -> str:
    from rlx.actors.cluster import background, notes
    from rlx.actors.cluster.daemon import Options

    log = str(notes.folder() / f"{name}.log")
    process, address = background.start(
        Options(name, str(key.path.absolute()), options.head_host, options.port, log=log)
    )
    print(f"{name}: head of a new cluster, at {address} (pid {process.pid}); log: {log}", flush=True)
    return address


def _start_others(
    starters: Sequence[Starter], key: ClusterKey, address: str, expected: Sequence[str], timeout_s: float
) -> None:
    from rlx.actors.cluster import notes, roll_call

    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_running(starter, key, notes.folder())) for starter in starters]
        in_vain = lambda: not any(one.is_busy() for one in running) and any(one.has_failed() for one in running)  # noqa: E731
        try:
            nodes = roll_call.wait_for(address, key, expected, timeout_s, given_up=in_vain)
        except ActorError as error:
            reasons = "".join(f"; {one.how()}" for one in running if one.is_busy() or one.has_failed())
            raise ActorError(f"{error}{reasons}; what has joined goes on until `rlx stop` on its machine.") from None
    print_complete(nodes)


@dataclass
class _Running:
    """A starter at work."""

    starter: Starter
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def is_busy(self) -> bool:
        """Whether more nodes may come of it."""
        return self.process.poll() is None

    def has_failed(self) -> bool:
        return not self.is_busy() and (self.starter.stays or self.process.returncode != 0)

    def how(self) -> str:
        """Return how it stands, and what it said last."""
        # Read at a place of its own: the end of the file, where the other process writes on, is shared with it.
        start = max(0, os.fstat(self.output.fileno()).st_size - LAST_LINES_BYTES)
        lines = os.pread(self.output.fileno(), LAST_LINES_BYTES, start).decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        state = "has not returned" if self.is_busy() else f"ended with exit code {self.process.returncode}"
        return f"{', '.join(self.starter.nodes)}: {self.starter.command[0]} {state}: {said}"


@contextlib.contextmanager
def _running(starter: Starter, key: ClusterKey, folder: Path) -> Iterator[_Running]:
    """Start it; in the end it has ended, unless it stays with the nodes."""
    from rlx.actors.cluster import background

    with open(folder / "srun.log", "w+b") if starter.stays else tempfile.TemporaryFile() as output:
        with open(key.path, "rb") as file:
            process = subprocess.Popen(
                starter.command, stdin=file, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield _Running(starter, process, output)
        except BaseException:
            process.terminate()
            _await_end(process)
            raise
        if starter.stays:
            background.let_go(process)
        else:
            _await_end(process)


def _await_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has returned; it is ended when it does not."""
    for end in (process.terminate, process.kill):
        try:
            process.wait(END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            end()
    process.wait()


def _fingerprint(key: ClusterKey) -> str:
    """Return a name for the key that says nothing about it."""
    return hashlib.sha256(key.certificate.encode()).hexdigest()[:12]
