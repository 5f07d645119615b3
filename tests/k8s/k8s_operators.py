"""What the operators demand beyond their definitions: KubeRay, JobSet, Kubeflow, Kueue."""

import re
from collections.abc import Iterator

from k8s_manifests import Document, pods

QUEUE = "kueue.x-k8s.io/queue-name"
RAY_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035: a letter first


def check(docs: list[Document]) -> list[str]:
    """What an operator would refuse, or never start."""
    checks = {
        "RayJob": _ray,
        "JobSet": _jobset,
        "TrainJob": _trainjob,
        "TrainingRuntime": _runtime,
        "PyTorchJob": _pytorch,
    }
    problems = []
    for doc in docs:
        if doc["kind"] in checks:
            found = [*checks[doc["kind"]](doc, docs), *_queue(doc)]
            problems += [f"{doc['kind']}: {line}" for line in found]
    return problems


def _ray(doc: Document, docs: list[Document]) -> Iterator[str]:
    spec, name = doc["spec"], doc["metadata"]["name"]
    cluster = spec["rayClusterSpec"]
    if len(name) > 47 or not RAY_NAME.fullmatch(name):
        yield f"{name}: KubeRay wants at most 47 letters, digits and hyphens, a letter first"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue suspends it, which needs shutdownAfterJobFinishes"
    if "clusterSelector" in spec and spec.get("backoffLimit"):
        yield "backoffLimit does not go with clusterSelector"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    version = cluster.get("rayVersion")
    if not isinstance(version, str) or version.count(".") != 2:
        yield f"rayVersion: {version!r} is no version"
    elif cluster.get("authOptions", {}).get("mode") == "token":
        if tuple(map(int, version.split("."))) < (2, 52, 0):
            yield f"authOptions: Ray {version} knows no tokens"
        if cluster["authOptions"].get("enableK8sTokenAuth"):
            yield "authOptions: enableK8sTokenAuth is not for a RayJob"
    for group in cluster.get("workerGroupSpecs", []):
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        replicas = group.get("replicas", 0)
        if least is None or most is None or not least <= replicas <= most:
            yield f"{group['groupName']}: {least} <= {replicas} <= {most} replicas does not hold"
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group.get("rayStartParams", {})
        ):
            yield "resources stand in rayStartParams and in resources"
        for key, value in group.get("rayStartParams", {}).items():
            if not isinstance(value, str):
                yield f"rayStartParams.{key}: {value!r} is no string"


def _jobset(doc: Document, docs: list[Document]) -> Iterator[str]:
    yield from _host_names(doc["metadata"]["name"], doc["spec"])
    yield from _rules(doc["spec"])


def _host_names(name: str, spec: Document) -> Iterator[str]:
    for job in spec["replicatedJobs"]:
        inner = job["template"]["spec"]
        last = inner.get("completions", 1) - 1
        host = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}-{last}"
        if len(host) > 63:
            yield f"{host}: too long for the name of a host"
        if spec.get("network", {}).get("subdomain", name) != name:
            continue
        for container in inner["template"]["spec"]["containers"]:
            variables = {v["name"]: v.get("value") for v in container.get("env", [])}
            address = variables.get("PET_MASTER_ADDR")
            if address is not None and address != f"{name}-{job['name']}-0-0.{name}":
                yield f"PET_MASTER_ADDR: {address} is not the first pod"


def _rules(spec: Document) -> Iterator[str]:
    names = [rule["name"] for rule in spec.get("failurePolicy", {}).get("rules", [])]
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(
            r"[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?", name
        ):
            yield f"failurePolicy: {name} is no name of a rule, or there twice"


def _trainjob(doc: Document, docs: list[Document]) -> Iterator[str]:
    for variable in doc["spec"].get("trainer", {}).get("env", []):
        if variable["name"].startswith("PET_"):
            yield f"env: Trainer sets {variable['name']} itself"
    reference = doc["spec"]["runtimeRef"]
    kind = reference.get("kind", "ClusterTrainingRuntime")
    there = [(found["kind"], found["metadata"]["name"]) for found in docs]
    if (kind, reference["name"]) not in there:
        yield f"runtimeRef: there is no {kind} {reference['name']}"
    elif there.index((kind, reference["name"])) > docs.index(doc):
        yield f"runtimeRef: {kind} {reference['name']} comes after it, and Trainer refuses it then"


def _runtime(doc: Document, docs: list[Document]) -> Iterator[str]:
    spec = doc["spec"]["template"]["spec"]
    ancestor = "trainer.kubeflow.org/trainjob-ancestor-step"
    steps = [
        job
        for job in spec["replicatedJobs"]
        if job["template"].get("metadata", {}).get("labels", {}).get(ancestor) == "trainer"
    ]
    if len(steps) != 1:
        yield f"one job has to have the label {ancestor}: trainer"
    for job in steps:
        containers = {
            c["name"]: c for c in job["template"]["spec"]["template"]["spec"]["containers"]
        }
        if "node" not in containers:
            yield "Trainer looks for a container with the name node"
    for pod in pods([doc]):
        for container in pod.containers:
            for variable in container.get("env", []):
                if variable["name"].startswith("PET_"):
                    yield f"env: Trainer sets {variable['name']} itself"
    yield from _rules(spec)


def _pytorch(doc: Document, docs: list[Document]) -> Iterator[str]:
    spec = doc["spec"]
    for role, replica in spec["pytorchReplicaSpecs"].items():
        if role not in ("Master", "Worker"):
            yield f"{role}: neither Master nor Worker"
        names = [c["name"] for c in replica["template"]["spec"]["containers"]]
        if "pytorch" not in names:
            yield "the operator looks for a container with the name pytorch"
        if "restartPolicy" in replica["template"]["spec"]:
            yield "restartPolicy of the pod: that of the replicas overwrites it"
    elastic = spec.get("elasticPolicy")
    if elastic is not None:
        if elastic.get("rdzvBackend") not in ("c10d", "etcd", "etcd-v2"):
            yield f"rdzvBackend: {elastic.get('rdzvBackend')} is none"
        if elastic.get("nProcPerNode") is not None:
            yield "nProcPerNode: nprocPerNode of the job has taken its place"
        replicas = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
        if not elastic["minReplicas"] <= replicas <= elastic["maxReplicas"]:
            yield "minReplicas <= replicas <= maxReplicas does not hold"


def _queue(doc: Document) -> Iterator[str]:
    if doc["kind"] == "TrainingRuntime":
        return
    spec = doc["spec"]["runPolicy"] if doc["kind"] == "PyTorchJob" else doc["spec"]
    if QUEUE not in doc["metadata"].get("labels", {}):
        yield f"no label {QUEUE}"
    if "suspend" in spec:
        yield "suspend: Kueue's to set; applied again, the manifest would undo what Kueue decided"
