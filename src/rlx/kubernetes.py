"""`rlx k8s render`: a cluster of rlx as objects that Kubernetes knows by itself, or a JobSet; or a RayJob of KubeRay.

All pods of rlx's own run one script. Pod 0 is the head, the others join by its name in DNS, and whoever starts again
joins anew. A RayJob's pods are started by KubeRay's operator, and rlx is a program on its cluster of Ray.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

ADDRESS, TOKEN_FILE = "RLX_ADDRESS", "RLX_TOKEN_FILE"
"""Variables of the command's environment: HOST:PORT of the head, and the file of the key."""
PORT = 6380
"""Where heads listen when machines are to know it beforehand."""
KEY_FILE, KEY_FOLDER = "cluster.key", "/var/run/rlx"
KEY_MODE = 0o400
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PODS_TIMEOUT_S = 1800
"""Images are pulled meanwhile."""
MAX_RESTARTS = 3
REPLICATED_JOB = "nodes"
RAY_WITH_TOKENS = (2, 52, 0)
"""The first version of Ray that keeps out whoever does not have a cluster's token."""
RAY_TTL_S = 600
"""How long a cluster of Ray stays after its job's end, for whoever wants to read its logs."""
WARNING = "# This holds the cluster's key, and whoever has it owns the cluster: apply it, and do not keep it.\n"


def render(options: argparse.Namespace, key: str | None) -> str:
    """Return the objects as YAML; key: the text of the cluster's key, None where a Secret has it already."""
    objects: list[dict[str, Any]] = []
    if key is not None:
        objects.append(_object("v1", "Secret", _secret_name(options), type="Opaque", stringData={KEY_FILE: key}))
    if options.rayjob:
        objects.append(_ray_job(options))
    elif options.jobset:
        objects.append(_job_set(options))
    else:
        objects += [_service(options), _job(options)]
    return ("" if key is None else WARNING) + _yaml(objects)


def _job(options: argparse.Namespace) -> dict[str, Any]:
    spec = _job_spec(options, f"{options.name}-0.{options.name}", "OnFailure")
    spec["template"]["spec"]["subdomain"] = options.name
    return _object("batch/v1", "Job", options.name, labels=_queue(options), spec=spec | {"backoffLimit": MAX_RESTARTS})


def _service(options: argparse.Namespace) -> dict[str, Any]:
    """Return what gives pods their names in DNS, also before they are ready: the head listens when it does."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": options.name},
        "ports": [{"name": "rlx", "port": options.port}],
    }
    return _object("v1", "Service", options.name, spec=spec)


def _job_set(options: argparse.Namespace) -> dict[str, Any]:
    """Return a JobSet of one Job; its controller makes the headless Service."""
    host = f"{options.name}-{REPLICATED_JOB}-0-0.{options.name}"
    job = _job_spec(options, host, "Never") | {"backoffLimit": 0}  # any failure is the set's to answer
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": options.name, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": MAX_RESTARTS},
        "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": job}}],
    }
    return _object("jobset.x-k8s.io/v1alpha2", "JobSet", options.name, labels=_queue(options), spec=spec)


def _job_spec(options: argparse.Namespace, head: str, restart: str) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},  # the others stay until they are ended
        "template": {"spec": {"restartPolicy": restart, **_pod(options, f"{head}:{options.port}")}},
    }


def _pod(options: argparse.Namespace, address: str) -> dict[str, Any]:
    container = {
        "name": "rlx",
        "image": options.image,
        "command": ["sh", "-c"],
        "args": [_script(options)],
        "env": [
            {"name": ADDRESS, "value": address},
            {"name": TOKEN_FILE, "value": f"{KEY_FOLDER}/{KEY_FILE}"},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "ports": [{"name": "rlx", "containerPort": options.port}],
        "volumeMounts": [{"name": "key", "mountPath": KEY_FOLDER, "readOnly": True}],
    }
    secret = {"secretName": _secret_name(options), "defaultMode": KEY_MODE}
    return {"containers": [container | _resources(options)], "volumes": [{"name": "key", "secret": secret}]}


def _script(options: argparse.Namespace) -> str:
    """Return what the shell of every pod runs; the name of a node is its pod's."""
    common = f'--host "$POD_IP" --port {options.port} --token-file "${TOKEN_FILE}"'
    head = f"rlx start --head {common} --nodes {options.nodes} --timeout {PODS_TIMEOUT_S}"
    node = f'exec rlx start --address "${ADDRESS}" {common} --timeout {PODS_TIMEOUT_S} --block'
    first = (
        f"exec {head} --block" if options.run is None else f"{head} || exit\n  exec sh -c {shlex.quote(options.run)}"
    )
    return f'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then\n  {first}\nfi\n{node}\n'


def _ray_job(options: argparse.Namespace) -> dict[str, Any]:
    """Return a RayJob: KubeRay starts a cluster of Ray, and the pod of its head runs the command when all are there."""
    group = {"rayStartParams": {}, "template": {"spec": {"containers": [_ray_container(options)]}}}
    count = options.nodes - 1
    workers = {"groupName": "workers", "replicas": count, "minReplicas": count, "maxReplicas": count, **group}
    version: dict[str, Any] = {}
    if options.ray_version is not None:
        version["rayVersion"] = options.ray_version
        if tuple(map(int, options.ray_version.split("."))) >= RAY_WITH_TOKENS:
            version["authOptions"] = {"mode": "token"}
    spec = {
        "entrypoint": options.run,
        # The default has the command read by two shells: a pod's beside the cluster first, and then the head's.
        "submissionMode": "HTTPMode",
        "backoffLimit": MAX_RESTARTS,
        "shutdownAfterJobFinishes": True,  # Kueue takes no other
        "ttlSecondsAfterFinished": RAY_TTL_S,
        "rayClusterSpec": {
            **version,
            "headGroupSpec": group | {"rayStartParams": {"dashboard-host": "0.0.0.0"}},
            "workerGroupSpecs": [workers] if count else [],
        },
    }
    return _object("ray.io/v1", "RayJob", options.name, labels=_queue(options), spec=spec)


def _ray_container(options: argparse.Namespace) -> dict[str, Any]:
    """Return the container of a pod of Ray's, which KubeRay tells what to run, and Ray what its limits are."""
    return {"name": "ray", "image": options.image, **_resources(options)}


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    asked = {"cpu": options.cpu, "memory": options.memory, "nvidia.com/gpu": options.gpu}
    limits = {name: str(amount) for name, amount in asked.items() if amount is not None}
    return {"resources": {"limits": limits}} if limits else {}  # requests are as much where only limits are given


def _secret_name(options: argparse.Namespace) -> str:
    return options.secret or f"{options.name}-key"


def _queue(options: argparse.Namespace) -> dict[str, str]:
    return {QUEUE_LABEL: options.queue} if options.queue else {}


def _object(version: str, kind: str, name: str, labels: dict[str, str] | None = None, **rest: Any) -> dict[str, Any]:
    metadata = {"name": name} | ({"labels": labels} if labels else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


def _yaml(objects: list[dict[str, Any]]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as such."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, explicit_start=True, width=120)
