"""The checks by name, and faults that they have to report: one for each thing that they look at."""

import re
from collections.abc import Callable
from typing import Any

import k8s_launch
import k8s_operators
import k8s_policy
import k8s_restarts
import k8s_schema
import k8s_values
from k8s_manifests import Document, documents

CHECKS: dict[str, Callable[[list[Document]], list[str]]] = {
    "schema": k8s_schema.check_core,
    "values": k8s_values.check,
    "operators": k8s_operators.check,
    "restarts": k8s_restarts.check,
    "policy": k8s_policy.check,
    "launch": k8s_launch.check,
}
GONE = object()  # in place of a value: the field is not there
RULES = "spec.failurePolicy.rules"
STEP = "spec.template.spec.replicatedJobs.0.template"
GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"
POD = {  # the pod template of each kind
    "Job": "spec.template",
    "JobSet": "spec.replicatedJobs.0.template.spec.template",
    "TrainingRuntime": f"{STEP}.spec.template",
    "PyTorchJob": "spec.pytorchReplicaSpecs.Worker.template",
    "RayJob": f"{GROUP}.template",
}
OVERLAY = dict.fromkeys(("TrainJob", "TrainingRuntime"), "trainjob") | {"Job": "cpu-demo"}
ARGS = ["--config", "/etc/dlora/cluster.yaml", "--output.dir", "/runs/jobset"]
RAY = (
    "python -m dlora.launchers.ray_train --config /etc/dlora/cluster.yaml --output.dir /runs/rayjob"
)


def planted(kind: str, path: str, value: Any) -> list[Document]:
    """The documents of an overlay, one of which has `value` at `path`.

    Args:
        kind: that document's kind, or kind/name.
        path: words with dots; ~ is a dot inside a word; POD is the pod template of the kind, C
            that one's container.
    """
    kind, _, name = kind.partition("/")
    overlay = OVERLAY.get(kind, kind.lower() if kind in POD else "jobset")
    docs = documents("rayjob" if "rayjob" in name else overlay)
    target: Any = next(d for d in docs if d["kind"] == kind and name in d["metadata"]["name"])
    path = re.sub(r"^C\b", "POD.spec.containers.0", path).replace("POD", POD.get(kind, ""))
    *keys, last = (key.replace("~", ".") for key in path.split("."))
    for key in keys:
        target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
    place: Any = int(last) if isinstance(target, list) else last
    if value is GONE:
        del target[place]
    else:
        target[place] = value
    return docs


