"""`dlora plan --emit KIND`: the plan as a patch of an overlay in k8s/.

    machines ──> replicas, ranks, resources     placement, overrides ──> options of the run

The operations are those of RFC 6902: kustomize knows no keys of the lists in custom resources, so
that a merge patch would replace them whole. Where a position in a list counts, a `test` comes
first: an overlay that has changed refuses the patch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dlora.config.load import SCHEMA, Config, load, value_of
from dlora.errors import UsageError
from dlora.plan.plan import Plan

KINDS = {"rayjob": "RayJob", "trainjob": "TrainJob", "jobset": "JobSet"}
CONFIGS = "/etc/dlora"  # where pods see the files of configs/
GPU = "nvidia.com~1gpu"  # as a word of a JSON pointer
# CPUs and GiB beside each GPU: of a pod's request, and at most.
BESIDE_GPU = {"requests": (4, 32), "limits": (8, 64)}
# Paths and names that a cluster has of its own.
PLACES = {"model.path", "model.revision", "model.cache_dir", "output.dir"}
RAY = (
    *("python", "-m", "dlora.launchers.ray_train", "--config", "{config}"),
    *("--output.dir", "/runs/rayjob", "--num-workers", "{ranks}", "--use-gpu"),
    *("--storage", "/runs/ray", "--max-failures", "3"),
)
Operation = dict[str, Any]


def patch(kind: str, plan: Plan, config: Config, file: str, reason: str, place: str) -> str:
    """The patch as YAML.

    Args:
        kind: one of `KINDS`.
        config, file: what was planned, and the file of `--config`.
        reason: why this placement, for a reader.
        place: the patch's own file, as the overlay names it.

    Raises:
        UsageError: the run would refuse the options that the plan stands for.
    """
    if config.adapters and kind == "rayjob":
        raise UsageError(
            "--emit: a RayJob trains one adapter at a time, whose checkpoints it copies; take "
            "trainjob or jobset for adapters"
        )
    words = options(plan, config, file)
    load(file, words)
    name = f"{CONFIGS}/{Path(file).name}"
    operations = {"rayjob": _rayjob, "trainjob": _trainjob, "jobset": _jobset}[kind]
    body = yaml.safe_dump(
        list(operations(plan, name, words)), sort_keys=False, width=2**20, default_flow_style=False
    )
    t = plan.topology
    head = (
        f"{t.nodes} node(s) of {t.ranks_per_node} GPU(s), base: {plan.placement.base}: {reason}",
        f"peak memory of a rank: {plan.memory.peak / 1e9:,.2f} GB",
        f"The pods read {name}: configs/Kustomization has to list it.",
        "In the overlay's kustomization.yaml:",
        "  patches:",
        f"    - {{path: {place}, target: {{kind: {KINDS[kind]}}}}}",
    )
    return "".join(f"# {line}\n" for line in head) + body


def options(plan: Plan, config: Config, file: str) -> list[str]:
    """Options for the run's command line: the placement, and what the planner's line set."""
    chosen: dict[str, Any] = {"sharding.base": plan.placement.base}
    if config.sharding.optimizer_state == "auto":
        chosen["sharding.optimizer_state"] = "divided" if plan.divided else "replicated"
    overrides = {key: value_of(config, key) for key in _overridden(config, file)}
    return [_word(key, value) for key, value in {**overrides, **chosen}.items()]


def _overridden(config: Config, file: str) -> Iterator[str]:
    """Options that the file alone would leave at another value."""
    places = [_word(key, value_of(config, key)) for key in PLACES & config.user_set]
    stored = load(file, places)
    if config.adapters != stored.adapters:
        raise UsageError(f"--emit: adapters: put the list into {file}, which the pods read")
    for key in SCHEMA:
        if key not in PLACES and value_of(config, key) != value_of(stored, key):
            yield key


def _word(key: str, value: Any) -> str:
    """An option as the command line reads it back."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _jobset(plan: Plan, file: str, words: list[str]) -> Iterator[Operation]:
    job = "/spec/replicatedJobs/0/template/spec"
    container = f"{job}/template/spec/containers/0"
    t = plan.topology
    yield _put(f"{job}/parallelism", t.nodes)
    yield _put(f"{job}/completions", t.nodes)
    for index, (name, value) in enumerate(
        (("PET_NNODES", t.nodes), ("PET_NPROC_PER_NODE", t.ranks_per_node))
    ):
        yield _see(f"{container}/env/{index}/name", name)
        yield _put(f"{container}/env/{index}/value", str(value))
    yield from _devices(f"{container}/resources", t.ranks_per_node)
    yield from _arguments(f"{container}/args", file, words)


def _trainjob(plan: Plan, file: str, words: list[str]) -> Iterator[Operation]:
    yield _put("/spec/trainer/numNodes", plan.topology.nodes)
    yield _put("/spec/trainer/numProcPerNode", plan.topology.ranks_per_node)
    yield from _devices("/spec/trainer/resourcesPerNode", plan.topology.ranks_per_node)
    yield from _arguments("/spec/trainer/args", file, words)


def _rayjob(plan: Plan, file: str, words: list[str]) -> Iterator[Operation]:
    group = "/spec/rayClusterSpec/workerGroupSpecs/0"
    line = [word.format(config=file, ranks=plan.topology.world) for word in RAY]
    yield _put("/spec/entrypoint", shlex.join([*line, *words]))
    for field in ("replicas", "minReplicas", "maxReplicas"):
        yield _put(f"{group}/{field}", plan.topology.nodes)
    devices = f"{group}/template/spec/containers/0/resources"
    yield from _devices(devices, plan.topology.ranks_per_node)


def _devices(path: str, count: int) -> Iterator[Operation]:
    for part, (cpus, memory) in BESIDE_GPU.items():
        yield _put(f"{path}/{part}/{GPU}", str(count))
        yield _put(f"{path}/{part}/cpu", str(cpus * count))
        yield _put(f"{path}/{part}/memory", f"{memory * count}Gi")


def _arguments(path: str, file: str, words: list[str]) -> Iterator[Operation]:
    yield _see(f"{path}/0", "--config")
    yield _put(f"{path}/1", file)
    for word in words:
        yield {"op": "add", "path": f"{path}/-", "value": word}


def _see(path: str, value: str) -> Operation:
    return {"op": "test", "path": path, "value": value}


def _put(path: str, value: Any) -> Operation:
    return {"op": "replace", "path": path, "value": value}


def write(text: str, path: str) -> None:
    """Write the patch to a file.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--emit-to {path}: cannot be written: {error.strerror}") from None
