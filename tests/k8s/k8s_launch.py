"""What the pods would run, understood by dlora itself: options, configuration, ranks, places."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from k8s_manifests import Document, Pod, at, pods, the

from dlora.config.load import Config, Options, parse
from dlora.errors import UsageError
from dlora.launch import agent_options, split
from launchers.ray_train import Workers

GPU = "nvidia.com/gpu"
LAUNCH = ["tini", "--", "dlora", "launch"]
RAY = ["python", "-m", "dlora.launchers.ray_train"]


def check(docs: list[Document]) -> list[str]:
    """What dlora would refuse, ranks without a device, a shard group on two nodes, lost output."""
    problems = []
    for pod in pods(docs):
        for container in pod.containers:
            if pod.trains(container):
                try:
                    found = [*_run(pod, container, docs)]
                except UsageError as error:
                    found = [str(error)]
                problems += [f"{pod.where}: {line}" for line in found]
    return problems


def command_of(pod: Pod, container: Document, docs: list[Document]) -> list[str]:
    """The command line of a container's run."""
    if pod.owner["kind"] == "RayJob":
        return shlex.split(pod.owner["spec"]["entrypoint"])
    if pod.owner["kind"] == "TrainingRuntime":  # the TrainJob has the last word
        container = the(docs, "TrainJob")["spec"]["trainer"]
    return [*container["command"], *container.get("args", [])]


def _run(pod: Pod, container: Document, docs: list[Document]) -> Iterator[str]:
    line = command_of(pod, container, docs)
    config = (options := understood(line, docs)).config
    if config.output.resume != "auto":
        yield f"output.resume: {config.output.resume}: each start of a pod would begin there again"
    # The root file system is read-only, and the image's variables name places in /cache and /tmp.
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    written = [place for place, is_read_only in mounts.items() if not is_read_only]
    cache = config.model.cache_dir.replace("~", "/cache")
    for place in (config.output.dir, cache, "/cache/", "/tmp/"):
        if not any(f"{place}/".startswith(f"{mount}/") for mount in written):
            yield f"{place}: is lost with the pod, or cannot be written"
    if not config.output.dir.startswith("/runs/"):
        yield f"output.dir: {config.output.dir} is on no volume that all pods see"
    if line[:3] == RAY:
        yield from _ray_ranks(pod.owner["spec"], options)
        return
    yield from _ranks(pod, container, docs, agent_of(line, environment(pod, container, docs)))
    yield from _shard_group(pod.spec, pod.labels, config)
    command = container.get("livenessProbe", {}).get("exec", {}).get("command", [])
    if command[:2] != ["dlora-alive", config.output.dir]:
        yield f"livenessProbe: {shlex.join(command)} does not look at {config.output.dir}"
    elif float(command[2]) < config.sharding.timeout_seconds:
        yield "livenessProbe: comes before the run's own time-out"


def understood(line: list[str], docs: list[Document]) -> Options:
    """The options of a command line whose --config is in the ConfigMap, and Ray's launcher's own.

    Raises:
        UsageError: it starts no run, or dlora or the launcher refuses it.
    """
    if line[:3] != RAY and line[:4] != LAUNCH:
        raise UsageError(f"{shlex.join(line)}: starts no run")
    start = line.index("--config") if "--config" in line else 0
    file, files = Path(line[start + 1]), the(docs, "ConfigMap")["data"]
    if file.parent != Path("/etc/dlora") or file.name not in files:
        raise UsageError(f"--config {file}: not in the ConfigMap")
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / file.name
        copied.write_text(files[file.name], encoding="utf-8")
        words = ["--config", str(copied), *line[start + 2 :]]
        return parse(words, "check", Workers if line[:3] == RAY else None)


def environment(pod: Pod, container: Document, docs: list[Document]) -> dict[str, str]:
    """What the container of the first pod sees, with what its operator adds."""
    found = {v["name"]: v.get("value", "0") for v in container.get("env", [])}
    spec, name = pod.owner["spec"], pod.owner["metadata"]["name"]
    if pod.owner["kind"] == "TrainingRuntime":
        trainer = the(docs, "TrainJob")["spec"]["trainer"]
        found |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": "0"}
        found |= {"PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
        found |= {"PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29500"}
    if pod.owner["kind"] == "PyTorchJob":
        elastic = spec["elasticPolicy"]
        found |= {"PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}"}
        found |= {"PET_NPROC_PER_NODE": str(spec["nprocPerNode"])}
        found |= {"PET_RDZV_BACKEND": elastic["rdzvBackend"]}
        found |= {"PET_RDZV_ENDPOINT": f"{name}-worker-0:{elastic['rdzvPort']}"}
    return found


def agent_of(line: list[str], variables: dict[str, str]) -> Any:
    """torch's agent as `dlora launch` would start it.

    Raises:
        UsageError: it would not.
    """
    with mock.patch.dict(os.environ, variables):
        return agent_options(*split(line[len(LAUNCH) :]))


def _ranks(pod: Pod, container: Document, docs: list[Document], agent: Any) -> Iterator[str]:
    nodes, ranks = str(agent.nnodes).split(":")[-1], str(agent.nproc_per_node)
    resources, spec = container["resources"], pod.owner["spec"]
    made = [
        *at(spec, "completions"),
        *at(spec, "replicatedJobs.*.template.spec.completions"),
        *at(spec, "pytorchReplicaSpecs.*.replicas"),
    ]
    if pod.owner["kind"] == "TrainingRuntime":
        resources, made = the(docs, "TrainJob")["spec"]["trainer"]["resourcesPerNode"], [nodes]
    if resources["limits"].get(GPU, ranks) != ranks:
        yield f"{ranks} ranks on {resources['limits'][GPU]} GPUs"
    if [str(count) for count in made] != [nodes]:
        yield f"{made} pods for {nodes} nodes"
    if nodes != "1" and agent.rdzv_backend == "static" and agent.master_addr == "127.0.0.1":
        yield "the nodes do not know where to meet"


def _shard_group(spec: Document, labels: dict[str, str], config: Config) -> Iterator[str]:
    """One pod is one shard group, and each pod with GPUs goes to a node of its own."""
    if GPU not in str(spec):
        return
    if config.sharding.base == "world":
        yield "sharding.base: world shards over nodes"
    terms = at(spec, "affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution.*")
    apart = [t["labelSelector"] for t in terms if t["topologyKey"] == "kubernetes.io/hostname"]
    if not any(selector["matchLabels"].items() <= labels.items() for selector in apart):
        yield "two of its pods may go to one node"


def _ray_ranks(spec: Document, options: Options) -> Iterator[str]:
    workers = options.extra
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    template = group["template"]
    (gpus,) = at(template, "spec.containers.*.resources.limits")
    devices = group["replicas"] * int(gpus[GPU])
    if devices != int(workers.num_workers) or not workers.use_gpu:
        yield f"{workers.num_workers} ranks on {devices} GPUs, --use-gpu: {workers.use_gpu}"
    if not (workers.storage or "").startswith("/runs/"):
        yield "--storage: not on a volume that all pods see"
    yield from _shard_group(template["spec"], template["metadata"]["labels"], options.config)
