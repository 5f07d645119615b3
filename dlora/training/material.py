"""What a run trains on and with, read and checked; where it will lie is not decided yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dlora.adapters.settings import scheduled
from dlora.base.eval_mode import random_settings
from dlora.base.identity import identity
from dlora.base.model import BaseModel
from dlora.base.native import has_kernels
from dlora.config.load import Config
from dlora.data import Dataset, Sampler
from dlora.data.stream import Stream, StreamSampler
from dlora.errors import UsageError, and_more
from dlora.evaluation.metrics import check_installed
from dlora.evaluation.references import questions_of
from dlora.lora.attach import adapter_tensors, attachment_of
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import KEYED_BY
from dlora.plan.teacher import FoundTeacher, find_teacher
from dlora.sharding.topology import Topology
from dlora.tasks import Task
from dlora.tasks.limits import limits_of, pad_token
from dlora.tasks.packing import settle_packing
from dlora.training.check_resume import check_resume
from dlora.training.checks import (
    check_attention,
    check_forgetting,
    check_placement,
    check_ranks_per_node,
    check_sequences,
)
from dlora.training.find_checkpoint import ResumePoint
from dlora.training.prepare_data import (
    Once,
    by_itself,
    load_data,
    open_stream,
    sampler_of,
    sources,
    steps_line,
    with_template,
)
from dlora.training.prepare_model import Adapted, adapted, task_of
from dlora.training.settle_compile import Compiler
from dlora.training.teacher import prepare_teacher


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


@dataclass(frozen=True)
class Material:
    """The adapter, its data and the base of a run.

    Attributes:
        model: the skeleton with the adapter.
        lora: its settings, with what follows from the number of steps.
        packs: whether sequences share rows.
        known: the identity of the base, where it is known.
        retained: `forget.data`, where it is a data set.
        teacher: of a distillation.
    """

    config: Config
    task: Task
    base: BaseModel
    model: Adapted
    lora: LoraConfig
    tokenizer: Any
    train: Dataset | Stream
    eval: Dataset | None
    retained: Dataset | None
    sampler: Sampler | StreamSampler
    packs: bool
    pad_id: int
    known: str | None
    resumed: ResumePoint | None
    teacher: FoundTeacher | None = None


def gather_material(
    config: Config,
    topology: Topology,
    announce: Callable[[str], None],
    resumed: ResumePoint | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 - frozen
    once: Once = by_itself,
) -> Material:
    """Read the data, the tokenizer and the model's skeleton; arguments as of `prepare`.

    Raises:
        UsageError: data, model or adapter settings are wrong, named by key, file or line.
    """
    world = topology.world
    if resumed is not None and resumed.names:
        raise UsageError(
            f"output.resume: {resumed.directory} is of a run with adapters: "
            f"{', '.join(resumed.names)}, and this one has none (output.resume: none starts afresh)"
        )
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
    check_forgetting(config, skeleton)
    attachment = attachment_of(skeleton)
    for line in attachment.left:
        announce(f"adapter.{line}")
    if drawn := random_settings(skeleton):
        announce(f"model: its own {', '.join(drawn)} are off in training, since W0 is frozen")
    teacher = find_teacher(config, base, skeleton, announce)
    packs = settle_packing(config.data.packing, task, skeleton, announce)
    known = identity(base, skeleton)
    tokenizer = with_template(config, base.tokenizer())
    if teacher is not None:
        packs = prepare_teacher(teacher, config, tokenizer, resumed, announce, packs=packs)
    read = (config, tokenizer, task, announce)
    load = functools.partial(load_data, *read, around.writes, once)
    train = open_stream(*read) if config.data.streaming else load("data.train")
    there = [key for key, source in sources(config).items() if source is not None]
    beside = {key: load(key) for key in there if key != "data.train"}
    if teacher is not None:
        teacher.check_data(train.fingerprint)
    limits = limits_of(tokenizer, skeleton)
    check_sequences({"data.train": train, **beside}, limits)
    if teacher is not None and teacher.skeleton is not None:
        limits = limits.beside(limits_of(tokenizer, teacher.skeleton, "the teacher"))
        check_sequences({"data.train": train}, limits)
    if config.output.eval_metrics and (held_out := beside.get("data.eval")) is not None:
        check_installed(config.output.eval_metrics, "output.eval_metrics")
        questions_of(held_out, task, tokenizer, (), "output.eval_metrics: data.eval")
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
    return Material(
        config,
        task,
        base,
        model,
        lora,
        tokenizer,
        train,
        beside.get("data.eval"),
        beside.get("forget.data"),
        sampler,
        packs,
        pad_token(tokenizer, skeleton),
        known,
        resumed,
        teacher,
    )
