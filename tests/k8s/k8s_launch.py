"""What the pods would run, understood by dlora itself: options, configuration, ranks, places."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from k8s_image import words_of
from k8s_manifests import Document, Pod, pods

from dlora.config.load import Config, Options, parse
from dlora.errors import UsageError
from dlora.launch import agent_options, split
from launchers.ray_train import Workers

GPU = "nvidia.com/gpu"


def check(docs: list[Document]) -> list[str]:
    """What dlora would refuse, ranks without a device, a shard group on two nodes, lost output."""
    problems = []
    for pod in pods(docs):
        for container in pod.containers:
            for line in words_of(pod, container, docs):
                if "launch" not in line and "launchers.ray_train" not in line:
                    continue
                try:
                    if "--config" not in line:
                        if pod.owner["kind"] == "TrainingRuntime":
                            continue  # the TrainJob's line takes its place
                        raise UsageError("no --config")
                    config = configuration(line, docs)
                    found = [*_places(container, config), *_start(config)]
                    if "launch" in line:
                        agent = agent_of(line, environment(pod, container, docs))
                        found += [
                            *_ranks(pod, container, docs, agent, config),
                            *_probe(container, config),
                        ]
                    else:
                        found += [*_ray_ranks(pod.owner["spec"], understood(line, docs))]
                except UsageError as error:
                    found = [str(error)]
                problems += [f"{pod.where}: {problem}" for problem in found]
    return problems


def configuration(line: list[str], docs: list[Document]) -> Config:
    """Of a command line whose --config lies in the ConfigMap.

    Raises:
        UsageError: dlora refuses it.
    """
    return understood(line, docs).config


def understood(line: list[str], docs: list[Document]) -> Options:
    """The same, with the options of the launcher where that is Ray's.

    Raises:
        UsageError: dlora or the launcher refuses it.
    """
    data = next(doc["data"] for doc in docs if doc["kind"] == "ConfigMap")
    start = line.index("--config")
    name = Path(line[start + 1]).name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_text(data.get(name, ""), encoding="utf-8")
        words = ["--config", str(file), *line[start + 2 :]]
        return parse(words, "check", Workers if "launchers.ray_train" in line else None)


def environment(pod: Pod, container: Document, docs: list[Document]) -> dict[str, str]:
    """What the container of the first pod sees, with what its operator adds."""
    found = {v["name"]: v.get("value", "0") for v in container.get("env", [])}
    if pod.owner["kind"] == "TrainingRuntime":
        trainer = next(doc["spec"]["trainer"] for doc in docs if doc["kind"] == "TrainJob")
        found |= {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": "0",
            "PET_MASTER_ADDR": "first",
            "PET_MASTER_PORT": "29500",
        }
    if pod.owner["kind"] == "PyTorchJob":
        spec = pod.owner["spec"]
        elastic = spec["elasticPolicy"]
        found |= {
            "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
            "PET_NPROC_PER_NODE": str(spec["nprocPerNode"]),
            "PET_RDZV_BACKEND": elastic["rdzvBackend"],
            "PET_RDZV_ENDPOINT": f"{pod.owner['metadata']['name']}-worker-0:{elastic['rdzvPort']}",
        }
    return found


def agent_of(line: list[str], variables: dict[str, str]) -> Any:
    """torch's agent as `dlora launch` would start it.

    Raises:
        UsageError: it would not.
    """
    with mock.patch.dict(os.environ, variables):
        return agent_options(*split(line[line.index("launch") + 1 :]))


def _ranks(
    pod: Pod, container: Document, docs: list[Document], agent: Any, config: Config
) -> Iterator[str]:
    nodes, ranks = int(str(agent.nnodes).split(":")[-1]), int(agent.nproc_per_node)
    if agent.max_restarts != 0:
        yield "torch's agent would start ranks again, whatever their exit status"
    resources = container["resources"]
    if pod.owner["kind"] == "TrainingRuntime":  # the TrainJob has the last word
        trainer = next(doc["spec"]["trainer"] for doc in docs if doc["kind"] == "TrainJob")
        resources = trainer.get("resourcesPerNode", resources)
    devices = resources["limits"].get(GPU)
    if devices is not None and int(devices) != ranks:
        yield f"{ranks} ranks on {devices} GPUs"
    if nodes == 1:
        return
    yield from _shard_group(pod, config)
    if agent.rdzv_backend == "static" and agent.master_addr == "127.0.0.1":
        yield "the nodes do not know where to meet"
    spec = pod.owner["spec"]
    made = {
        "JobSet": lambda: spec["replicatedJobs"][0]["template"]["spec"]["completions"],
        "PyTorchJob": lambda: spec["pytorchReplicaSpecs"]["Worker"]["replicas"],
        "TrainingRuntime": lambda: nodes,  # which are the TrainJob's
    }[pod.owner["kind"]]()
    if made != nodes:
        yield f"{made} pods for {nodes} nodes"


def _shard_group(pod: Pod, config: Config) -> Iterator[str]:
    """One pod is one shard group, and pods go to nodes of their own."""
    if config.sharding.base == "world":
        yield "sharding.base: world shards over nodes"
    spreads = [
        constraint
        for constraint in pod.spec.get("topologySpreadConstraints", [])
        if constraint["topologyKey"] == "kubernetes.io/hostname"
        and constraint["whenUnsatisfiable"] == "DoNotSchedule"
        and constraint["labelSelector"]["matchLabels"].items() <= pod.labels.items()
    ]
    if not spreads:
        yield "nothing keeps two of its pods on two nodes"


def _ray_ranks(spec: Document, options: Options) -> Iterator[str]:
    workers, config = options.extra, options.config
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    devices = sum(
        group["replicas"] * int(container["resources"]["limits"].get(GPU, 0))
        for group in groups
        for container in group["template"]["spec"]["containers"]
    )
    if devices != int(workers.num_workers):
        yield f"{workers.num_workers} ranks on {devices} GPUs"
    if devices and not workers.use_gpu:
        yield f"{devices} GPUs that no rank uses"
    for group in groups:
        template = group["template"]
        yield from _shard_group(Pod("", {}, template["metadata"], template["spec"]), config)
    if not (workers.storage or "").startswith("/runs/"):
        yield "--storage: not on a volume that all pods see"


def _start(config: Config) -> Iterator[str]:
    if config.output.resume != "auto":
        yield f"output.resume: {config.output.resume}: each start of a pod would begin there again"


def _places(container: Document, config: Config) -> Iterator[str]:
    written = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    cache = config.model.cache_dir.replace("~", "/cache")
    if "/runs" not in written or not config.output.dir.startswith("/runs/"):
        yield f"output.dir: {config.output.dir} goes with the pod"
    if not any(cache.startswith(f"{place}/") for place in written):
        yield f"model.cache_dir: {cache} cannot be written"


def _probe(container: Document, config: Config) -> Iterator[str]:
    command = container.get("livenessProbe", {}).get("exec", {}).get("command", [])
    if command[:2] != ["dlora-alive", config.output.dir]:
        yield f"livenessProbe: {shlex.join(command)} does not look at {config.output.dir}"
    elif float(command[2]) < config.sharding.timeout_seconds:
        yield "livenessProbe: comes before the run's own time-out"
