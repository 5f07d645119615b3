"""Everything that a run needs and that can be wrong, before a weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dlora.adapters.settings import scheduled
from dlora.base.eval_mode import random_settings
from dlora.base.identity import identity
from dlora.base.model import BaseModel
from dlora.base.native import has_kernels
from dlora.base.skeleton import check_divides
from dlora.config.load import Config
from dlora.data import Dataset, Dealing, Example, Sampler
from dlora.data.collate import Batch
from dlora.data.stream import Stream, StreamSampler
from dlora.errors import UsageError, and_more
from dlora.lora.attach import (
    adapter_tensors,
    attachment_of,
    trainable_parameters,
)
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import KEYED_BY
from dlora.lora.left import unreached_by_text
from dlora.plan.choose import Decision, capacity_of, decide
from dlora.plan.micro_batches import settle_micro_batches
from dlora.plan.plan import Plan, Subject
from dlora.plan.workload import workload_of
from dlora.sharding.topology import Placement, Topology
from dlora.tasks import Task
from dlora.tasks.packing import settle_packing
from dlora.training.check_resume import check_resume
from dlora.training.checks import (
    check_attention,
    check_placement,
    check_ranks_per_node,
    check_sequences,
    limits_of,
    pad_token,
)
from dlora.training.earlier_placement import earlier_placement, settle
from dlora.training.find_checkpoint import ResumePoint
from dlora.training.prepare_data import (
    Once,
    by_itself,
    load_data,
    open_stream,
    sampler_of,
    steps_line,
    with_template,
)
from dlora.training.prepare_model import adapted, task_of
from dlora.training.settle_compile import (
    Compiler,
    changed_compile,
    earlier_compile,
    settle_compile,
)


@dataclass(frozen=True)
class Preparation:
    """What `prepare` found out; it has no weights.

    Attributes:
        config: with what the machines and the checkpoint decide of it (`model.dtype: auto`).
        drawn: parameters of a head that the base lacks.
        dealing: makes the micro-batches of ranks.
        compiles: whether blocks run as graphs of torch's compiler.
        unreached: adapted modules that text alone does not reach, of a model that takes images too.
    """

    config: Config
    base: BaseModel
    tokenizer: Any
    train: Dataset | Stream
    eval: Dataset | None
    sampler: Sampler | StreamSampler
    lora: LoraConfig
    topology: Topology
    pad_id: int
    resumed: ResumePoint | None
    decision: Decision
    base_identity: str | None
    task: Task
    dealing: Dealing
    drawn: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    compiles: bool = False

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch, on the CPU."""
        collate = self.task.packed if self.dealing.packs else self.task.collate
        return collate(examples, self.pad_id)

    @property
    def budget(self) -> Plan:
        """The plan that was chosen."""
        return self.decision.plan

    @property
    def placement(self) -> Placement:
        """Where W0 lives."""
        return self.budget.placement

    @property
    def divided(self) -> bool:
        """Whether the optimizer state is divided over ranks."""
        return self.budget.divided

    @property
    def fingerprint(self) -> str:
        """A text that is equal on ranks with the same data, settings and plan."""
        data = [self.train.fingerprint, self.eval.fingerprint if self.eval else ""]
        data.append(self.base_identity or "")
        chosen = [self.placement, self.divided, self.budget.resident, self.compiles]
        return " ".join([*data, str(self.lora), *map(str, chosen)])


@dataclass(frozen=True)
class Surroundings:
    """What has to be equal on all ranks, so that all of them plan the same.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        free: bytes that each rank may take; None if that is not known, and then everything fits.
        writes: whether `data.cache_dir` may be written.
        compiler: for `train.compile`.
    """

    device: str = "cpu"
    free: int | None = None
    writes: bool = True
    compiler: Compiler = Compiler()


