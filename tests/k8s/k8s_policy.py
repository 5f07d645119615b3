"""Pod security (the restricted profile and more), secrets, and who reaches whom."""

import re
from collections.abc import Iterator

from k8s_manifests import Document, Pod, pods

SECRET = re.compile(r"TOKEN|SECRET|PASSW|(^|_)KEY|CREDENTIAL", re.IGNORECASE)
# --token X, token=X, Bearer X and keys as AWS and the hub write them
IN_CLEAR = re.compile(r"(token|secret|password)[=: ]+\S|Bearer \S|AKIA[A-Z0-9]{8}|hf_\w{8}", re.I)
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ResourceFlavor", "ClusterQueue"}
OWN, JOB = "app.kubernetes.io/part-of", "dlora-job"
DASHBOARD = 8265


def check(docs: list[Document]) -> list[str]:
    """What is less than safe."""
    problems = [*_documents(docs)]
    for pod in pods(docs):
        lines = [*_host(pod), *_user(pod), *_containers(pod), *_environment(pod)]
        if pod.owner["kind"] != "Pod":
            lines += [*_reach(pod, docs), *_memory(pod)]
        problems += [f"{pod.where}: {line}" for line in lines]
    return problems


def _documents(docs: list[Document]) -> Iterator[str]:
    for doc in docs:
        kind = doc["kind"]
        if kind == "Namespace":
            level = doc["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
            if level != "restricted":
                yield f"Namespace: pod security enforces {level}, not restricted"
        if kind == "Secret":
            yield "Secret: its values would lie in the repository"
        if kind.endswith(("Role", "RoleBinding")):
            yield f"{kind}: nothing here needs the API"
        if kind == "ServiceAccount" and doc.get("automountServiceAccountToken") is not False:
            yield "ServiceAccount: hands out a token"
        if kind not in CLUSTER_WIDE and "namespace" not in doc["metadata"]:
            yield f"{kind}: in no namespace of its own"
        if kind == "RayJob":
            options = doc["spec"]["rayClusterSpec"].get("authOptions", {})
            if options.get("mode") != "token" or not options.get("secretName"):
                yield "RayJob: Ray's token does not come from a Secret"


def _host(pod: Pod) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if pod.spec.get(key):
            yield f"{key} is on"
    for volume in pod.spec.get("volumes", []):
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}
        if not allowed & volume.keys():
            yield f"volume {volume['name']} is of a kind that restricted pods may not have"


def _user(pod: Pod) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not on"
    for inner in (context, *(c.get("securityContext", {}) for c in pod.containers)):
        for key in ("runAsUser", "runAsGroup", "fsGroup"):
            if inner.get(key) == 0:
                yield f"{key} is root's"
        if inner.get("runAsNonRoot") is False:
            yield "runAsNonRoot is off"
    if not context.get("runAsUser"):
        yield "runAsUser is not set"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile is not RuntimeDefault"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not off"
    if pod.spec.get("serviceAccountName") in (None, "default"):
        yield "serviceAccountName is the namespace's default"


def _containers(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        name, context = container["name"], container.get("securityContext", {})
        if context.get("privileged"):
            yield f"{name}: privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation is not off"
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: its root file system is writable"
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{name}: has capabilities"
        if context.get("seccompProfile", {}).get("type", "RuntimeDefault") != "RuntimeDefault":
            yield f"{name}: seccompProfile is not RuntimeDefault"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield f"{name}: hostPort"
        if re.search(r":latest$|^[^:]+$", container["image"].rpartition("/")[2]):
            yield f"{name}: the image {container['image']} is not pinned"
        resources = container.get("resources", {})
        if not all("memory" in resources.get(kind, {}) for kind in ("requests", "limits")):
            yield f"{name}: takes memory without a limit"


def _environment(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]) and "value" in variable:
                yield f"{container['name']}: {variable['name']} in clear"
        words = (*container.get("command", []), *container.get("args", []))
        if IN_CLEAR.search(" ".join(words)):
            yield f"{container['name']}: a secret in clear on its command line"
    if IN_CLEAR.search(str(pod.owner["spec"].get("entrypoint", ""))):
        yield "a secret in clear in the entry point"


def _reach(pod: Pod, docs: list[Document]) -> Iterator[str]:
    """A policy that refuses all, and one that lets the job's own pods in."""
    policies = [doc["spec"] for doc in docs if doc["kind"] == "NetworkPolicy"]
    for key in (OWN, JOB):
        if key not in pod.labels:
            yield f"no label {key}, so no policy knows it"
    mine = [policy for policy in policies if _selects(policy["podSelector"], pod.labels)]
    if not any("Ingress" in p["policyTypes"] and not p.get("ingress") for p in mine):
        yield "no policy that refuses what is not allowed"
    sources = [rule for policy in mine for rule in policy.get("ingress", [])]
    job = {"podSelector": {"matchLabels": {JOB: pod.labels.get(JOB)}}}
    if {"from": [job]} not in sources:
        yield "its own job's pods do not reach it"
    for rule in sources:
        for source in rule.get("from") or [{}]:
            if source != job and not _is_operator(source, rule):
                yield f"lets in {source or 'everybody'}"


def _is_operator(source: Document, rule: Document) -> bool:
    """KubeRay's operator, in namespaces that are named, at the dashboard alone."""
    pod = source.get("podSelector", {}).get("matchLabels", {})
    return (
        pod == {"app.kubernetes.io/component": "kuberay-operator"}
        and bool(source.get("namespaceSelector"))
        and [port.get("port") for port in rule.get("ports", [])] == [DASHBOARD]
    )


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _meets(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def _meets(expression: Document, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]


def _memory(pod: Pod) -> Iterator[str]:
    """/dev/shm of its own where ranks are: a container's is 64 MB, which NCCL overruns."""
    shared = {v["name"] for v in pod.spec.get("volumes", []) if v.get("emptyDir", {}).get("medium")}
    for container in pod.containers:
        mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
        if "/runs" in mounts and mounts.get("/dev/shm") not in shared:
            yield f"{container['name']}: no memory behind /dev/shm"
