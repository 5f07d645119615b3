"""Faults of security."""

from k8s_fault import GONE, POD, Fault

POLICY = [
    Fault("policy", kind, path, value, says)
    for kind in POD
    for path, value, says in (
        ("C.securityContext.privileged", True, "privileged"),
        ("C.securityContext.allowPrivilegeEscalation", GONE, "allowPrivilegeEscalation"),
        ("C.securityContext.readOnlyRootFilesystem", False, "root file system"),
        ("C.securityContext.readOnlyRootFilesystem", GONE, "root file system"),
        ("C.securityContext.capabilities.add", ["NET_ADMIN"], "capabilities"),
        ("C.securityContext.capabilities.drop", GONE, "capabilities"),
        ("C.securityContext.runAsUser", 0, "root's"),
        ("C.image", "dlora:latest", "not pinned"),
        ("C.resources.limits.memory", GONE, "without a limit"),
        ("POD.spec.securityContext.runAsNonRoot", GONE, "runAsNonRoot"),
        ("POD.spec.securityContext.runAsUser", 0, "root's"),
        ("POD.spec.securityContext.seccompProfile", GONE, "seccompProfile"),
        ("POD.spec.securityContext.seccompProfile.type", "Unconfined", "seccompProfile"),
        ("POD.spec.automountServiceAccountToken", GONE, "automountServiceAccountToken"),
        ("POD.spec.serviceAccountName", GONE, "serviceAccountName"),
        ("POD.spec.hostNetwork", True, "hostNetwork"),
        ("POD.spec.volumes.0", {"name": "configs", "hostPath": {"path": "/"}}, "restricted"),
        ("POD.metadata.labels.dlora-job", GONE, "no label dlora-job"),
        ("POD.metadata.labels.dlora-job", "other", "own job's pods"),
        ("C.env", [{"name": "HF_TOKEN", "value": "x"}], "in clear"),
        ("C.args", ["--token=abcdef"], "in clear"),
    )
] + [
    Fault("policy", "RayJob", "spec.rayClusterSpec.authOptions", GONE, "token"),
    Fault("policy", "RayJob", "spec.rayClusterSpec.authOptions.mode", "disabled", "token"),
    Fault("policy", "RayJob", "spec.rayClusterSpec.authOptions.secretName", GONE, "Secret"),
    Fault("policy", "RayJob", "spec.entrypoint", "python x.py --token abcdef", "in clear"),
    Fault("policy", "JobSet", "C.volumeMounts.5", GONE, "/dev/shm"),
    Fault("policy", "NetworkPolicy/dlora-jobset", "spec.ingress", GONE, "own job's pods"),
    Fault("policy", "NetworkPolicy/dlora-jobset", "spec.ingress.0.from", GONE, "lets in"),
    Fault(
        "policy",
        "NetworkPolicy/dlora-jobset",
        "spec.ingress.0.from.0",
        {"podSelector": {}},
        "lets in",
    ),
    Fault(
        *("policy", "NetworkPolicy/dlora-jobset", "spec.podSelector.matchLabels.dlora-job"),
        *("x", "own job's pods"),
    ),
    Fault("policy", "NetworkPolicy/dlora-deny", "spec.podSelector.matchLabels.x", "y", "refuses"),
    *[
        Fault(
            *("policy", "NetworkPolicy/dlora-deny", "spec.podSelector.matchExpressions"),
            *([{"key": "dlora-job"} | expression], "refuses"),
        )
        for expression in (
            {"operator": "In", "values": ["rayjob"]},
            {"operator": "NotIn", "values": ["jobset"]},
            {"operator": "DoesNotExist"},
        )
    ],
    Fault("policy", "ServiceAccount", "automountServiceAccountToken", GONE, "hands out a token"),
    Fault("policy", "ServiceAccount", "kind", "RoleBinding", "nothing here needs the API"),
    Fault("policy", "ConfigMap", "kind", "Secret", "in the repository"),
    Fault("policy", "ConfigMap", "metadata.namespace", GONE, "namespace"),
    Fault(
        *("policy", "Namespace", "metadata.labels.pod-security~kubernetes~io/enforce"),
        *("baseline", "not restricted"),
    ),
]