def prepare(
    config: Config,
    topology: Topology,
    announce: Callable[[str], None],
    resumed: ResumePoint | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 - frozen
    once: Once = by_itself,
) -> Preparation:
    """Read the data, the tokenizer and the model's skeleton, and plan.

    Args:
        resumed: the checkpoint that the run resumes, if there is one.
        once: loads data sets; other ranks may take part.

    Raises:
        UsageError: data, model or adapter settings are wrong, named by key, file or line, or no
            placement fits the budget.
    """
    world = topology.world
    check_ranks_per_node(config, world)
    check_placement(config, topology)
    check_attention(config, around.device)
    task, base = task_of(config, announce)
    model = adapted(config, task, base, resumed)
    skeleton = model.skeleton
    if model.quantized is not None:
        announce(f"model.quantization: {model.quantized}")
    if model.drawn:
        announce(
            f"model: {and_more(list(model.drawn))} is not in the files of the base: drawn from "
            "train.seed, trained, and saved with the adapter"
        )
    attachment = attachment_of(skeleton)
    for line in attachment.left:
        announce(f"adapter.{line}")
    if drawn := random_settings(skeleton):
        announce(f"model: its own {', '.join(drawn)} are off in training, since W0 is frozen")
    packs = settle_packing(config.data.packing, task, skeleton, announce)
    known = identity(base, skeleton)
    tokenizer = with_template(config, base.tokenizer())
    read = (config, tokenizer, task, announce)
    load = functools.partial(load_data, *read, around.writes, once)
    train = open_stream(*read) if config.data.streaming else load("train")
    held_out = load("eval") if config.data.eval is not None else None
    limits = limits_of(tokenizer, skeleton)
    check_sequences({"data.train": train, "data.eval": held_out}, limits)
    sampler = sampler_of(config, train, limits, announce)
    lora = scheduled(model.lora, sampler.total_steps)
    if resumed is not None:
        tensors = adapter_tensors(skeleton)
        check_resume(resumed, config, lora, tensors, sampler, train.fingerprint, known, announce)
        if lora.lora_dropout and not resumed.has_masks_of(KEYED_BY):
            announce(
                "output.resume: the checkpoint is of a version that drew dropout masks otherwise: "
                "from here on they differ from those that the run would have had"
            )
    if around.device == "cpu" and base.dtype == torch.bfloat16 and not has_kernels():
        announce(
            "model.dtype: this CPU has no instructions for bfloat16, which is many times slower "
            "than float32 on it"
        )
    if isinstance(sampler, StreamSampler) and resumed and resumed.step < sampler.total_steps:
        announce(f"data.streaming: reading on to step {resumed.step}")
        sampler.step(resumed.step)
    announce(steps_line(sampler, config.train.global_batch_size))
    place = functools.partial(
        _decision, config, task, skeleton, topology, train, sampler, around, resumed
    )
    earlier = resumed.tokens_per_micro_batch(world) if resumed else None
    dealing, decision = settle_micro_batches(config, train, world, packs, place, earlier=earlier)
    if config.train.tokens_per_micro_batch == "auto":
        announce(f"train.tokens_per_micro_batch: {dealing.tokens}")
    if decision.plan.divided:
        announce(
            f"optimizer state: divided, 1/{topology.world} on each rank, so a save needs all "
            "ranks: each sends its part to rank 0 (sharding.optimizer_state); there are no "
            "snapshots (output.snapshot_every), and a lost rank leaves the last save"
        )
    before = resumed.settings if resumed else None
    compiles = settle_compile(
        config, decision, sampler.total_steps, around.compiler, earlier_compile(before), announce
    )
    if line := changed_compile(before, compiles):
        announce(line)
    return Preparation(
        config,
        base,
        tokenizer,
        train,
        held_out,
        sampler,
        lora,
        topology,
        pad_token(tokenizer, skeleton),
        resumed,
        decision,
        known,
        task,
        dealing,
        model.drawn,
        unreached=tuple(unreached_by_text(skeleton, [*attachment.adapted, *attachment.saved])),
        compiles=compiles,
    )


def _decision(
    config: Config,
    task: Task,
    skeleton: Any,
    topology: Topology,
    data: Dataset | Stream,
    sampler: Sampler | StreamSampler,
    around: Surroundings,
    resumed: ResumePoint | None,
    dealing: Dealing,
) -> Decision:
    """The plan of the run: what the settings leave open is chosen, `base: auto` above all."""
    section, world = config.sharding, topology.world
    setting = section.activation_checkpointing
    if isinstance(setting, Mapping) and "offload" in setting and around.device == "cpu":
        raise UsageError(
            "sharding.activation_checkpointing: offload needs a GPU; on a CPU activations are in "
            "host memory already"
        )
    earlier = earlier_placement(resumed.settings, resumed.state) if resumed else None
    settings = settle(config, earlier, world)
    if isinstance(data, Dataset) and isinstance(sampler, Sampler):
        workload = workload_of(config, world, data, sampler, dealing=dealing)
    else:  # any sequence may be the longest
        workload = workload_of(config, world, dealing=dealing)
    decision = decide(
        Subject(
            skeleton,
            trainable_parameters(skeleton),
            workload,
            task=task,
            device=around.device,
            check=lambda placement: check_divides(skeleton, placement),
        ),
        topology,
        engine=settings.engine,
        base=settings.base,
        optimizer_state=settings.optimizer_state,
        capacity=capacity_of(section.memory_budget_gb, around.free),
        offload=section.cpu_offload,
        checkpointing=setting,
        fills=section.base == "auto",
    )
    if not settings.reason:
        return decision
    is_open = settings.base == "auto"
    return replace(decision, reason=settings.reason + (f": {decision.reason}" if is_open else ""))
