"""What the operators demand beyond their definitions: KubeRay, JobSet, Kubeflow, Kueue."""

import re
from collections.abc import Callable, Iterator

from k8s_manifests import Document, at

ENV = "replicatedJobs.*.template.spec.template.spec.containers.*.env.*.name"
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
    checks: dict[str, Callable[[Document], Iterator[str]]] = {
        "RayJob": _ray,
        "JobSet": _jobset,
        "TrainJob": lambda doc: _trainjob(doc, docs),
        "TrainingRuntime": _runtime,
        "PyTorchJob": _pytorch,
    }
    ours = [doc for doc in docs if doc["kind"] in checks]
    found = [(doc, line) for doc in ours for line in (*checks[doc["kind"]](doc), *_queue(doc))]
    return [f"{doc['kind']}: {line}" for doc, line in found]


def _ray(doc: Document) -> Iterator[str]:
    """KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go."""
    name, spec = doc["metadata"]["name"], doc["spec"]
    cluster = spec["rayClusterSpec"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        yield f"{name}: KubeRay wants at most 47 letters, digits and hyphens, a letter first"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue suspends it, which needs shutdownAfterJobFinishes"
    if tuple(map(int, cluster["rayVersion"].split("."))) < (2, 52, 0):
        yield f"authOptions: Ray {cluster['rayVersion']} knows no tokens"
    if cluster["authOptions"].get("enableK8sTokenAuth"):
        yield "authOptions: enableK8sTokenAuth is not for a RayJob"
    for group in cluster["workerGroupSpecs"]:
        least, most = group.get("minReplicas", 9), group.get("maxReplicas", 0)
        if not least <= group["replicas"] <= most:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"


def _jobset(doc: Document) -> Iterator[str]:
    name, (job,) = doc["metadata"]["name"], doc["spec"]["replicatedJobs"]
    last = f"{name}-{job['name']}-0-{job['template']['spec']['completions'] - 1}"
    if not DNS_1035.fullmatch(f"{last}-abcde"):  # the pod's name ends in five characters more
        yield f"{last}: no name of a host"
    variables = at(job, "template.spec.template.spec.containers.*.env.*")
    address = [v["value"] for v in variables if v["name"] == "PET_MASTER_ADDR"]
    if address not in ([], [f"{name}-{job['name']}-0-0.{name}"]):
        yield f"PET_MASTER_ADDR: {address} is not the first pod"
    yield from _rules(doc["spec"])


def _rules(spec: Document) -> Iterator[str]:
    names = [*at(spec, "failurePolicy.rules.*.name")]
    for name in names:
        if names.count(name) > 1 or not RULE_NAME.fullmatch(name):
            yield f"failurePolicy: {name} is no name of a rule, or there twice"
    for reason in {*at(spec, "failurePolicy.rules.*.onJobFailureReasons.*")} - REASONS:
        yield f"failurePolicy: {reason} is no reason that a Job fails for"


def _trainjob(doc: Document, docs: list[Document]) -> Iterator[str]:
    reference = doc["spec"]["runtimeRef"]
    wanted = reference.get("kind", "ClusterTrainingRuntime"), reference["name"]
    there = [(found["kind"], found["metadata"]["name"]) for found in docs]
    if wanted not in there[: docs.index(doc)]:
        yield f"runtimeRef: there is no {' '.join(wanted)} before it, so Trainer refuses it"
    for name in (*at(doc, "spec.trainer.env.*.name"), *at(docs, "*.spec.template.spec." + ENV)):
        if name.startswith("PET_"):
            yield f"env: Trainer sets {name} itself"


def _runtime(doc: Document) -> Iterator[str]:
    spec = doc["spec"]["template"]["spec"]
    (job,) = spec["replicatedJobs"]
    if [*at(job, "template.metadata.labels")] != [{ANCESTOR: "trainer"}]:
        yield f"its job has to have the label {ANCESTOR}: trainer"
    if [*at(job, "template.spec.template.spec.containers.*.name")] != ["node"]:
        yield "Trainer looks for a container with the name node"
    yield from _rules(spec)


def _pytorch(doc: Document) -> Iterator[str]:
    """training-operator 1.9, pkg/webhooks/pytorch/pytorchjob_webhook.go, and torch's backends."""
    elastic = doc["spec"]["elasticPolicy"]
    (worker,) = doc["spec"]["pytorchReplicaSpecs"].values()
    if [*at(worker, "template.spec.containers.*.name")] != ["pytorch"]:
        yield "the operator looks for a container with the name pytorch"
    if not elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]:
        yield "minReplicas <= replicas <= maxReplicas does not hold"
    if elastic.get("rdzvBackend") not in ("c10d", "etcd", "etcd-v2") or "nProcPerNode" in elastic:
        yield f"elasticPolicy: {elastic}: rdzvBackend is none, or nprocPerNode is there twice"


def _queue(doc: Document) -> Iterator[str]:
    if QUEUE not in doc["metadata"].get("labels", {}) and doc["kind"] != "TrainingRuntime":
        yield f"no label {QUEUE}"
    if "suspend" in doc["spec"] or "suspend" in doc["spec"].get("runPolicy", {}):
        yield "suspend: Kueue's to set; applied again, the manifest would undo what Kueue decided"
