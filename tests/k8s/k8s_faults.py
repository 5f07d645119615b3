"""The checks by name, and for each rule of theirs one fault that it has to report."""

import re
from collections.abc import Callable
from dataclasses import dataclass
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
# What begins a path: POD is the pod template of the kind, C that one's container.
POD = {
    "Job": "spec.template",
    "JobSet": "spec.replicatedJobs.0.template.spec.template",
    "TrainingRuntime": "spec.template.spec.replicatedJobs.0.template.spec.template",
    "PyTorchJob": "spec.pytorchReplicaSpecs.Worker.template",
    "RayJob": "spec.rayClusterSpec.workerGroupSpecs.0.template",
}
OVERLAY = {
    "Job": "cpu-demo",
    "TrainingRuntime": "trainjob",
    "TrainJob": "trainjob",
    "PyTorchJob": "pytorchjob",
    "RayJob": "rayjob",
}
RULES = "spec.failurePolicy.rules"
STEP = "spec.template.spec.replicatedJobs.0.template"
GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"
RAY = "python -m launchers.ray_train --config /etc/dlora/cluster.yaml --output.dir /runs/rayjob"
ARGS = ["--config", "/etc/dlora/cluster.yaml", "--output.dir", "/runs/jobset"]


@dataclass(frozen=True)
class Fault:
    """A document gets `value` at `path`.

    Args:
        kind: its kind, or kind/name.
        path: words with dots; ~ is a dot inside a word.
        says: what the report has to contain.
    """

    kind: str
    path: str
    value: Any
    says: str

    def __str__(self) -> str:
        return f"{self.kind}.{self.path.rpartition('.')[2]}-{self.says}"

    def planted(self) -> list[Document]:
        kind, _, name = self.kind.partition("/")
        docs = documents(OVERLAY.get(kind, "jobset"))
        target: Any = next(d for d in docs if d["kind"] == kind and name in d["metadata"]["name"])
        path = re.sub(r"^C\b", "POD.spec.containers.0", self.path)
        *keys, last = path.replace("POD", POD.get(kind, "")).split(".")
        for key in keys:
            key = key.replace("~", ".")
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        place: Any = int(last) if isinstance(target, list) else last.replace("~", ".")
        if self.value is GONE:
            del target[place]
        else:
            target[place] = self.value
        return docs


