"""`python -m dlora.plan --config FILE`: what a run would cost on given machines."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dlora.adapters.settings import keyed_by, lora_config
from dlora.base.gguf import gguf_skeleton
from dlora.base.model import DTYPES, find_base, quiet_libraries
from dlora.base.native import AUTO_DTYPE, native_dtype
from dlora.base.quantize import quantize_as_set
from dlora.base.skeleton import AUTO, check_attention, check_divides
from dlora.config.load import Config, parse
from dlora.config.recompute import Recompute
from dlora.data import Dealing
from dlora.errors import UsageError
from dlora.lora.attach import attach, trainable_parameters
from dlora.objectives.packable import why_not
from dlora.plan.capacity import free_bytes
from dlora.plan.choose import Capacity, Decision, bytes_first, capacity_of, decide
from dlora.plan.choose import candidates as candidates_of
from dlora.plan.graphs import graphs_in_words
from dlora.plan.kustomize import patch, write
from dlora.plan.micro_batches import settle_micro_batches
from dlora.plan.objective import copies_adapter, made_task
from dlora.plan.plan import Plan, Subject
from dlora.plan.speed import Speeds, step_time
from dlora.plan.state import modes
from dlora.plan.tables import Survey, as_json, as_text
from dlora.plan.teacher import find_teacher
from dlora.plan.teacher_bytes import TracedObjective
from dlora.plan.together import NO_GRAPHS, Several
from dlora.plan.workload import workload_of
from dlora.registry import option, room
from dlora.sharding.topology import Placement, Topology
from dlora.tasks import TASKS, Task
from dlora.tasks.causal import Causal
from dlora.tasks.made_as import model_class_for
from dlora.tasks.packing import settle_packing


@dataclass(frozen=True)
class Machines:
    """The machines to plan for."""

    nodes: int = option(1, "machines", ge=1)
    gpus_per_node: int = option(8, "ranks on each machine", ge=1)
    gpu_memory_gb: float | None = option(
        None,
        "memory of a rank in GB (10^9 bytes); null: sharding.memory_budget_gb, else what is free "
        "on this machine",
        gt=0,
    )
    intra_gbps: float | None = option(
        None, "Gbit/s (bits, not bytes) that a rank sends inside its node; null: no limit", gt=0
    )
    inter_gbps: float | None = option(
        None, "Gbit/s (bits) of a node's link to other nodes, each way; null: no limit", gt=0
    )
    tflops: float | None = option(
        None, "10^12 floating-point operations per second of a rank; null: no limit", gt=0
    )
    format: Literal["table", "json"] = option("table", "how the plan is printed")
    emit: Literal["rayjob", "trainjob", "jobset"] | None = option(
        None, "print the plan as a patch for that overlay in k8s/ instead"
    )
    emit_to: str | None = option(None, "with --emit: write the patch there, and print the plan")


def main(argv: list[str]) -> int:
    """Print the plan; returns the exit status."""
    options = parse(argv, prog="dlora.plan", extra=Machines)
    if options.check:
        raise UsageError("--check is an option of dlora.train; dlora.plan trains nothing anyway")
    machines = options.extra
    file = _file_to_emit(argv, machines)
    found = survey(options.config, machines)
    if machines.emit is not None:
        if found.decision.warning:
            raise UsageError(f"--emit: {found.decision.warning}")
        chosen, place = found.decision, Path(machines.emit_to or "FILE").name
        text = patch(machines.emit, chosen.plan, options.config, file, chosen.reason, place)
        if machines.emit_to is None:
            print(text, end="")
            return 0
        write(text, machines.emit_to)
    print(as_json(found) if machines.format == "json" else "\n".join(as_text(found)))
    return 0


def _file_to_emit(argv: list[str], machines: Machines) -> str:
    """The file of `--config`, which the pods of an overlay read too; empty without `--emit`.

    Raises:
        UsageError: an option that `--emit` needs is missing, or one has no effect.
    """
    if machines.emit is None:
        if machines.emit_to is not None:
            raise UsageError("--emit-to needs --emit: rayjob, trainjob or jobset")
        return ""
    if machines.emit_to is None and machines.format != "table":
        raise UsageError("--format: --emit prints a patch; add --emit-to FILE to print the plan")
    if machines.gpu_memory_gb is None:
        raise UsageError("--emit needs --gpu-memory-gb: the overlays ask for GPUs")
    named = [word.partition("=") for word in argv if word.partition("=")[0] == "--config"]
    if not named:
        raise UsageError("--emit needs --config FILE: the pods read that file too")
    return named[0][2] or argv[argv.index("--config") + 1]


def survey(config: Config, machines: Machines) -> Survey:
    """All placements of the run that `config` describes, on `machines`, and the one to take.

    Raises:
        UsageError: the model or the adapter's settings are wrong, or nothing fits a budget.
    """
    topology = Topology(0, machines.nodes * machines.gpus_per_node, machines.gpus_per_node)
    capacity, device = _capacity(config, machines)
    config = _with_dtype(config, machines, device)
    task = task_in_plan(config)
    skeleton = _skeleton(config, task)
    size = sum(p.numel() for p in skeleton.parameters())
    task.check(skeleton)
    quantized = quantize_as_set(skeleton, config.model.quantization)
    several = config.adapters and Several(config, skeleton)
    if not several:
        with keyed_by("adapter"):
            attach(skeleton, lora_config(config))
    packs = settle_packing(config.data.packing, task, skeleton)
    teacher = find_teacher(config, None, skeleton)
    if teacher is not None and teacher.skeleton is not None:
        packs = packs and not why_not(teacher.skeleton)

    def check(placement: Placement) -> None:
        check_divides(skeleton, placement)
        if teacher is not None:
            teacher.check_divides(placement)

    def subject_of(dealing: Dealing) -> Subject:
        if several:
            trained, workload = several.trained, several.workload(topology.world, packs=packs)
        else:
            trained = trainable_parameters(skeleton)
            workload = workload_of(config, topology.world, dealing=dealing, task=task)
            reference, copied = task.reference(skeleton), copies_adapter(config)
            workload = replace(workload, reference=reference, copied=copied)
        return Subject(
            skeleton,
            trained,
            workload,
            device=device,
            task=task,
            check=check,
            objective=None if teacher is None else TracedObjective(config, teacher),
        )

    speeds = Speeds(
        inside=machines.intra_gbps and machines.intra_gbps * 1e9 / 8,
        between=machines.inter_gbps and machines.inter_gbps * 1e9 / 8,
        flops=machines.tflops and machines.tflops * 1e12,
    )
    section = config.sharding

    def place(dealing: Dealing) -> Decision:
        return decide(
            subject_of(dealing),
            topology,
            engine=section.engine,
            base=section.base,
            optimizer_state=section.optimizer_state,
            capacity=capacity,
            offload=section.cpu_offload,
            checkpointing=section.activation_checkpointing,
            cost=lambda plan: (step_time(plan, speeds).serial, *bytes_first(plan)),
        )

    dealing, decision = settle_micro_batches(config, None, topology.world, packs, place)
    subject = subject_of(dealing)
    subject = subject.recomputing(decision.plan.workload.checkpointing)
    others = [
        candidate
        for engine, part in room("sharding.engines").items()
        if engine != section.engine
        and part.says.get("offered", True)
        and all(map(importlib.util.find_spec, part.says.get("requires", ())))
        for candidate in candidates_of(
            subject,
            topology,
            engine=str(engine),
            base=section.base,
            capacity=capacity,
            divided=modes(subject.workload, section.optimizer_state, topology.world)[0],
        )
        if candidate.base != "none"
    ]
    twin = _with_other_checkpointing(subject)
    rows = [*decision.candidates, *others]
    return Survey(
        model=f"{type(skeleton).__name__}, {size:,} parameters in {config.model.dtype}"
        + (f"; {quantized}" if quantized else "")
        + (f"; {several}" if several else ""),
        capacity=capacity,
        speeds=speeds,
        decision=decision,
        others=others,
        twins=[c.plan and _as(c.plan, twin) for c in rows],
        graphs=NO_GRAPHS if several else graphs_in_words(config, decision.plan, speeds),
    )


def _with_dtype(config: Config, machines: Machines, device: str) -> Config:
    """The configuration without `model.dtype: auto`: GPUs that are planned for have bfloat16."""
    if config.model.dtype != AUTO_DTYPE:
        return config
    dtype = native_dtype(device) if machines.gpu_memory_gb is None else "bfloat16"
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]


def task_in_plan(config: Config) -> Task:
    """The task of a plan, which reads no data: without their number, there are two labels."""
    labels = [str(i) for i in range(config.train.num_labels or 2)]
    return made_task(config, labels if TASKS[config.train.task].draws_head else ())


def _with_other_checkpointing(subject: Subject) -> Subject:
    return subject.recomputing(Recompute(0 if subject.workload.checkpointing else 1))


def _as(plan: Plan, subject: Subject) -> Plan:
    """The same placement for another subject."""
    return subject.plan(plan.placement, plan.topology, divided=plan.divided, held=plan.resident)


def _capacity(config: Config, machines: Machines) -> tuple[Capacity | None, str]:
    """Memory of a rank, and the kind of device that has it."""
    budget, given = config.sharding.memory_budget_gb, machines.gpu_memory_gb
    if given is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return capacity_of(budget, free_bytes(device, machines.gpus_per_node)), device.type
    if budget is None:
        return Capacity(round(given * 1e9), "--gpu-memory-gb"), "cuda"
    if budget > given:
        raise UsageError(
            f"sharding.memory_budget_gb: {budget:g} is more than --gpu-memory-gb {given:g}"
        )
    return capacity_of(budget, None), "cuda"


def _skeleton(config: Config, task: Task) -> nn.Module:
    """The model on the meta device; of a .gguf file nothing but its header is read."""
    path, attention = Path(config.model.path).expanduser(), config.model.attn_implementation
    is_fused = attention not in ("sdpa", "eager")  # this machine may lack what those need
    if path.suffix == ".gguf" and path.is_file() and isinstance(task, Causal):
        quiet_libraries()
        skeleton: nn.Module = gguf_skeleton(path.resolve(), DTYPES[config.model.dtype])
    else:
        skeleton = find_base(
            config.model.path,
            dtype=config.model.dtype,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            attn_implementation=AUTO if is_fused else attention,
            made_as=model_class_for(task),
        ).skeleton()
    check_attention(skeleton, attention)
    return skeleton
