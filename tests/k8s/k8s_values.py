"""What the schemas let through although an API server or an operator does not: enums, quantities,
names, and references to what is not there."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from k8s_manifests import Document, Pod, at, jobs, pods, walk

# Allowed values by the end of a path, a regular expression; the first that fits counts.
ENUMS = {
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "policyTypes": {"Ingress", "Egress"},
    "completionMode": {"Indexed", "NonIndexed"},
    r"pytorchReplicaSpecs\.\w+\.restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory"},
    "protocol": {"TCP", "UDP", "SCTP"},
    # kubeflow/training-operator:pkg/apis/kubeflow.org/v1/common_types.go: CleanPodPolicy
    "cleanPodPolicy": {"All", "Running", "None"},
    # ray-project/kuberay:ray-operator/apis/ray/v1/rayjob_types.go: JobSubmissionMode
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
    r"podFailurePolicy\.rules\.\d+\.action": {"FailJob", "FailIndex", "Ignore", "Count"},
    r"onExitCodes\.operator": {"In", "NotIn"},
    r"tolerations\.\d+\.operator": {"Exists", "Equal", "Lt", "Gt"},
    r"onPodConditions\.\d+\.status": {"True", "False", "Unknown"},
    r"onPodConditions\.\d+\.type": {"DisruptionTarget"},
    "fsGroupChangePolicy": {"Always", "OnRootMismatch"},
    r"seccompProfile\.type": {"RuntimeDefault", "Unconfined", "Localhost"},
    r"capabilities\.(drop|add)": {"ALL", "NET_BIND_SERVICE"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    "preemptionPolicy": {"Never", "PreemptLowerPriority"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "mountPropagation": {"None", "HostToContainer", "Bidirectional"},
    "volumeMode": {"Filesystem", "Block"},
    "scheme": {"HTTP", "HTTPS"},
    # The definitions have these; the tests also run without them.
    # kubernetes-sigs/jobset:api/jobset/v1alpha2/jobset_types.go, FailurePolicyAction
    r"failurePolicy\.rules\.\d+\.action": {
        *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
        *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
    },
    # ray-project/kuberay:ray-operator/apis/ray/v1/raycluster_types.go, AuthMode
    r"authOptions\.mode": {"disabled", "token"},
    r"matchExpressions\.\d+\.operator": {"In", "NotIn", "Exists", "DoesNotExist"},
}
UNITS = {"": Decimal(1), "m": Decimal("0.001")} | {
    unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)
}
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of DNS; names of most kinds too
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")  # of a label


def check(docs: list[Document]) -> list[str]:
    """What is wrong with values of all kinds."""
    problems = [*_names(docs)]
    for doc in docs:
        problems += [f"{doc['kind']} {line}" for line in (*_enums(doc), *_quantities(doc))]
    for pod in pods(docs):
        if pod.owner["kind"] != "Pod":  # k8s/files uses what the overlays make
            problems += [f"{pod.where}: {line}" for line in _references(pod, docs)]
    for doc, spec in jobs(docs):
        problems += [f"{doc['kind']}: {line}" for line in _job(spec)]
    return problems


def _enums(doc: Document) -> Iterator[str]:
    for path, mapping in walk(doc):
        for key, value in mapping.items():
            place = f"{path}.{key}"
            ends = (words for end, words in ENUMS.items() if re.search(rf"\b{end}$", place))
            allowed = next(ends, None)
            for word in value if isinstance(value, list) else [value]:
                if allowed is not None and word not in allowed:
                    yield f"{place}: {word!r} is none of {', '.join(sorted(allowed))}"


def amount(quantity: Any) -> Decimal:
    """A quantity as a number.

    Raises:
        ValueError: it is no quantity, or a bare number. Operators store a quantity as a string, so
            that a number, applied again, is a change.
    """
    found = isinstance(quantity, str) and re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", quantity)
    if not found or found[2] not in UNITS:
        raise ValueError(f"{quantity!r} is no quoted quantity")
    return Decimal(found[1]) * UNITS[found[2]]


def _quantities(doc: Document) -> Iterator[str]:
    for path, mapping in walk(doc):
        try:
            yield from _amounts(path, mapping)
        except ValueError as error:
            yield f"{path}: {error}"


def _amounts(path: str, mapping: Document) -> Iterator[str]:
    for key, value in mapping.items():
        if path.endswith((".requests", ".limits")) or key in ("sizeLimit", "nominalQuota"):
            amount(value)
    requests, limits = mapping.get("requests", {}), mapping.get("limits", {})
    for key in requests.keys() & limits.keys():
        more = amount(requests[key]) - amount(limits[key])
        if more > 0 or (more and "/" in key):
            yield f"{path}: requests {requests[key]} of {key}, which does not go with its limit"


def _names(docs: list[Document]) -> Iterator[str]:
    named = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in docs]
    for doc, (kind, _, name) in zip(docs, named, strict=True):
        if not LABEL.fullmatch(name) or len(named) > len(set(named)):
            yield f"{kind} {name}: no name for it, or there twice"
        for path, mapping in walk(doc):
            for label, value in mapping.items():
                if path.endswith(("labels", "matchLabels")) and not VALUE.fullmatch(value):
                    yield f"{kind} {path}.{label}: {value!r} is no label"


def _references(pod: Pod, docs: list[Document]) -> Iterator[str]:
    """Names of what has to be there: volumes in the pod, the rest among the documents."""
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    wanted = {("ServiceAccount", pod.spec.get("serviceAccountName"))}
    wanted |= {("ConfigMap", name) for name in at(pod.spec, "volumes.*.configMap.name")}
    claims = at(pod.spec, "volumes.*.persistentVolumeClaim.claimName")
    wanted |= {("PersistentVolumeClaim", name) for name in claims}
    there |= {("volume", name) for name in at(pod.spec, "volumes.*.name")}
    wanted |= {("volume", name) for name in at(pod.spec, "containers.*.volumeMounts.*.name")}
    for kind, name in sorted(wanted - there, key=str):
        yield f"there is no {kind} {name}"
    for container in pod.containers:
        places = [*at(container, "volumeMounts.*.mountPath")]
        if not LABEL.fullmatch(container["name"]) or len(set(places)) < len(places):
            yield f"{container['name']}: no name for a container, or a path is mounted twice"


def _job(spec: Document) -> Iterator[str]:
    policy = spec["template"]["spec"].get("restartPolicy")
    codes = [*at(spec, "podFailurePolicy.rules.*.onExitCodes")]
    if policy != "Never":
        yield f"restartPolicy: {policy} is not for a Job with a podFailurePolicy"
    names = {*at(spec, "template.spec.containers.*.name")}
    if any(code["containerName"] not in names or 0 in code["values"] for code in codes):
        yield f"podFailurePolicy: a container that is not there, or 0, in {codes}"
