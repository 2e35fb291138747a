"""rlx k8s render: what Kubernetes requires of each object, names that belong together, and the pods' script at work."""

import copy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlx import cli
from tests.kubernetes_api import faults

pytestmark = pytest.mark.timeout(90)
T = 60.0
SHIPPED = Path(__file__).parents[1] / "docs" / "rayjob.yaml"
TRAIN = "rlx train ppo --set runtime.engine=ray --set runtime.address=auto"


def rendered(capsys, *words):
    assert cli.main(["k8s", "render", "--nodes", "3", "--image", "rlx:0.1", *words]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [fault for one in found for fault in faults(one)] == []
    return {one["kind"]: one for one in found}


def check_job(spec, head):
    """Check what batch/v1 requires of a JobSpec and its PodSpec, and what pods are told; return the container."""
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 3
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # a Job knows no other
    (container,) = pod["containers"]
    assert container["image"] == "rlx:0.1" and container["name"]
    env = {one["name"]: one for one in container["env"]}
    assert env["RLX_ADDRESS"]["value"] == f"{head}:6380"
    assert env["POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"] and volume["secret"]["defaultMode"] & 0o077 == 0
    assert env["RLX_TOKEN_FILE"]["value"] == f"{mount['mountPath']}/cluster.key"
    assert all(isinstance(one.get("value", ""), str) for one in container["env"])  # Kubernetes takes no numbers
    (script,) = container["args"]
    assert subprocess.run(["sh", "-n", "-c", script], timeout=T).returncode == 0
    for line in script.replace("|| exit", "").splitlines():  # every command can be typed
        words = shlex.split(line.strip().removeprefix("exec "))
        if words[0] == "rlx":
            cli._parser().parse_args([word.replace("$RLX_ADDRESS", "h:1") for word in words[1:]])
    return container, volume["secret"]["secretName"]


def test_a_job_is_rendered(capsys, key_file):
    found = rendered(
        capsys, "--token-file", str(key_file), "--name", "big", "--gpu", "8", "--command", "rlx train 'a b'"
    )
    assert list(found) == ["Secret", "Service", "Job"]
    job, service, secret = found["Job"], found["Service"], found["Secret"]
    container, of_key = check_job(job["spec"], "big-0.big")
    assert secret["metadata"]["name"] == of_key and secret["stringData"] == {"cluster.key": key_file.read_text()}
    assert job["apiVersion"] == "batch/v1" and "labels" not in job["metadata"]
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "big"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == 6380
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert "exec sh -c 'rlx train '\"'\"'a b'\"'\"''" in container["args"][0]


def test_a_job_set_in_a_queue_is_rendered(capsys, key_file):
    found = rendered(capsys, "--jobset", "--queue", "team", "--secret", "mine", "--cpu", "4", "--memory", "8Gi")
    assert list(found) == ["JobSet"]  # which makes the Service itself
    job_set = found["JobSet"]
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    (one,) = job_set["spec"]["replicatedJobs"]
    network = job_set["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "subdomain": "rlx", "publishNotReadyAddresses": True}
    container, of_key = check_job(one["template"]["spec"], f"rlx-{one['name']}-0-0.{network['subdomain']}")
    assert of_key == "mine" and one["replicas"] == 1 and one["template"]["spec"]["backoffLimit"] == 0
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert container["args"][0].count("--block") == 2  # nothing to run: the cluster stays


def test_a_ray_job_in_a_queue_is_rendered(capsys):
    found = rendered(
        capsys, "--rayjob", "--queue", "team", "--gpu", "8", "--memory", "64Gi", "--name", "big", "--command", TRAIN
    )
    assert list(found) == ["RayJob"]  # Ray has no key of rlx, and KubeRay makes the Service
    job = found["RayJob"]
    assert job["metadata"] == {"name": "big", "labels": {"kueue.x-k8s.io/queue-name": "team"}}
    spec = job["spec"]
    assert spec["entrypoint"] == TRAIN and spec["submissionMode"] == "HTTPMode"
    assert (
        spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0 and spec["backoffLimit"] == 3
    )
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2  # and the head
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"  # who starts the command asks from another pod
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "rlx:0.1" and "command" not in container  # KubeRay says what runs
        assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "8"}


def test_a_ray_job_of_one_pod_has_no_workers(capsys):
    spec = rendered(capsys, "--rayjob", "--nodes", "1", "--command", TRAIN)["RayJob"]["spec"]
    assert spec["rayClusterSpec"]["workerGroupSpecs"] == []


@pytest.mark.parametrize(("version", "mode"), [("2.51.9", None), ("2.52.0", "token"), ("3.0.0", "token")])
def test_a_cluster_of_ray_that_knows_tokens_gets_one(capsys, version, mode):
    job = rendered(capsys, "--rayjob", "--command", TRAIN, "--ray-version", version)["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version and cluster.get("authOptions", {}).get("mode") == mode


def test_a_version_of_ray_without_a_ray_job_is_refused(capsys):
    assert cli.main(["k8s", "render", "--nodes", "3", "--image", "rlx:0.1", "--ray-version", "2.60.0"]) == 2
    assert "--ray-version is of the cluster that a RayJob has: give --rayjob" in capsys.readouterr().err


def test_the_command_of_the_shipped_ray_job_can_be_typed(capsys):
    (job,) = yaml.safe_load_all(SHIPPED.read_text())  # tests/test_docs.py holds it equal to what is rendered
    assert faults(job) == []
    _, *words = shlex.split(job["spec"]["entrypoint"])
    assert cli.main([*words, "--dry-run"]) == 0
    assert "engine: ray" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--rayjob needs what the head is to run"),
        (("--command", TRAIN, "--secret", "mine"), "--secret: a RayJob has Ray's ports, and no key of rlx"),
        (("--command", TRAIN, "--port", "0", "--token-file", "k"), "--port and --token-file: a RayJob has"),
    ],
)
def test_a_ray_job_refuses_what_it_cannot_heed(capsys, words, said):
    assert cli.main(["k8s", "render", "--rayjob", "--nodes", "3", "--image", "rlx:0.1", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_amount_that_kubernetes_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["k8s", "render", "--nodes", "3", "--image", "rlx:0.1", "--memory", "64GiB"])
    assert "'64GiB' is no amount for Kubernetes" in capsys.readouterr().err


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("place", "name", "value", "fault"),
    [
        (("spec",), "shutdownAfterJobFinish", True, "$.spec: Additional properties are not allowed"),
        (("spec",), "backoffLimit", "3", "$.spec.backoffLimit: '3' is not of type 'integer'"),
        (("spec",), "submissionMode", "Http", "$.spec.submissionMode: 'Http' is not one of"),
        (HEAD, "rayStartParams", None, "$.spec.rayClusterSpec.headGroupSpec: 'rayStartParams' is a required property"),
        (CONTAINER, "limits", {}, "containers[0]: Additional properties are not allowed"),
        (CONTAINER, "resources", {"limits": {"memory": "64GiB"}}, "'64GiB' does not match"),
        ((), "apiVersion", "ray.io/v1beta1", "$.apiVersion: 'ray.io/v1beta1' is not one of"),
    ],
)
def test_fields_are_held_against_the_api(place, name, value, fault):
    job = copy.deepcopy(yaml.safe_load(SHIPPED.read_text()))
    there = job
    for step in place:
        there = there[step]
    there[name] = value
    if value is None:
        del there[name]
    (found,) = faults(job)
    assert fault in found


