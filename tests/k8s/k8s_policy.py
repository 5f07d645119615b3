"""Pod security (the restricted profile and more), secrets, and who reaches whom."""

import re
from collections.abc import Iterator

from k8s_manifests import Document, Pod, pods

SECRET = re.compile(r"TOKEN|SECRET|PASSW|(^|_)KEY|CREDENTIAL", re.IGNORECASE)
# --token X, token=X, Bearer X and keys as AWS and the hub write them
IN_CLEAR = re.compile(r"(token|secret|password)[=: ]+\S|Bearer \S|AKIA[A-Z0-9]{8}|hf_\w{8}", re.I)
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "ResourceFlavor", "ClusterQueue"}
OWN, JOB = "app.kubernetes.io/part-of", "dlora-job"
DASHBOARD = {"protocol": "TCP", "port": 8265}
# In namespaces that are named beside it.
OPERATOR = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}

# The whole of both contexts: what restricted pods must set, a read-only root, and one user.
USER = 10001
POD_CONTEXT = {
    "runAsNonRoot": True,
    **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), USER),
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_CONTEXT = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}


def check(docs: list[Document]) -> list[str]:
    """What is less than safe."""
    problems = [f"{doc['kind']}: {line}" for doc in docs for line in _document(doc)]
    for pod in pods(docs):
        lines = [*_pod(pod), *(line for c in pod.containers for line in _container(pod, c))]
        if pod.owner["kind"] != "Pod":
            lines += _reach(pod, docs)
        problems += [f"{pod.where}: {line}" for line in lines]
    return problems


def _document(doc: Document) -> Iterator[str]:
    kind, metadata = doc["kind"], doc["metadata"]
    enforced = metadata.get("labels", {}).get("pod-security.kubernetes.io/enforce")
    if kind == "Namespace" and enforced != "restricted":
        yield "pod security is not restricted"
    if kind == "Secret":
        yield "its values would be in the repository"
    if kind.endswith(("Role", "RoleBinding")):
        yield "nothing here needs the API"
    if kind == "ServiceAccount" and doc.get("automountServiceAccountToken") is not False:
        yield "hands out a token"
    if kind not in CLUSTER_WIDE and "namespace" not in metadata:
        yield "in no namespace of its own"
    if kind == "RayJob":
        options = doc["spec"]["rayClusterSpec"].get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield "Ray's token does not come from a Secret"
        if IN_CLEAR.search(doc["spec"]["entrypoint"]):
            yield "a secret in clear in the entry point"


def _pod(pod: Pod) -> Iterator[str]:
    if shared := {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & pod.spec.keys():
        yield f"{shared} is on"
    if not all(VOLUMES & volume.keys() for volume in pod.spec.get("volumes", [])):
        yield "a volume is of a kind that restricted pods may not have"
    if pod.spec.get("securityContext") != POD_CONTEXT:
        yield f"securityContext is not {POD_CONTEXT}"
    token = pod.spec.get("automountServiceAccountToken"), pod.spec.get("serviceAccountName")
    if token != (False, "dlora"):
        yield f"(automountServiceAccountToken, serviceAccountName) is {token}"


def _container(pod: Pod, container: Document) -> Iterator[str]:
    if container.get("securityContext") != CONTAINER_CONTEXT:
        yield f"securityContext is not {CONTAINER_CONTEXT}"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    if re.search(r":latest$|^[^:]+$", container["image"].rpartition("/")[2]):
        yield f"the image {container['image']} is not pinned"
    resources = container.get("resources", {})
    if not all("memory" in resources.get(kind, {}) for kind in ("requests", "limits")):
        yield "takes memory without a limit"
    for variable in container.get("env", []):
        if SECRET.search(variable["name"]) and "value" in variable:
            yield f"{variable['name']} in clear"
    if IN_CLEAR.search(" ".join((*container.get("command", []), *container.get("args", [])))):
        yield "a secret in clear on its command line"
    # A container's own /dev/shm has 64 MB, which NCCL overruns.
    shared = pod.volume_at(container, "/dev/shm").get("emptyDir", {})
    if pod.trains(container) and shared.get("medium") != "Memory":
        yield "no memory behind /dev/shm"


def _reach(pod: Pod, docs: list[Document]) -> Iterator[str]:
    """One policy refuses everybody, and one lets the job's own pods in, and KubeRay's operator."""
    policies = [doc["spec"] for doc in docs if doc["kind"] == "NetworkPolicy"]
    job = {"podSelector": {"matchLabels": {JOB: pod.labels.get(JOB)}}}
    deny = {"podSelector": {"matchLabels": {OWN: "dlora"}}, "policyTypes": ["Ingress"]}
    if pod.labels.get(OWN) != "dlora" or deny not in policies:
        yield "no policy that refuses what is not allowed"
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    if job | {"policyTypes": ["Ingress"], "ingress": rules} not in policies or rules == []:
        yield f"its own job's pods do not reach it: {policies}"
    for rule in rules:
        sources = rule.get("from") or [{}]
        are_operators = all(s | OPERATOR == s and s.get("namespaceSelector") for s in sources)
        is_bound = are_operators and rule.get("ports") == [DASHBOARD]
        if rule != {"from": [job]} and not is_bound:
            yield f"lets in {rule}"
