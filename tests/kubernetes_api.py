"""What of Kubernetes' API rlx writes: names, types, what is required, which words are allowed; the rest is refused.

From KubeRay's CRD of RayJobs (ray.io/v1, as of KubeRay 1.2; later ones require less of the same), JobSet's types
(jobset.x-k8s.io/v1alpha2) and Kubernetes' own of batch/v1 and v1. A field that rlx begins to write is looked up there,
and added here.
"""

from typing import Any

from jsonschema import Draft202012Validator

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NAME = STRING | {"pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
"""A label of DNS, as long as KubeRay allows."""
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([numkMGTPE]|[KMGTPE]i)?$"}


def fields(*required: str, **types: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields and no other."""
    return {"type": "object", "properties": types, "required": list(required), "additionalProperties": False}


def one_of(*words: str) -> dict[str, Any]:
    """Return the schema of one of these words."""
    return STRING | {"enum": list(words)}


def many(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object whose names are the user's."""
    return {"type": "object", "additionalProperties": values}


def kind(version: str, name: str, **rest: Any) -> dict[str, Any]:
    """Return the schema of one kind of object."""
    metadata = fields("name", name=NAME, labels=by_name(STRING))
    head = {"apiVersion": one_of(version), "kind": one_of(name), "metadata": metadata}
    return fields(*head, *rest, **head, **rest)


CONTAINER = fields(
    *("name", "image"),
    name=NAME,
    image=STRING,
    command=many(STRING),
    args=many(STRING),
    env=many(
        fields("name", name=STRING, value=STRING, valueFrom=fields(fieldRef=fields("fieldPath", fieldPath=STRING)))
    ),
    ports=many(fields("containerPort", name=NAME, containerPort=INTEGER)),
    resources=fields(limits=by_name(QUANTITY)),
    volumeMounts=many(fields("name", "mountPath", name=NAME, mountPath=STRING, readOnly=BOOLEAN)),
)
POD = fields(
    "containers",
    containers=many(CONTAINER) | {"minItems": 1},
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    subdomain=NAME,
    volumes=many(fields("name", name=NAME, secret=fields(secretName=STRING, defaultMode=INTEGER))),
)
POD_OF_A_JOB = POD | {
    "required": ["containers", "restartPolicy"],
    "properties": POD["properties"] | {"restartPolicy": one_of("OnFailure", "Never")},
}
JOB = fields(
    "template",
    template=fields("spec", spec=POD_OF_A_JOB),
    completionMode=one_of("Indexed", "NonIndexed"),
    completions=INTEGER,
    parallelism=INTEGER,
    backoffLimit=INTEGER,
    successPolicy=fields("rules", rules=many(fields(succeededIndexes=STRING, succeededCount=INTEGER))),
)
JOB_SET = fields(
    replicatedJobs=many(fields("name", "template", name=NAME, replicas=INTEGER, template=fields(spec=JOB))),
    network=fields(enableDNSHostnames=BOOLEAN, subdomain=NAME, publishNotReadyAddresses=BOOLEAN),
    failurePolicy=fields(maxRestarts=INTEGER),
)
RAY_POD = fields(spec=POD)
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=fields(mode=one_of("disabled", "token")),  # since KubeRay 1.5.1
    headGroupSpec=fields("rayStartParams", "template", rayStartParams=by_name(STRING), template=RAY_POD),
    workerGroupSpecs=many(
        fields(
            *("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            rayStartParams=by_name(STRING),
            template=RAY_POD,
        )
    ),
)
RAY_JOB = fields(
    rayClusterSpec=RAY_CLUSTER,
    entrypoint=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    backoffLimit=INTEGER,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER | {"minimum": 0},
)
SERVICE = fields(
    clusterIP=STRING,
    publishNotReadyAddresses=BOOLEAN,
    selector=by_name(STRING),
    ports=many(fields("port", name=NAME, port=INTEGER)),
)
KINDS = {
    "Secret": kind("v1", "Secret", type=one_of("Opaque"), stringData=by_name(STRING)),
    "Service": kind("v1", "Service", spec=SERVICE),
    "Job": kind("batch/v1", "Job", spec=JOB),
    "JobSet": kind("jobset.x-k8s.io/v1alpha2", "JobSet", spec=JOB_SET),
    "RayJob": kind("ray.io/v1", "RayJob", spec=RAY_JOB),
}


def faults(found: dict[str, Any]) -> list[str]:
    """Return what of an object Kubernetes would refuse or leave out, with the place of each."""
    errors = Draft202012Validator(KINDS[found["kind"]]).iter_errors(found)
    return [f"{error.json_path}: {error.message}" for error in errors]