# check: (kind, path, value, what the report has to contain)
FAULTS: dict[str, list[tuple[str, str, Any, str]]] = {
    "schema": [
        ("Job", "spec.completionmode", "Indexed", "completionmode"),
        ("RayJob", "POD.spec.terminationGracePeriodSecond", 180, "GracePeriodSecond"),
    ],
    "custom": [
        ("JobSet", "spec.replicatedJob", [], "unknown field replicatedJob"),
        ("JobSet", "C.env.1.name", "PET_NNODES", "twice"),
        ("JobSet", "spec.failurePolicy.maxRestarts", 2**31, "int32"),
        ("RayJob", "spec.rayClusterSpec.rayVersion", 2.60, "2.6 is not of type"),
        ("TrainJob", "metadata.name", "1-train", "1035"),
        ("PyTorchJob", "apiVersion", "kubeflow.org/v2", "no definition"),
    ],
    "values": [
        ("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "Exitcode", "'Exitcode'"),
        ("PyTorchJob", "spec.runPolicy.cleanPodPolicy", "running", "'running'"),
        ("RayJob", "spec.submissionMode", "K8SJobMode", "'K8SJobMode'"),
        ("Job", "POD.spec.restartPolicy", "OnFailure", "not for a Job"),
        ("Job", "spec.podFailurePolicy.rules.0.onExitCodes.containerName", "x", "not there"),
        ("TrainJob", "spec.trainer.resourcesPerNode.limits.nvidia~com/gpu", 8, "8 is no quoted"),
        ("JobSet", "C.resources.limits.nvidia~com/gpu", "16", "with its limit"),
        ("Job", "metadata.name", "d" * 64, "no name for it"),
        ("Job", "C.volumeMounts.0.name", "config", "no volume config"),
        ("Job", "C.volumeMounts.0.mountPath", "/runs", "twice"),
        ("ConfigMap", "metadata.name", "dlora-configs", "no ConfigMap"),
    ],
    "operators": [
        ("RayJob", "metadata.name", "r" * 48, "at most 47"),
        ("RayJob", "spec.shutdownAfterJobFinishes", False, "suspends it"),
        ("RayJob", "spec.rayClusterSpec.rayVersion", "2.51.0", "knows no tokens"),
        ("RayJob", "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "K8sTokenAuth"),
        ("RayJob", f"{GROUP}.minReplicas", 3, "does not hold"),
        ("RayJob", f"{GROUP}.groupName", "head", "with the name head"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "1"}, "num-cpus"),
        ("RayJob", f"{GROUP}.rayStartParams.labels", "a=b", "labels are"),
        ("RayJob", "spec.rayClusterSpec.enableInTreeAutoscaling", True, "that grows"),
        ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "x"}, "there already"),
        ("RayJob", "spec.ttlSecondsAfterFinished", -1, "below 0"),
        ("RayJob", "spec.activeDeadlineSeconds", 0, "not above 0"),
        ("RayJob", "spec.submissionMode", "SidecarMode", "submitterConfig"),
        ("PyTorchJob", "spec.runPolicy.suspend", False, "Kueue's to set"),
        ("JobSet", "metadata.labels.kueue~x-k8s~io/queue-name", GONE, "no label"),
        ("JobSet", "metadata.labels.kueue~x-k8s~io/queue-name", "A_b", "no name of a queue"),
        ("JobSet", "metadata.name", "other", "not the first pod"),
        ("JobSet", "metadata.name", "j" * 50, "no name of a host"),
        ("JobSet", f"{RULES}.0.name", "wrong-configuration", "no name of a rule"),
        ("JobSet", f"{RULES}.0.name", "w" * 129, "no name of a rule"),
        ("JobSet", f"{RULES}.0.targetReplicatedJobs", ["nodes"], "there is no nodes"),
        ("TrainJob", "metadata.name", "t" * 50, "no name of a host"),
        (
            "TrainingRuntime",
            f"{STEP}.spec.template.spec.containers.0.env",
            [{"name": "PET_NODE_RANK"}],
            "sets PET_NODE",
        ),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.replicas", 2, "takes 1 alone"),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.name", "nodes", "PET_MASTER_ADDR"),
        ("TrainingRuntime", f"spec.template.{RULES}.0.name", "a-b", "no name of a rule"),
        ("JobSet", f"{RULES}.0.onJobFailureReasons.0", "Policy", "no reason"),
        ("TrainJob", "spec.trainer.env", [{"name": "PET_NNODES"}], "PET_NNODES"),
        ("TrainJob", "spec.runtimeRef.kind", GONE, "no ClusterTrainingRuntime"),
        ("TrainingRuntime", "C.name", "main", "with the name node"),
        ("TrainingRuntime", f"{STEP}.metadata.labels", {}, "ancestor-step"),
        ("PyTorchJob", "C.name", "main", "with the name pytorch"),
        ("PyTorchJob", "metadata.name", "1-run", "no name of a host"),
        ("PyTorchJob", "C.image", GONE, "without an image"),
        ("PyTorchJob", "spec.pytorchReplicaSpecs.Launcher", {"replicas": 1}, "needs Worker"),
        ("PyTorchJob", "spec.nprocPerNode", "8x", "no number of ranks"),
        ("PyTorchJob", "spec.elasticPolicy.nProcPerNode", 8, "beside nprocPerNode"),
        ("PyTorchJob", "spec.elasticPolicy.rdzvBackend", "static", "is none"),
        ("PyTorchJob", "spec.elasticPolicy.minReplicas", 3, "does not hold"),
    ],
    "restarts": [
        ("Job", "POD.spec.terminationGracePeriodSeconds", GONE, "cuts a commit"),
        ("Job", "spec.podFailurePolicy.rules.2", GONE, "after DisruptionTarget"),
        ("Job", "spec.backoffLimit", 0, "after 1 it fails"),
        ("JobSet", f"{RULES}.0.onJobFailureMessagePatterns", GONE, "143 it fails"),
        ("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "Never", "no exit"),
        ("PyTorchJob", "spec.elasticPolicy.maxRestarts", 3, "agent would try"),
        ("RayJob", "spec.backoffLimit", 2, "tries exit status 2"),
        ("RayJob", "C.env", GONE, "Ray's '30' s cut a commit short"),
    ],
    "policy": [
        ("RayJob", "C.securityContext.privileged", True, "securityContext"),
        ("Job", "POD.spec.securityContext.runAsUser", 0, "securityContext"),
        ("Job", "C.image", "dlora:latest", "not pinned"),
        ("TrainingRuntime", "C.resources.limits.memory", GONE, "without a limit"),
        ("Job", "C.ports", [{"containerPort": 1, "hostPort": 1}], "hostPort"),
        ("JobSet", "C.env.0", {"name": "HF_TOKEN", "value": "x"}, "in clear"),
        ("PyTorchJob", "C.args", ["--token=abcdef"], "command line"),
        ("RayJob", "spec.entrypoint", "python x.py --token abcdef", "entry point"),
        ("RayJob", "spec.rayClusterSpec.authOptions.secretName", GONE, "Secret"),
        ("JobSet", "C.volumeMounts.5", GONE, "/dev/shm"),
        ("Job", "POD.spec.hostNetwork", True, "hostNetwork"),
        ("Job", "POD.spec.volumes.0", {"name": "a", "hostPath": {"path": "/"}}, "restricted"),
        ("Job", "POD.spec.automountServiceAccountToken", GONE, "serviceAccountName"),
        ("NetworkPolicy/dlora-jobset", "spec.ingress.0.from", GONE, "lets in"),
        ("NetworkPolicy/dlora-jobset", "spec.ingress", GONE, "do not reach it"),
        ("NetworkPolicy/dlora-rayjob", "spec.ingress.1.ports", GONE, "lets in"),
        ("NetworkPolicy/dlora-deny", "spec.podSelector.matchLabels.x", "y", "refuses"),
        ("ServiceAccount", "automountServiceAccountToken", GONE, "hands out a token"),
        ("ServiceAccount", "kind", "RoleBinding", "nothing here needs the API"),
        ("ConfigMap", "kind", "Secret", "in the repository"),
        ("ConfigMap", "metadata.namespace", GONE, "namespace"),
        ("Namespace", "metadata.labels.pod-security~kubernetes~io/enforce", "x", "security"),
    ],
    "launch": [
        ("JobSet", "C.command.3", "lunch", "starts no run"),
        ("TrainJob", "spec.trainer.args.1", "/etc/dlora/none.yaml", "not in the ConfigMap"),
        ("JobSet", "C.args.2", "--output.dri", "output.dri"),
        ("JobSet", "C.args.3", "/cache/run", "no volume that all pods see"),
        ("JobSet", "C.args", [*ARGS, "--sharding.base", "world"], "shards over nodes"),
        ("JobSet", "C.args", [*ARGS, "--output.resume", "none"], "begin there again"),
        ("JobSet", "C.volumeMounts.3", GONE, "/cache/: is lost"),
        ("JobSet", "C.env.0.value", "3", "pods for 3 nodes"),
        ("JobSet", "C.env.3", GONE, "where to meet"),
        ("TrainJob", "spec.trainer.numProcPerNode", 4, "4 ranks on 8 GPUs"),
        ("PyTorchJob", "POD.spec.affinity.podAntiAffinity", GONE, "to one node"),
        ("JobSet", "C.livenessProbe.exec.command.1", "/runs/x", "does not look at"),
        ("JobSet", "C.livenessProbe.exec.command.2", "60", "time-out"),
        ("RayJob", f"{GROUP}.replicas", 3, "24 GPUs"),
        ("RayJob", "spec.entrypoint", f"{RAY} --num-worker 16", "num-worker"),
        ("RayJob", "spec.entrypoint", f"{RAY} --num-workers 16 --use-gpu", "--storage"),
    ],
}
