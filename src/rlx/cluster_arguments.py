"""What can be typed that concerns clusters of machines; rlx.cluster_commands does it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rlx import cluster_commands, kubernetes
from rlx.arguments import add_command, natural, positive

MAX_DAYS = 36500  # that certificates are made for
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,200}[A-Za-z0-9])?")
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


def add(group: Any) -> None:
    """Add the commands."""
    _add_certs(group)
    _add_start(group)
    _add_status_and_stop(group)
    _add_launch(group)
    _add_k8s(group)


def _add_certs(group: Any) -> None:
    certs = add_command(
        group,
        "certs",
        cluster_commands.certs,
        "Make the key file of a cluster, its token and certificates, which is copied to every machine. Whoever has it\n"
        "owns them all. With --renew its certificates are made anew, under the same token.",
        "rlx certs --out cluster.key",
    )
    certs.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the file, never overwritten without --renew (default: ~/.rlx/cluster.key)",
    )
    certs.add_argument("--days", metavar="N", type=_days, help="how long the certificates are good (default: 3650)")
    certs.add_argument("--renew", action="store_true", help="renew the certificates of FILE; copy it again afterwards")


def _add_start(group: Any) -> None:
    start = add_command(
        group,
        "start",
        cluster_commands.start,
        "Start rlx's daemon on this machine, in the background: as the head of a new cluster, or as a node that joins\n"
        "one. It returns when the daemon listens and has joined; `rlx stop` ends it.",
        "rlx start --head\n  rlx start --address 10.0.0.1:34567 --token-file cluster.key",
    )
    which = start.add_mutually_exclusive_group(required=True)
    which.add_argument("--head", action="store_true", help="begin a cluster; its key is made if there is none")
    which.add_argument("--address", metavar="HOST:PORT", type=_address, help="join the cluster of this head")
    _add_token_file(start)
    start.add_argument(
        "--host",
        metavar="H",
        help="address of this machine that others reach it at (default: of the head its default route's, of a node "
        "that of its connection to the head)",
    )
    start.add_argument("--port", metavar="P", type=_port, default=0, help="port; 0: any that is free (default)")
    start.add_argument("--name", metavar="N", type=_name, help="name in the cluster (default: this machine's)")
    start.add_argument("--cpu", metavar="N", type=positive, default=0, help="CPUs for actors (default: all)")
    start.add_argument("--gpu", metavar="N", type=positive, default=0, help="GPUs for actors (default: all)")
    start.add_argument("--memory", metavar="B", type=positive, default=0, help="bytes for actors (default: all)")
    start.add_argument("--label", metavar="K=V", type=_label, action="append", default=[], help="a label; repeatable")
    start.add_argument(
        "--apart",
        action="store_true",
        help="have this daemon start the actors of drivers on this machine, too, who else do so themselves",
    )
    start.add_argument("--nodes", metavar="N|A,B", type=_nodes, help="with --head: wait until exactly so many nodes")
    start.add_argument(
        "--timeout",
        metavar="S",
        type=positive,
        help="seconds to wait for --nodes (default: 300), or for a head that is still to start (default: 0)",
    )
    start.add_argument("--block", action="store_true", help="stay until the daemon ends, and show its log")


def _add_status_and_stop(group: Any) -> None:
    status = add_command(
        group,
        "status",
        cluster_commands.status,
        "Show the nodes of a cluster; without --address, your daemons on this machine.",
        "rlx status --address 10.0.0.1:34567",
    )
    what = status.add_mutually_exclusive_group()
    what.add_argument("--address", metavar="HOST:PORT", type=_address, help="of the cluster's head")
    what.add_argument("--head", action="store_true", help="print the address of the head on this machine, for scripts")
    _add_token_file(status)
    status.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    stop = add_command(
        group,
        "stop",
        cluster_commands.stop,
        "End a daemon of yours on this machine, with the actors behind it: NAME, or the only one.",
        "rlx stop --all",
    )
    which = stop.add_mutually_exclusive_group()
    which.add_argument("name", metavar="NAME", nargs="?", help="name of its node, or HOST:PORT (see `rlx status`)")
    which.add_argument("--all", action="store_true", help="all of them")
    stop.add_argument(
        "--timeout", metavar="S", type=positive, default=30, help="seconds until one is killed (default: 30)"
    )


def _add_launch(group: Any) -> None:
    launch = add_command(
        group,
        "launch",
        cluster_commands.launch,
        "Start a cluster: its head here, and a node on each host, by ssh or within an allocation of Slurm. The key\n"
        "goes to each over stdin. It returns when all have joined.",
        "rlx launch --hosts node1,node2,node3\n  rlx launch --slurm                       # in a script of sbatch",
    )
    where = launch.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", metavar="A,B", type=_hosts, help="hosts as ssh knows them; without passwords")
    where.add_argument("--slurm", action="store_true", help="the nodes of this job, by srun")
    _add_token_file(launch)
    launch.add_argument("--head-host", metavar="H", help="address of this machine that the hosts reach it at")
    launch.add_argument("--port", metavar="P", type=_port, default=0, help="port of the head; 0: any (default)")
    launch.add_argument("--python", metavar="PATH", help="Python with rlx on the hosts (default: the path of this one)")
    launch.add_argument(
        "--timeout", metavar="S", type=positive, default=120, help="seconds to wait for all (default: 120)"
    )
    launch.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")


def _add_k8s(group: Any) -> None:
    k8s = group.add_parser("k8s", help="run on Kubernetes", description="Run on Kubernetes.")
    actions = k8s.add_subparsers(required=True, metavar="ACTION")
    render = add_command(
        actions,
        "render",
        cluster_commands.k8s_render,
        "Print what a cluster of rlx is made of on Kubernetes, with its key: an Indexed Job, or a JobSet, a headless\n"
        "Service and a Secret. Pod 0 is the head and runs the command; when that has ended well, so has the job.\n"
        "With --rayjob: what KubeRay makes a cluster of Ray of, for commands with runtime.engine=ray.",
        "rlx k8s render --nodes 4 --image rlx:0.1 --gpu 8 --command 'rlx train big.yaml' | kubectl apply -f -",
    )
    render.add_argument("--nodes", metavar="N", type=positive, required=True, help="pods, the head among them")
    render.add_argument("--image", metavar="I", required=True, help="image with rlx")
    render.add_argument("--name", metavar="NAME", type=_dns_label, default="rlx", help="of the job (default: rlx)")
    render.add_argument("--cpu", metavar="N", type=positive, help="CPUs of each pod")
    render.add_argument("--gpu", metavar="G", type=positive, help="NVIDIA GPUs of each pod")
    render.add_argument("--memory", metavar="M", type=_quantity, help="memory of each pod, such as 64Gi")
    kind = render.add_mutually_exclusive_group()
    kind.add_argument("--jobset", action="store_true", help="a JobSet, which starts all pods again together")
    kind.add_argument("--rayjob", action="store_true", help="a RayJob of KubeRay, on a cluster of Ray")
    render.add_argument(
        "--ray-version",
        metavar="V",
        type=_version,
        help="with --rayjob: Ray's version in the image; from 2.52.0 on its cluster has a token (by KubeRay 1.5.1)",
    )
    render.add_argument("--queue", metavar="Q", help="a queue of Kueue")
    render.add_argument(
        "--command",
        metavar="COMMAND",
        dest="run",
        help=f"what pod 0 runs once all have joined, in a shell; the cluster is at ${kubernetes.ADDRESS} "
        "(default: nothing, so the cluster stays until it is deleted)",
    )
    render.add_argument("--port", metavar="P", type=_port, help=f"of the head (default: {kubernetes.PORT})")
    secret = render.add_mutually_exclusive_group()
    secret.add_argument("--secret", metavar="NAME", help="a Secret that exists, with the file cluster.key in it")
    _add_token_file(secret)


def add_cluster(parser: Any, name: str, there: Any) -> None:
    """Have a command that looks at actors do so on the machines of a cluster, where --address names it."""
    parser.add_argument(
        "--address", metavar="HOST:PORT", type=_address, help="of a cluster's head: look at the actors on its machines"
    )
    _add_token_file(parser)
    parser.set_defaults(name=name, there=there)


def _add_token_file(parser: Any) -> None:
    parser.add_argument("--token-file", metavar="F", type=Path, help="the cluster's key (default: ~/.rlx/cluster.key)")


def _days(text: str) -> int:
    if (days := positive(text)) > MAX_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_DAYS}")
    return days


def _port(text: str) -> int:
    if (port := natural(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return port


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*([kMGTPE]|[KMGTPE]i)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount for Kubernetes: bytes, or such as 500M, 64G, 64Gi")
    return text


def _version(text: str) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version, such as 2.60.0")
    return text


def _address(text: str) -> str:
    from rlx.actors.cluster.daemon import parse_address

    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a node: letters, digits, '.', '_', '-', 202 at most")
    return text


def _names(text: str, kind: Any) -> list[str]:
    names = [kind(name) for name in text.split(",")]
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice")
    return names


def _nodes(text: str) -> int | list[str]:
    return positive(text) if text.isdecimal() else _names(text, _name)


def _hosts(text: str) -> list[str]:
    def host(name: str) -> str:
        if not _HOST.fullmatch(name):
            raise argparse.ArgumentTypeError(f"{name!r} is no host: NAME or USER@NAME")
        return name

    return _names(text, host)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _dns_label(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for Kubernetes: a-z, 0-9 and '-', 42 at most")
    return text
