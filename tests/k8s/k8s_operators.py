"""What operators demand beyond their definitions: KubeRay, JobSet, Trainer, the training operator,
Kueue.

Each rule stands beside the place that it was read at, as repository:path and function. Where an
operator does not refuse but silently takes another value, the rule says so.
"""

import re
from collections.abc import Callable, Iterator

from k8s_manifests import Document, at

QUEUE = "kueue.x-k8s.io/queue-name"
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
# kubernetes/apimachinery:pkg/util/validation/validation.go, IsDNS1035Label: a letter first.
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# The same file, IsDNS1123Subdomain, which Kueue's queues have as names
# (kubernetes-sigs/kueue:pkg/controller/jobframework/validation.go, validateCreateForQueueName).
DNS_1123 = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
# kubernetes-sigs/jobset:pkg/webhooks/jobset_webhook.go, ruleNameFmt with maxRuleNameLength of 128,
# and validOnJobFailureReasons. Trainer passes the rules of a runtime on to the same webhook, which
# refuses them when the job is there already.
RULE_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
REASONS = {
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"),
    "PodFailurePolicy",
}
# kubeflow/trainer:pkg/constants/constants.go, TorchRunReservedEnvNames.
RESERVED = {f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK")} | {
    *("PET_MASTER_ADDR", "PET_MASTER_PORT")
}


def check(docs: list[Document]) -> list[str]:
    """What an operator would refuse, never start, or start otherwise than it is written."""
    checks: dict[str, Callable[[Document], Iterator[str]]] = {
        "RayJob": lambda doc: (line for rules in (_ray, _ray_cluster) for line in rules(doc)),
        "JobSet": _jobset,
        "TrainJob": lambda doc: _trainjob(doc, docs),
        "TrainingRuntime": _runtime,
        "PyTorchJob": _pytorch,
    }
    ours = [doc for doc in docs if doc["kind"] in checks]
    found = [(doc, line) for doc in ours for line in (*checks[doc["kind"]](doc), *_queue(doc))]
    return [f"{doc['kind']}: {line}" for doc, line in found]


