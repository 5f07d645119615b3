"""What the operators demand beyond their definitions: KubeRay, JobSet, Kubeflow, Kueue."""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import Document, at, pods

QUEUE = "kueue.x-k8s.io/queue-name"
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # a letter first
# JobSet 0.12, pkg/webhooks/jobset_webhook.go: ruleNameFmt (at most 128) and
# validOnJobFailureReasons. Trainer passes the rules of a runtime on to the same webhook.
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]{0,126}[A-Za-z0-9_])?")
REASONS = {
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"),
    "PodFailurePolicy",
}


def check(docs: list[Document]) -> list[str]:
    """What an operator would refuse, or never start."""
    checks: dict[str, Any] = {
        "RayJob": lambda doc: _ray(doc["metadata"]["name"], doc["spec"]),
        "JobSet": lambda doc: [*_hosts(doc), *_rules(doc["spec"])],
        "TrainJob": lambda doc: _trainjob(doc, docs),
        "TrainingRuntime": _runtime,
        "PyTorchJob": lambda doc: _pytorch(doc["spec"]),
    }
    return [
        f"{doc['kind']}: {line}"
        for doc in docs
        if doc["kind"] in checks
        for line in (*checks[doc["kind"]](doc), *_queue(doc))
    ]


def _ray(name: str, spec: Document) -> Iterator[str]:
    """KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go."""
    cluster = spec["rayClusterSpec"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        yield f"{name}: KubeRay wants at most 47 letters, digits and hyphens, a letter first"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue suspends it, which needs shutdownAfterJobFinishes"
    version = str(cluster.get("rayVersion"))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"rayVersion: {version} is no version"
    elif cluster.get("authOptions") and tuple(map(int, version.split("."))) < (2, 52, 0):
        yield f"authOptions: Ray {version} knows no tokens"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "authOptions: enableK8sTokenAuth is not for a RayJob"
    for group in cluster["workerGroupSpecs"]:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None or not least <= group["replicas"] <= most:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        started = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            started
        ):
            yield "resources are in rayStartParams and in resources"
        for key, value in started.items():
            if not isinstance(value, str):
                yield f"rayStartParams.{key}: {value!r} is no string"


def _hosts(doc: Document) -> Iterator[str]:
    name = doc["metadata"]["name"]
    for job in doc["spec"]["replicatedJobs"]:
        pod = job["template"]["spec"]["completions"] - 1
        last = f"{name}-{job['name']}-{job['replicas'] - 1}-{pod}"
        if not DNS_1035.fullmatch(f"{last}-abcde"):  # the pod's name ends in five characters more
            yield f"{last}: no name of a host"
        for variable in at(job, "template.spec.template.spec.containers.*.env.*"):
            first = f"{name}-{job['name']}-0-0.{name}"
            if variable["name"] == "PET_MASTER_ADDR" and variable["value"] != first:
                yield f"PET_MASTER_ADDR: {variable['value']} is not the first pod"


def _rules(spec: Document) -> Iterator[str]:
    rules = spec.get("failurePolicy", {}).get("rules", [])
    names = [rule["name"] for rule in rules]
    for rule in rules:
        if names.count(rule["name"]) > 1 or not RULE_NAME.fullmatch(rule["name"]):
            yield f"failurePolicy: {rule['name']} is no name of a rule, or there twice"
        for reason in set(rule.get("onJobFailureReasons", [])) - REASONS:
            yield f"failurePolicy: {reason} is no reason that a Job fails for"
        for job in rule.get("targetReplicatedJobs", []):
            if job not in at(spec, "replicatedJobs.*.name"):
                yield f"failurePolicy: there is no replicated job {job}"


def _trainjob(doc: Document, docs: list[Document]) -> Iterator[str]:
    for variable in at(doc, "spec.trainer.env.*"):
        if variable["name"].startswith("PET_"):
            yield f"env: Trainer sets {variable['name']} itself"
    reference = doc["spec"]["runtimeRef"]
    wanted = reference.get("kind", "ClusterTrainingRuntime"), reference["name"]
    there = [(found["kind"], found["metadata"]["name"]) for found in docs]
    if wanted not in there:
        yield f"runtimeRef: there is no {' '.join(wanted)}"
    elif there.index(wanted) > docs.index(doc):
        yield f"runtimeRef: {' '.join(wanted)} comes after it, and Trainer refuses it then"


def _runtime(doc: Document) -> Iterator[str]:
    spec = doc["spec"]["template"]["spec"]
    steps = [job["template"].get("metadata", {}) for job in spec["replicatedJobs"]]
    if [step.get("labels", {}).get(ANCESTOR) for step in steps] != ["trainer"]:
        yield f"its job has to have the label {ANCESTOR}: trainer"
    for container in (container for pod in pods([doc]) for container in pod.containers):
        if container["name"] != "node":
            yield "Trainer looks for a container with the name node"
        for variable in container.get("env", []):
            if variable["name"].startswith("PET_"):
                yield f"env: Trainer sets {variable['name']} itself"
    yield from _rules(spec)


def _pytorch(spec: Document) -> Iterator[str]:
    """training-operator 1.9, pkg/webhooks/pytorch/pytorchjob_webhook.go."""
    for role, replica in spec["pytorchReplicaSpecs"].items():
        if role not in ("Master", "Worker"):
            yield f"{role}: neither Master nor Worker"
        if "pytorch" not in at(replica, "template.spec.containers.*.name"):
            yield "the operator looks for a container with the name pytorch"
        if "restartPolicy" in replica["template"]["spec"]:
            yield "restartPolicy of the pod: that of the replicas overwrites it"
        elastic = spec["elasticPolicy"]
        if not elastic["minReplicas"] <= replica["replicas"] <= elastic["maxReplicas"]:
            yield "minReplicas <= replicas <= maxReplicas does not hold"
        if elastic.get("rdzvBackend") not in ("c10d", "etcd", "etcd-v2"):
            yield f"rdzvBackend: {elastic.get('rdzvBackend')} is none"
        if "nProcPerNode" in elastic:
            yield "nProcPerNode: must not be used with nprocPerNode"


def _queue(doc: Document) -> Iterator[str]:
    if doc["kind"] == "TrainingRuntime":
        return
    if QUEUE not in doc["metadata"].get("labels", {}):
        yield f"no label {QUEUE}"
    if "suspend" in doc["spec"] or "suspend" in doc["spec"].get("runPolicy", {}):
        yield "suspend: Kueue's to set; applied again, the manifest would undo what Kueue decided"
