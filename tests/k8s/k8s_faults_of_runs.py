"""Faults that keep a run from starting, restarting or ending as it should."""

from k8s_fault import GONE, POD, Fault

OPERATORS = [
    Fault("operators", "RayJob", "metadata.name", "r" * 48, "at most 47"),
    Fault("operators", "RayJob", "metadata.name", "1-dlora", "a letter first"),
    Fault("operators", "RayJob", "spec.shutdownAfterJobFinishes", False, "suspends it"),
    Fault("operators", "RayJob", "spec.rayClusterSpec.rayVersion", 2.60, "no version"),
    Fault("operators", "RayJob", "spec.rayClusterSpec.rayVersion", "2.51.0", "knows no tokens"),
    Fault(
        *("operators", "RayJob", "spec.rayClusterSpec.authOptions.enableK8sTokenAuth"),
        *(True, "enableK8sTokenAuth"),
    ),
    Fault("operators", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", 3, "<="),
    Fault("operators", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", GONE, "<="),
    Fault(
        *("operators", "RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus"),
        *(0, "no string"),
    ),
    Fault(
        *("operators", "RayJob", "spec.rayClusterSpec.headGroupSpec.resources"),
        *({"CPU": "0"}, "rayStartParams and in resources"),
    ),
    *[
        Fault("operators", kind, "spec.suspend", value, "Kueue's to set")
        for kind in ("RayJob", "JobSet", "TrainJob")
        for value in (True, False)
    ],
    Fault("operators", "JobSet", "metadata.name", "j" * 60, "name of a host"),
    Fault("operators", "JobSet", "metadata.name", "other", "not the first pod"),
    Fault("operators", "JobSet", "metadata.labels.kueue~x-k8s~io/queue-name", GONE, "no label"),
    Fault("operators", "JobSet", "spec.failurePolicy.rules.0.name", "stopped", "there twice"),
    Fault("operators", "TrainJob", "spec.trainer.env", [{"name": "PET_NNODES"}], "PET_NNODES"),
    Fault("operators", "TrainJob", "spec.runtimeRef.name", "other", "no TrainingRuntime other"),
    Fault("operators", "TrainJob", "spec.runtimeRef.kind", GONE, "no ClusterTrainingRuntime"),
    Fault("operators", "TrainingRuntime", "C.name", "main", "with the name node"),
    Fault("operators", "TrainingRuntime", "C.env", [{"name": "PET_MASTER_ADDR"}], "PET_MASTER"),
    Fault(
        *("operators", "TrainingRuntime"),
        *("spec.template.spec.replicatedJobs.0.template.metadata.labels", {}, "ancestor-step"),
    ),
    Fault("operators", "PyTorchJob", "C.name", "main", "with the name pytorch"),
    Fault("operators", "PyTorchJob", "spec.elasticPolicy.rdzvBackend", "static", "static is none"),
    Fault("operators", "PyTorchJob", "spec.elasticPolicy.nProcPerNode", 8, "nProcPerNode"),
    Fault("operators", "PyTorchJob", "spec.elasticPolicy.minReplicas", 3, "does not hold"),
    Fault("operators", "PyTorchJob", "spec.runPolicy.suspend", True, "Kueue's to set"),
]
RULES = "spec.failurePolicy.rules"
RESTARTS = [
    *[
        Fault("restarts", kind, "POD.spec.terminationGracePeriodSeconds", value, "cuts a commit")
        for kind in POD
        for value in (GONE, 30)
    ],
    Fault("restarts", "Job", "spec.podFailurePolicy", GONE, "after 2 it counted"),
    Fault("restarts", "Job", "spec.podFailurePolicy.rules.1", GONE, "after 143 it counted"),
    Fault("restarts", "Job", "spec.podFailurePolicy.rules.2", GONE, "after DisruptionTarget"),
    Fault("restarts", "Job", "spec.podFailurePolicy.rules.0.action", "Ignore", "after 2 it again"),
    Fault("restarts", "Job", "spec.podFailurePolicy.rules.1.action", "FailJob", "143 it fails"),
    Fault("restarts", "Job", "spec.backoffLimit", 0, "after 1 it fails"),
    Fault("restarts", "JobSet", RULES + ".0", GONE, "after 2 it counted"),
    Fault("restarts", "JobSet", RULES + ".1", GONE, "after 143 it counted"),
    Fault("restarts", "JobSet", RULES + ".0.onJobFailureMessagePatterns", GONE, "143 it fails"),
    Fault("restarts", "JobSet", RULES + ".1.action", "RestartJobSet", "143 it counted"),
    Fault("restarts", "JobSet", "spec.failurePolicy.maxRestarts", 0, "after 1 it fails"),
    Fault("restarts", "TrainingRuntime", "spec.template." + RULES, [], "after 2 it counted"),
    *[
        Fault(
            *("restarts", "PyTorchJob", "spec.pytorchReplicaSpecs.Worker.restartPolicy"),
            *(value, "knows no exit status"),
        )
        for value in ("OnFailure", "Never", GONE)
    ],
    Fault("restarts", "PyTorchJob", "spec.elasticPolicy.maxRestarts", 3, "agent would try"),
    Fault("restarts", "RayJob", "spec.backoffLimit", 2, "tries exit status 2"),
    Fault("restarts", "RayJob", "C.env", GONE, "Ray's 30 s cut a commit short"),
    Fault("restarts", "RayJob", "C.env.0.value", "200", "Ray's 200 s cut a commit short"),
    Fault("restarts", "RayJob", "C.env.0.value", GONE, "is no number of seconds"),
    *[
        Fault(
            *("restarts", "RayJob"),
            *("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.1.value", value),
            *("RAY_JOB_STOP_WAIT_TIME_S",),
        )
        for value in ("3", GONE)
    ],
]
ARGS = ["--config", "/etc/dlora/cluster.yaml", "--output.dir", "/runs/jobset"]
RAY = "python -m launchers.ray_train --config /etc/dlora/cluster.yaml --output.dir /runs/rayjob"
LAUNCH = [
    Fault("launch", "JobSet", "C.env.1.value", "4", "4 ranks on 8 GPUs"),
    Fault("launch", "JobSet", "C.env.0.value", "3", "2 pods for 3 nodes"),
    Fault("launch", "JobSet", "C.env.0.value", "two", "--nnodes two"),
    Fault("launch", "JobSet", "C.env.3", GONE, "where to meet"),
    Fault("launch", "JobSet", "C.args.0", "--confg", "no --config"),
    Fault("launch", "JobSet", "C.args.2", "--output.dri", "output.dri"),
    Fault("launch", "JobSet", "C.args.3", "/tmp/run", "goes with the pod"),
    Fault("launch", "JobSet", "C.args", [*ARGS, "--sharding.base", "world"], "shards over nodes"),
    Fault("launch", "JobSet", "C.args", [*ARGS, "--output.resume", "none"], "begin there again"),
    Fault("launch", "RayJob", "spec.entrypoint", f"{RAY} --output.resume none", "begin there"),
    Fault("launch", "JobSet", "C.livenessProbe.exec.command.1", "/runs/x", "does not look at"),
    Fault("launch", "JobSet", "C.livenessProbe.exec.command.2", "60", "time-out"),
    Fault("launch", "JobSet", "POD.spec.topologySpreadConstraints", GONE, "on two nodes"),
    Fault("launch", "TrainJob", "spec.trainer.numProcPerNode", 4, "4 ranks on 8 GPUs"),
    Fault("launch", "TrainJob", "spec.trainer.numNodes", "x", "--nnodes x"),
    Fault("launch", "TrainJob", "spec.trainer.args.1", "/etc/dlora/none.yaml", "none.yaml"),
    Fault("launch", "PyTorchJob", "spec.nprocPerNode", "2", "2 ranks on 8 GPUs"),
    Fault("launch", "PyTorchJob", "C.volumeMounts.2.readOnly", True, "goes with the pod"),
    Fault("launch", "RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.replicas", 3, "24 GPUs"),
    Fault("launch", "RayJob", "spec.entrypoint", f"{RAY} --num-worker 16", "num-worker"),
    Fault("launch", "RayJob", "spec.entrypoint", f"{RAY} --num-workers 16", "no rank uses"),
    Fault("launch", "RayJob", "spec.entrypoint", f"{RAY} --num-workers 16 --use-gpu", "--storage"),
    Fault("launch", "RayJob", "POD.metadata.labels.dlora-role", "head", "on two nodes"),
]


IMAGE = [
    Fault("image", "JobSet", "C.command.2", "dlora-train", "no dlora-train"),
    Fault("image", "JobSet", "C.command.0", "dumb-init", "no dumb-init"),
    Fault("image", "JobSet", "C.args.1", "/etc/dlora/none.yaml", "not in the ConfigMap"),
    Fault("image", "JobSet", "C.args.1", "/etc/other/cluster.yaml", "nor mounted"),
    Fault("image", "JobSet", "C.livenessProbe.exec.command.0", "alive", "no alive"),
    Fault("image", "JobSet", "C.workingDir", "/srv/dlora", "no /srv/dlora"),
    Fault("image", "JobSet", "C.volumeMounts.3", GONE, "HF_HOME"),
    Fault("image", "JobSet", "C.volumeMounts.4", GONE, "TMPDIR"),
    Fault("image", "JobSet", "C.volumeMounts.2", GONE, "/runs/jobset"),
    Fault("image", "JobSet", "POD.spec.securityContext.runAsUser", 1000, "image's user"),
    Fault("image", "TrainJob", "spec.trainer.command.2", "torchrunx", "no torchrunx"),
    Fault("image", "RayJob", "spec.entrypoint", "python -m launchers.ray", "launchers.ray"),
    Fault("image", "RayJob", "spec.entrypoint", "pypy -m launchers.ray_train", "no pypy"),
]
