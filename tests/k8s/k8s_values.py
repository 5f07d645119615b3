"""What the schemas let through although an API server does not: enums, quantities, names."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from k8s_manifests import Document, Pod, jobs, pods, walk

# Allowed values by the last words of a path; the longest that fits counts.
ENUMS = {
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "policyTypes": {"Ingress", "Egress"},
    "completionMode": {"Indexed", "NonIndexed"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "pytorchReplicaSpecs.*.restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "fsGroupChangePolicy": {"Always", "OnRootMismatch"},
    "seccompProfile.type": {"RuntimeDefault", "Localhost", "Unconfined"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "medium": {"", "Memory"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "cleanPodPolicy": {"All", "Running", "None"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
    "podFailurePolicy.rules.*.action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes.operator": {"In", "NotIn"},
    "tolerations.*.operator": {"Exists", "Equal", "Lt", "Gt"},
    "matchExpressions.*.operator": {"In", "NotIn", "Exists", "DoesNotExist"},
}
QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(([KMGTPE]i)|[numkMGTPE]|[eE][+-]?\d+)?")
UNITS = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGT", 1)},
    "m": Decimal("0.001"),
    "": Decimal(1),
}
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of DNS
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
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
    for where, _, spec in jobs(docs):
        problems += [f"{where}: {line}" for line in _job(spec)]
    return problems


def _enums(doc: Document) -> Iterator[str]:
    for path, mapping in walk(doc):
        for key, value in mapping.items():
            words = re.sub(r"\.(\d+)(?=\.|$)", ".*", f"{path}.{key}").split(".")
            if key == "restartPolicy" and len(words) > 2 and words[-3] == "pytorchReplicaSpecs":
                words[-2] = "*"
            for length in range(len(words), 0, -1):
                allowed = ENUMS.get(".".join(words[-length:]))
                if allowed is None:
                    continue
                for word in value if isinstance(value, list) else [value]:
                    if word not in allowed:
                        yield f"{path}.{key}: {word!r} is none of {', '.join(sorted(allowed))}"
                break


def amount(quantity: Any) -> Decimal:
    """A quantity as a number.

    Raises:
        ValueError: it is none.
    """
    text = str(quantity)
    if isinstance(quantity, bool) or not QUANTITY.fullmatch(text):
        raise ValueError(f"{text!r} is no quantity")
    number = re.match(r"[+-]?[\d.]+", text)
    assert number
    return Decimal(number[0]) * UNITS[text[number.end() :]]


def _quantities(doc: Document) -> Iterator[str]:
    for path, mapping in walk(doc):
        found = {key: mapping[key] for key in ("sizeLimit", "nominalQuota") if key in mapping}
        last = path.rpartition(".")[2]
        if last in ("requests", "limits"):
            found = mapping
        for key, value in found.items():
            try:
                amount(value)
            except (ValueError, KeyError) as error:
                yield f"{path}.{key}: {error}"
                continue
        requests, limits = mapping.get("requests"), mapping.get("limits")
        if isinstance(requests, dict) and isinstance(limits, dict):
            yield from _ordered(path, requests, limits)


def _ordered(path: str, requests: Document, limits: Document) -> Iterator[str]:
    for key in requests.keys() & limits.keys():
        try:
            more, equal = amount(requests[key]) - amount(limits[key]), "/" in key
        except (ValueError, KeyError):
            continue  # told already
        if more > 0 or (more and equal):
            yield f"{path}: requests {requests[key]} of {key}, which does not go with its limit"


def _names(docs: list[Document]) -> Iterator[str]:
    seen = set()
    for doc in docs:
        name, kind = doc["metadata"]["name"], doc["kind"]
        pattern = LABEL if kind in SHORT else SUBDOMAIN
        if not pattern.fullmatch(name) or len(name) > (63 if kind in SHORT else 253):
            yield f"{kind} {name}: no name for it"
        key = kind, doc["metadata"].get("namespace"), name
        if key in seen:
            yield f"{kind} {name}: stands there twice"
        seen.add(key)
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
        if not LABEL.fullmatch(name):
            yield f"{name}: no name for a container or a volume"
        if names.count(name) > 1:
            yield f"{name}: stands there twice"
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
    if pod.spec.get("terminationGracePeriodSeconds", 0) < 0:
        yield "terminationGracePeriodSeconds: is negative"


def _references(pod: Pod, docs: list[Document]) -> Iterator[str]:
    """Names of what has to be there: volumes in the pod, the rest among the documents."""
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}
    if pod.owner["kind"] == "Pod":
        return  # k8s/files uses what the overlays make
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for container in pod.containers:
        places = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"volumeMounts: there is no volume {mount['name']}"
            if places.count(mount["mountPath"]) > 1:
                yield f"volumeMounts: {mount['mountPath']} stands there twice"
    wanted = [("ServiceAccount", pod.spec.get("serviceAccountName"))]
    for volume in volumes.values():
        if "configMap" in volume:
            wanted.append(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for need in wanted:
        if need not in there:
            yield f"there is no {need[0]} {need[1]}"


def _job(spec: Document) -> Iterator[str]:
    pod = spec["template"]["spec"]
    policy = pod.get("restartPolicy")
    if policy not in ("Never", "OnFailure"):
        yield f"restartPolicy: {policy} is not for a Job"
    if "podFailurePolicy" in spec and policy != "Never":
        yield "podFailurePolicy: needs restartPolicy Never"
    names = {container["name"] for container in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        container = rule.get("onExitCodes", {}).get("containerName")
        if container is not None and container not in names:
            yield f"podFailurePolicy: there is no container {container}"
        if 0 in rule.get("onExitCodes", {}).get("values", []):
            yield "podFailurePolicy: 0 is no failure"