FAULTS = {
    "schema": [
        Fault("Job", "spec.completionmode", "Indexed", "completionmode"),
        Fault("RayJob", "POD.spec.terminationGracePeriodSecond", 180, "GracePeriodSecond"),
        Fault("Job", "spec.backoffLimit", "3", "'3'"),
        Fault("Job", "apiVersion", "batch/v1beta1", "batch/v1beta1"),
    ],
    "custom": [
        Fault("JobSet", "spec.replicatedJob", [], "unknown field replicatedJob"),
        Fault("JobSet", f"{RULES}.0.action", "FailJobset", "FailJobset"),
        Fault("JobSet", "C.resources.limits.memory", "64Gbytes", "64Gbytes"),
        Fault("JobSet", "C.env.1.name", "PET_NNODES", "twice"),
        Fault("JobSet", "spec.failurePolicy.maxRestarts", 2**31, "int32"),
        Fault("RayJob", "spec.rayClusterSpec.rayVersion", 2.60, "2.6 is not of type"),
        Fault("TrainJob", "metadata.name", "1-train", "1035"),
        Fault("PyTorchJob", "apiVersion", "kubeflow.org/v2", "no definition"),
    ],
    "values": [
        Fault("Job", "spec.completionMode", "Idxed", "Idxed"),
        Fault("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "Exitcode", "Exitc"),
        Fault("PyTorchJob", "spec.runPolicy.cleanPodPolicy", "running", "'running'"),
        Fault("RayJob", "spec.submissionMode", "K8SJobMode", "'K8SJobMode'"),
        Fault("RayJob", "POD.spec.restartPolicy", "ExitCode", "'ExitCode'"),
        Fault("NetworkPolicy", "spec.policyTypes.0", "ingress", "'ingress'"),
        Fault("Job", "POD.spec.restartPolicy", "Always", "not for a Job"),
        Fault("Job", "POD.spec.restartPolicy", "OnFailure", "needs restartPolicy Never"),
        Fault("Job", "spec.podFailurePolicy.rules.0.onExitCodes.containerName", "x", "container x"),
        Fault("Job", "spec.podFailurePolicy.rules.0.onExitCodes.values.0", 0, "0 is no failure"),
        Fault("TrainJob", "spec.trainer.resourcesPerNode.limits.memory", "64Gbytes", "64Gbytes"),
        Fault("TrainJob", "spec.trainer.resourcesPerNode.limits.nvidia~com/gpu", 8, "8 is no quo"),
        Fault("Job", "C.resources.requests.memory", "7Gi", "with its limit"),
        Fault("JobSet", "C.resources.limits.nvidia~com/gpu", "16", "with its limit"),
        Fault("Job", "metadata.name", "d" * 64, "no name for it"),
        Fault("PersistentVolumeClaim", "metadata.name", "dlora-runs", "is there twice"),
        Fault("Job", "metadata.labels.dlora-job", "a b", "no label"),
        Fault("Job", "metadata.labels.a_b/c", "d", "no prefix"),
        Fault("Job", "C.name", "dlora_1", "no name for a container"),
        Fault("Job", "C.env.0.name", "PET-NNODES", "no name for a variable"),
        Fault("PyTorchJob", "C.ports.0.containerPort", 70000, "no port"),
        Fault("Job", "C.livenessProbe.tcpSocket", {"port": 1}, "2 ways"),
        Fault("Job", "C.volumeMounts.0.name", "config", "no volume config"),
        Fault("Job", "C.volumeMounts.0.mountPath", "/runs", "twice"),
        Fault("ConfigMap", "metadata.name", "dlora-configs", "no ConfigMap"),
    ],
    "operators": [
        Fault("RayJob", "metadata.name", "r" * 48, "at most 47"),
        Fault("RayJob", "spec.shutdownAfterJobFinishes", False, "suspends it"),
        Fault("RayJob", "spec.rayClusterSpec.rayVersion", "2.60", "no version"),
        Fault("RayJob", "spec.rayClusterSpec.rayVersion", "2.51.0", "knows no tokens"),
        Fault("RayJob", "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "K8sTokenAuth"),
        Fault("RayJob", f"{GROUP}.minReplicas", 3, "does not hold"),
        Fault("RayJob", f"{GROUP}.rayStartParams.num-cpus", 0, "no string"),
        Fault("RayJob", "spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "0"}, "and in reso"),
        Fault("RayJob", "spec.suspend", True, "Kueue's to set"),
        Fault("PyTorchJob", "spec.runPolicy.suspend", False, "Kueue's to set"),
        Fault("JobSet", "metadata.labels.kueue~x-k8s~io/queue-name", GONE, "no label"),
        Fault("JobSet", "metadata.name", "j" * 50, "no name of a host"),
        Fault("JobSet", "metadata.name", "other", "not the first pod"),
        Fault("JobSet", f"{RULES}.0.name", "stopped", "there twice"),
        Fault("TrainingRuntime", f"spec.template.{RULES}.0.name", "a-b", "no name of a rule"),
        Fault("JobSet", f"{RULES}.0.onJobFailureReasons.0", "Policy", "no reason"),
        Fault("JobSet", f"{RULES}.0.targetReplicatedJobs", ["x"], "no replicated job x"),
        Fault("TrainJob", "spec.trainer.env", [{"name": "PET_NNODES"}], "PET_NNODES"),
        Fault("TrainJob", "spec.runtimeRef.kind", GONE, "no ClusterTrainingRuntime"),
        Fault("TrainingRuntime", "C.name", "main", "with the name node"),
        Fault("TrainingRuntime", "C.env", [{"name": "PET_MASTER_ADDR"}], "PET_MASTER"),
        Fault("TrainingRuntime", f"{STEP}.metadata.labels", {}, "ancestor-step"),
        Fault("PyTorchJob", "C.name", "main", "with the name pytorch"),
        Fault("PyTorchJob", "POD.spec.restartPolicy", "Never", "overwrites it"),
        Fault("PyTorchJob", "spec.elasticPolicy.rdzvBackend", "static", "static is none"),
        Fault("PyTorchJob", "spec.elasticPolicy.nProcPerNode", 8, "nProcPerNode"),
        Fault("PyTorchJob", "spec.elasticPolicy.minReplicas", 3, "does not hold"),
    ],
    "restarts": [
        Fault("Job", "POD.spec.terminationGracePeriodSeconds", GONE, "cuts a commit"),
        Fault("Job", "spec.podFailurePolicy.rules.0", GONE, "after 2 it counted"),
        Fault("Job", "spec.podFailurePolicy.rules.2", GONE, "after DisruptionTarget"),
        Fault("Job", "spec.backoffLimit", 0, "after 1 it fails"),
        Fault("JobSet", f"{RULES}.1", GONE, "after 143 it counted"),
        Fault("JobSet", f"{RULES}.0.onJobFailureMessagePatterns", GONE, "143 it fails"),
        Fault("JobSet", "spec.failurePolicy.maxRestarts", 0, "after 1 it fails"),
        Fault("TrainingRuntime", f"spec.template.{RULES}", [], "after 2 it counted"),
        Fault("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "Never", "no exit"),
        Fault("PyTorchJob", "spec.elasticPolicy.maxRestarts", 3, "agent would try"),
        Fault("RayJob", "spec.backoffLimit", 2, "tries exit status 2"),
        Fault("RayJob", "C.env.0.value", "200", "Ray's '200' s cut a commit short"),
        Fault("RayJob", "C.env", GONE, "Ray's '30' s cut a commit short"),
    ],
    "policy": [
        Fault("RayJob", "C.securityContext.privileged", True, "securityContext"),
        Fault("JobSet", "C.securityContext.capabilities.drop", GONE, "securityContext"),
        Fault("Job", "POD.spec.securityContext.runAsUser", 0, "securityContext"),
        Fault("Job", "C.image", "dlora:latest", "not pinned"),
        Fault("TrainingRuntime", "C.resources.limits.memory", GONE, "without a limit"),
        Fault("Job", "C.ports", [{"containerPort": 1, "hostPort": 1}], "hostPort"),
        Fault("JobSet", "C.env.0", {"name": "HF_TOKEN", "value": "x"}, "in clear"),
        Fault("PyTorchJob", "C.args", ["--token=abcdef"], "command line"),
        Fault("RayJob", "spec.entrypoint", "python x.py --token abcdef", "entry point"),
        Fault("RayJob", "spec.rayClusterSpec.authOptions.secretName", GONE, "Secret"),
        Fault("JobSet", "C.volumeMounts.5", GONE, "/dev/shm"),
        Fault("Job", "POD.spec.hostNetwork", True, "hostNetwork"),
        Fault("Job", "POD.spec.volumes.0", {"name": "a", "hostPath": {"path": "/"}}, "restricted"),
        Fault("Job", "POD.spec.automountServiceAccountToken", GONE, "is not off"),
        Fault("Job", "POD.spec.serviceAccountName", GONE, "serviceAccountName"),
        Fault("Job", "POD.metadata.labels.dlora-job", "other", "own job's pods"),
        Fault("NetworkPolicy/dlora-jobset", "spec.ingress.0.from", GONE, "lets in"),
        Fault("NetworkPolicy/dlora-deny", "spec.podSelector.matchLabels.x", "y", "refuses"),
        Fault("ServiceAccount", "automountServiceAccountToken", GONE, "hands out a token"),
        Fault("ServiceAccount", "kind", "RoleBinding", "nothing here needs the API"),
        Fault("ConfigMap", "kind", "Secret", "in the repository"),
        Fault("ConfigMap", "metadata.namespace", GONE, "namespace"),
        Fault("Namespace", "metadata.labels.pod-security~kubernetes~io/enforce", "x", "security"),
    ],
    "launch": [
        Fault("JobSet", "C.command.3", "lunch", "starts no run"),
        Fault("TrainJob", "spec.trainer.args.1", "/etc/dlora/none.yaml", "not in the ConfigMap"),
        Fault("JobSet", "C.args.2", "--output.dri", "output.dri"),
        Fault("JobSet", "C.args.3", "/cache/run", "no volume that all pods see"),
        Fault("JobSet", "C.args", [*ARGS, "--sharding.base", "world"], "shards over nodes"),
        Fault("JobSet", "C.args", [*ARGS, "--output.resume", "none"], "begin there again"),
        Fault("JobSet", "C.volumeMounts.3", GONE, "/cache/: is lost"),
        Fault("JobSet", "C.env.0.value", "3", "pods for 3 nodes"),
        Fault("JobSet", "C.env.0.value", "two", "--nnodes two"),
        Fault("JobSet", "C.env.3", GONE, "where to meet"),
        Fault("TrainJob", "spec.trainer.numProcPerNode", 4, "4 ranks on 8 GPUs"),
        Fault("PyTorchJob", "POD.spec.affinity.podAntiAffinity", GONE, "to one node"),
        Fault("JobSet", "C.livenessProbe.exec.command.1", "/runs/x", "does not look at"),
        Fault("JobSet", "C.livenessProbe.exec.command.2", "60", "time-out"),
        Fault("RayJob", f"{GROUP}.replicas", 3, "24 GPUs"),
        Fault("RayJob", "spec.entrypoint", f"{RAY} --num-worker 16", "num-worker"),
        Fault("RayJob", "spec.entrypoint", f"{RAY} --num-workers 16 --use-gpu", "--storage"),
    ],
}