def _ray(doc: Document) -> Iterator[str]:
    """ray-project/kuberay:ray-operator/controllers/ray/utils/validation.go, ValidateRayJobMetadata
    and ValidateRayJobSpec; kubernetes-sigs/kueue:pkg/controller/jobs/rayjob/rayjob_webhook.go,
    validateCreate."""
    name, spec = doc["metadata"]["name"], doc["spec"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        yield f"{name}: KubeRay wants at most 47 letters, digits and hyphens, a letter first"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue suspends it, which needs shutdownAfterJobFinishes"
    if "clusterSelector" in spec:
        yield "clusterSelector: Kueue refuses a cluster that is there already"
    for field in ("ttlSecondsAfterFinished", "backoffLimit"):
        if spec.get(field, 0) < 0:
            yield f"{field}: is below 0"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds: is not above 0"
    retries = spec.get("backoffLimit", 0) > 0
    if spec.get("submissionMode") == "InteractiveMode" and retries:
        yield "backoffLimit: InteractiveMode tries nothing again"
    inside = {"submitterPodTemplate", "submitterConfig"} & spec.keys()
    if spec.get("submissionMode") == "SidecarMode" and inside:
        yield f"{min(inside)}: SidecarMode has no pod of its own"


def _ray_cluster(doc: Document) -> Iterator[str]:
    """The same files: ValidateRayClusterSpec, and in Kueue raycluster/raycluster_webhook.go."""
    cluster = doc["spec"]["rayClusterSpec"]
    auth = cluster["authOptions"]
    version = tuple(map(int, cluster.get("rayVersion", "0").split(".")))
    if auth.get("mode") == "token" and version < (2, 52, 0):
        yield f"authOptions: Ray {cluster.get('rayVersion')} knows no tokens"
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions: enableK8sTokenAuth is not for a RayJob"
    if cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: Kueue refuses a cluster that grows"
    groups = cluster["workerGroupSpecs"]
    if len(groups) > 7 or any(group["groupName"] == "head" for group in groups):
        yield "workerGroupSpecs: Kueue takes 7 at most, none with the name head"
    for group in (cluster["headGroupSpec"], *groups):
        parameters = group.get("rayStartParams", {})
        if "labels" in parameters:
            yield "rayStartParams: labels are the group's own field"
        said_twice = {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys()
        if said_twice and group.get("resources"):
            yield f"rayStartParams: {min(said_twice)} beside the group's resources"
    for group in groups:
        # Not refused: ray-operator/controllers/ray/utils/util.go, GetWorkerGroupDesiredReplicas,
        # starts as many as the nearer limit says.
        least, most = group.get("minReplicas", 9), group.get("maxReplicas", 0)
        if not least <= group["replicas"] <= most:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"


def _jobset(doc: Document) -> Iterator[str]:
    """kubernetes-sigs/jobset:pkg/webhooks/jobset_webhook.go, ValidateCreate."""
    name, (job,) = doc["metadata"]["name"], doc["spec"]["replicatedJobs"]
    yield from _pods(name, job, job["template"]["spec"]["completions"])
    variables = at(job, "template.spec.template.spec.containers.*.env.*")
    address = [v["value"] for v in variables if v["name"] == "PET_MASTER_ADDR"]
    # pkg/util/placement/placement.go, GenPodName, and the subdomain, which is the JobSet's name.
    if address not in ([], [f"{name}-{job['name']}-0-0.{name}"]):
        yield f"PET_MASTER_ADDR: {address} is not the first pod"
    yield from _rules(doc["spec"])


def _pods(name: str, job: Document, count: int) -> Iterator[str]:
    """The longest name of a pod, with the five characters that the Job adds."""
    last = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}-{count - 1}-abcde"
    if not DNS_1035.fullmatch(last):
        yield f"{last}: no name of a host"


def _rules(spec: Document) -> Iterator[str]:
    """The same file, validateFailurePolicy."""
    names = [*at(spec, "failurePolicy.rules.*.name")]
    for name in names:
        if names.count(name) > 1 or not RULE_NAME.fullmatch(name):
            yield f"failurePolicy: {name} is no name of a rule, or there twice"
    for reason in {*at(spec, "failurePolicy.rules.*.onJobFailureReasons.*")} - REASONS:
        yield f"failurePolicy: {reason} is no reason that a Job fails for"
    targets = {*at(spec, "failurePolicy.rules.*.targetReplicatedJobs.*")}
    targets |= {*at(spec, "successPolicy.targetReplicatedJobs.*")}
    for target in targets - {*at(spec, "replicatedJobs.*.name")}:
        yield f"targetReplicatedJobs: there is no {target}"


def _trainjob(doc: Document, docs: list[Document]) -> Iterator[str]:
    """kubeflow/trainer:pkg/webhooks/trainjob_webhook.go, ValidateCreate, and
    pkg/runtime/framework/plugins/torch/torch.go, Validate."""
    reference, trainer = doc["spec"]["runtimeRef"], doc["spec"]["trainer"]
    wanted = reference.get("kind", "ClusterTrainingRuntime"), reference["name"]
    there = {(found["kind"], found["metadata"]["name"]): found for found in docs[: docs.index(doc)]}
    if wanted not in there:
        yield f"runtimeRef: there is no {' '.join(wanted)} before it, so Trainer refuses it"
    for name in RESERVED & {*at(trainer, "env.*.name")}:
        yield f"env: Trainer sets {name} itself"
    for runtime in there.values():
        # The JobSet has the TrainJob's name: pkg/runtime/framework/plugins/jobset/jobset.go, Build.
        for job in at(runtime, "spec.template.spec.replicatedJobs.*"):
            yield from _pods(doc["metadata"]["name"], job, trainer["numNodes"])


def _runtime(doc: Document) -> Iterator[str]:
    """kubeflow/trainer:pkg/webhooks/trainingruntime_webhook.go, validateReplicatedJobs."""
    spec = doc["spec"]["template"]["spec"]
    (job,) = spec["replicatedJobs"]
    if [*at(job, "template.metadata.labels")] != [{ANCESTOR: "trainer"}]:
        yield f"its job has to have the label {ANCESTOR}: trainer"
    if job.get("replicas", 1) != 1:
        yield "replicas: Trainer takes 1 alone; trainer.numNodes is the number of pods"
    if "node" not in at(job, "template.spec.template.spec.containers.*.name"):
        yield "Trainer looks for a container with the name node"
    # pkg/runtime/framework/plugins/torch/torch.go, EnforceMLPolicy: PET_MASTER_ADDR begins with
    # NAME-node-0-0, and the variables below are replaced without a word.
    if job["name"] != "node":
        yield f"{job['name']}: its pods are not where Trainer's PET_MASTER_ADDR leads"
    for name in RESERVED & {*at(job, "template.spec.template.spec.containers.*.env.*.name")}:
        yield f"env: Trainer sets {name} itself"
    yield from _rules(spec)


def _pytorch(doc: Document) -> Iterator[str]:
    """kubeflow/training-operator:pkg/webhooks/pytorch/pytorchjob_webhook.go, validatePyTorchJob;
    pkg/webhooks/utils/utils.go, ValidateReplicaSpecs; pkg/apis/kubeflow.org/v1/pytorch_types.go for
    the values of rdzvBackend and nprocPerNode, which nothing checks before the ranks start."""
    name, spec = doc["metadata"]["name"], doc["spec"]
    elastic, replicas = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]
    if not DNS_1035.fullmatch(name):
        yield f"{name}: no name of a host"
    if "Worker" not in replicas or replicas.keys() - {"Master", "Worker"}:
        yield f"pytorchReplicaSpecs: {', '.join(replicas)}: with an elastic policy needs Worker"
    for role, replica in replicas.items():
        containers = [*at(replica, "template.spec.containers.*")]
        if "pytorch" not in [container["name"] for container in containers]:
            yield "the operator looks for a container with the name pytorch"
        if not all(container.get("image") for container in containers):
            yield f"{role}: a container without an image"
        if replica["replicas"] < 1:
            yield f"{role}: replicas: is below 1"
    # Ours: the ranks wait for as many nodes as the policy says, and the operator starts `replicas`.
    started = replicas.get("Worker", {}).get("replicas", 1)
    if not elastic["minReplicas"] <= started <= elastic["maxReplicas"]:
        yield "minReplicas <= replicas <= maxReplicas does not hold"
    if elastic.get("rdzvBackend") not in ("c10d", "etcd", "etcd-v2"):
        yield f"elasticPolicy: rdzvBackend {elastic.get('rdzvBackend')} is none"
    if "nProcPerNode" in elastic and "nprocPerNode" in spec:
        yield "elasticPolicy: nProcPerNode beside nprocPerNode"
    if not re.fullmatch(r"auto|cpu|gpu|[1-9]\d*", spec.get("nprocPerNode", "auto")):
        yield f"nprocPerNode: {spec['nprocPerNode']} is no number of ranks"


def _queue(doc: Document) -> Iterator[str]:
    queue = doc["metadata"].get("labels", {}).get(QUEUE)
    if doc["kind"] != "TrainingRuntime" and not (queue and DNS_1123.fullmatch(queue)):
        yield f"no label {QUEUE}, or no name of a queue"
    # kubernetes-sigs/kueue:pkg/controller/jobframework/defaults.go, ApplyDefaultForSuspend.
    if "suspend" in doc["spec"] or "suspend" in doc["spec"].get("runPolicy", {}):
        yield "suspend: Kueue's to set; applied again, the manifest would undo what Kueue decided"
