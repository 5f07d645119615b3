"""What the schemas let through although an API server or an operator does not: enums, quantities,
names, and references to what is not there."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from k8s_manifests import Document, Pod, jobs, pods, walk

# Allowed values by the end of a path, a regular expression; the first that fits counts.
POD_RESTARTS = {"Always", "OnFailure", "Never"}
ENUMS = {
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "policyTypes": {"Ingress", "Egress"},
    "completionMode": {"Indexed", "NonIndexed"},
    r"pytorchReplicaSpecs\.\w+\.restartPolicy": POD_RESTARTS | {"ExitCode"},
    "restartPolicy": POD_RESTARTS,
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "fsGroupChangePolicy": {"Always", "OnRootMismatch"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory"},
    "protocol": {"TCP", "UDP", "SCTP"},
    # training-operator 1.9, pkg/apis/kubeflow.org/v1/common_types.go: CleanPodPolicy
    "cleanPodPolicy": {"All", "Running", "None"},
    # KubeRay 1.7, ray-operator/apis/ray/v1/rayjob_types.go: JobSubmissionMode
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
    r"podFailurePolicy\.rules\.\d+\.action": {"FailJob", "FailIndex", "Ignore", "Count"},
    r"onExitCodes\.operator": {"In", "NotIn"},
    r"tolerations\.\d+\.operator": {"Exists", "Equal", "Lt", "Gt"},
    r"matchExpressions\.\d+\.operator": {"In", "NotIn", "Exists", "DoesNotExist"},
}
UNITS = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGT", 1)},
    "m": Decimal("0.001"),
    "": Decimal(1),
}
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of DNS
SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){LABEL.pattern}(\.{LABEL.pattern})*")
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")  # of a label
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Kinds whose name becomes part of host names and labels, so that it has to be short.
SHORT = {"Job", "JobSet", "TrainJob", "PyTorchJob", "RayJob", "Namespace"}


def check(docs: list[Document]) -> list[str]:
    """What is wrong with values of all kinds."""
    problems = [*_names(docs)]
    for doc in docs:
        problems += [f"{doc['kind']} {line}" for line in (*_enums(doc), *_quantities(doc))]
    for pod in pods(docs):
        problems += [f"{pod.where}: {line}" for line in (*_pod(pod), *_references(pod, docs))]
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
    for doc, (kind, namespace, name) in zip(docs, named, strict=True):
        if not (LABEL if kind in SHORT else SUBDOMAIN).fullmatch(name):
            yield f"{kind} {name}: no name for it"
        if named.count((kind, namespace, name)) > 1:
            yield f"{kind} {name}: is there twice"
        for path, mapping in walk(doc):
            if path.endswith(("labels", "matchLabels")):
                for label, value in mapping.items():
                    prefix, _, word = label.rpartition("/")
                    if not (word and VALUE.fullmatch(word) and VALUE.fullmatch(str(value))):
                        yield f"{kind} {path}.{label}: {value!r} is no label"
                    if prefix and not SUBDOMAIN.fullmatch(prefix):
                        yield f"{kind} {path}.{label}: no prefix of a label"


def _pod(pod: Pod) -> Iterator[str]:
    names = [item["name"] for item in (*pod.containers, *pod.spec.get("volumes", []))]
    for name in names:
        if not LABEL.fullmatch(name) or names.count(name) > 1:
            yield f"{name}: no name for a container or a volume, or there twice"
    for container in pod.containers:
        for variable in container.get("env", []):
            if not VARIABLE.fullmatch(variable["name"]):
                yield f"{variable['name']}: no name for a variable"
        for port in container.get("ports", []):
            if not 0 < port["containerPort"] < 65536 or len(port.get("name", "")) > 15:
                yield f"{port}: no port"
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            ways = {"exec", "httpGet", "tcpSocket", "grpc"} & container.get(kind, {}).keys()
            if kind in container and len(ways) != 1:
                yield f"{kind}: asks in {len(ways)} ways"


def _references(pod: Pod, docs: list[Document]) -> Iterator[str]:
    """Names of what has to be there: volumes in the pod, the rest among the documents."""
    if pod.owner["kind"] == "Pod":
        return  # k8s/files uses what the overlays make
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    wanted = {("ServiceAccount", pod.spec.get("serviceAccountName"))}
    for volume in pod.spec.get("volumes", []):
        there.add(("volume", volume["name"]))
        if "configMap" in volume:
            wanted.add(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in pod.containers:
        mounts = container.get("volumeMounts", [])
        wanted |= {("volume", mount["name"]) for mount in mounts}
        if len({mount["mountPath"] for mount in mounts}) < len(mounts):
            yield "volumeMounts: a path is there twice"
    for kind, name in sorted(wanted - there, key=str):
        yield f"there is no {kind} {name}"


def _job(spec: Document) -> Iterator[str]:
    policy = spec["template"]["spec"].get("restartPolicy")
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    if policy not in ("Never", "OnFailure"):
        yield f"restartPolicy: {policy} is not for a Job"
    if rules and policy != "Never":
        yield "podFailurePolicy: needs restartPolicy Never"
    names = {container["name"] for container in spec["template"]["spec"]["containers"]}
    for codes in [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]:
        if codes.get("containerName") not in names | {None}:
            yield f"podFailurePolicy: there is no container {codes['containerName']}"
        if 0 in codes["values"]:
            yield "podFailurePolicy: 0 is no failure"