@pytest.mark.slow
def test_the_script_of_the_pods_makes_a_cluster(terminal, key_file, capsys):
    free = terminal.start_head().partition(":")[2]
    terminal.type("stop", "--all")
    command = "rlx status --address $RLX_ADDRESS --token-file $RLX_TOKEN_FILE"
    words = ("--token-file", str(key_file), "--port", free, "--command", command)
    container = rendered(capsys, *words)["Job"]["spec"]["template"]["spec"]["containers"][0]
    terminal.program("rlx", f'#!/bin/sh\nexec {sys.executable} -m rlx.cli "$@"\n')
    # Pods have an address each, and so may listen at the same port; here they are of one machine, and have names.
    script = container["args"][0]
    node = script.replace(f"--port {free}", '--port 0 --name "pod-$JOB_COMPLETION_INDEX"')
    env = {"RLX_ADDRESS": f"127.0.0.1:{free}", "RLX_TOKEN_FILE": str(key_file), "POD_IP": "127.0.0.1"}
    pods = [
        subprocess.Popen(
            [*container["command"], script if index == 0 else node],
            **{"env": terminal.env | env | {"JOB_COMPLETION_INDEX": str(index)}, "stdout": subprocess.PIPE},
        )
        for index in (1, 2, 0)
    ]
    try:
        said, _ = pods[-1].communicate(timeout=T)
        assert pods[-1].returncode == 0 and b"pod-1" in said and b"pod-2" in said
    finally:
        for pod in pods:
            pod.terminate()
            pod.communicate(timeout=T)
