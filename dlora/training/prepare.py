"""Everything that a run needs and that can be wrong, before a weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.settings import keyed_by, lora_config, scheduled, settings_today
from dlora.base.eval_mode import random_settings
from dlora.base.identity import identity
from dlora.base.model import BaseModel, find_base
from dlora.base.quantize import Quantized
from dlora.base.skeleton import check_experts_divide
from dlora.config.chat_template import template_text
from dlora.config.load import Config
from dlora.data import Dataset, Sampler, check_source, load_examples
from dlora.data.cache import cached
from dlora.data.stream import Stream, StreamSampler
from dlora.data.template import set_template
from dlora.errors import UsageError
from dlora.lora.attach import (
    adapter_tensors,
    attach,
    attachment_of,
    load_record,
    trainable_parameters,
)
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import KEYED_BY
from dlora.lora.left import unreached_by_text
from dlora.plan.choose import Decision, capacity_of, decide
from dlora.plan.plan import Plan, Subject
from dlora.plan.workload import workload_of
from dlora.sharding.topology import Placement, Topology
from dlora.training.check_resume import check_resume
from dlora.training.checks import (
    Limits,
    check_adapter,
    check_attention,
    check_dropout,
    check_gradients,
    check_loss,
    check_placement,
    check_ranks_per_node,
    check_sequences,
    limits_of,
    pad_token,
)
from dlora.training.earlier_placement import earlier_placement, settle
from dlora.training.find_checkpoint import ResumePoint


@dataclass(frozen=True)
class Preparation:
    """What `prepare` found out; it has no weights.

    Attributes:
        unreached: adapted modules that text alone does not reach, of a model that takes images too.
    """

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
    unreached: tuple[str, ...] = ()

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
        chosen = [self.placement, self.divided, self.budget.resident]
        return " ".join([*data, str(self.lora), *map(str, chosen)])


@dataclass(frozen=True)
class Surroundings:
    """What has to be equal on all ranks, so that all of them plan the same.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        free: bytes that each rank may take; None if that is not known, and then everything fits.
        writes: whether `data.cache_dir` may be written.
    """

    device: str = "cpu"
    free: int | None = None
    writes: bool = True


def prepare(
    config: Config,
    topology: Topology,
    announce: Callable[[str], None],
    resumed: ResumePoint | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 - frozen
) -> Preparation:
    """Read the data, the tokenizer and the model's skeleton, and plan.

    Args:
        resumed: the checkpoint that the run resumes, if there is one.

    Raises:
        UsageError: data, model or adapter settings are wrong, named by key, file or line, or no
            placement fits the budget.
    """
    check_ranks_per_node(config, topology.world)
    check_placement(config, topology)
    check_attention(config, around.device)
    lora = lora_config(config, resumed.lora if resumed else None)
    base = _base(config, announce)
    skeleton, quantized, lora = _adapted(config, base, lora, resumed)
    if quantized is not None:
        announce(f"model.quantization: {quantized}")
    attachment = attachment_of(skeleton)
    for line in attachment.left:
        announce(f"adapter.{line}")
    if drawn := random_settings(skeleton):
        announce(f"model: its own {', '.join(drawn)} are off in training, since W0 is frozen")
    known = identity(base, skeleton)
    tokenizer = with_template(config, base.tokenizer())
    load = functools.partial(_load, config, tokenizer, announce, around.writes)
    train = _stream(config, tokenizer, announce) if config.data.streaming else load("train")
    held_out = load("eval") if config.data.eval is not None else None
    limits = limits_of(tokenizer, skeleton)
    check_sequences({"data.train": train, "data.eval": held_out}, limits)
    sampler = _sampler(config, train, limits, announce)
    lora = scheduled(lora, sampler.total_steps)
    if resumed is not None:
        tensors = adapter_tensors(skeleton)
        check_resume(resumed, config, lora, tensors, sampler, train.fingerprint, known, announce)
        if lora.lora_dropout and not resumed.has_masks_of(KEYED_BY):
            announce(
                "output.resume: the checkpoint is of a version that drew dropout masks otherwise: "
                "from here on they differ from those that the run would have had"
            )
    if around.device == "cpu" and base.dtype == torch.bfloat16 and not multiplies_bfloat16():
        announce(
            "model.dtype: this CPU has no instructions for bfloat16, which is many times slower "
            "than float32 on it"
        )
    if isinstance(sampler, StreamSampler) and resumed and resumed.step < sampler.total_steps:
        announce(f"data.streaming: reading on to step {resumed.step}")
        sampler.step(resumed.step)
    announce(_steps_line(sampler, config.train.global_batch_size))
    decision = _decision(config, skeleton, topology, train, sampler, around, resumed)
    if decision.plan.divided:
        announce(
            f"optimizer state: divided, 1/{topology.world} on each rank, so a save needs all "
            "ranks: each sends its part to rank 0 (sharding.optimizer_state); there are no "
            "snapshots (output.snapshot_every), and a lost rank leaves the last save"
        )
    return Preparation(
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
        unreached=tuple(unreached_by_text(skeleton, [*attachment.adapted, *attachment.saved])),
    )


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has kernels for matrices of it on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _decision(
    config: Config,
    skeleton: Any,
    topology: Topology,
    data: Dataset | Stream,
    sampler: Sampler | StreamSampler,
    around: Surroundings,
    resumed: ResumePoint | None,
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
    workload = workload_of(config, world)  # any sequence may be the longest
    if isinstance(data, Dataset) and isinstance(sampler, Sampler):
        workload = workload_of(config, world, data, sampler)
    decision = decide(
        Subject(
            skeleton,
            trainable_parameters(skeleton),
            workload,
            device=around.device,
            check=lambda placement: check_experts_divide(skeleton, placement),
        ),
        topology,
        engine=settings.engine,
        base=settings.base,
        optimizer_state=settings.optimizer_state,
        capacity=capacity_of(section.memory_budget_gb, around.free),
        offload=section.cpu_offload,
        checkpointing=setting,
    )
    if not settings.reason:
        return decision
    is_open = settings.base == "auto"
    return replace(decision, reason=settings.reason + (f": {decision.reason}" if is_open else ""))


def _base(config: Config, announce: Callable[[str], None]) -> BaseModel:
    """The base that the `model` section names."""
    if config.model.path.endswith(".gguf"):
        # Its tokenizer needs the conversion, and an error in the data should not wait for that.
        for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if source is not None:
                check_source(
                    source,
                    key=key,
                    format=config.data.format,
                    on_error=config.data.on_error,
                    columns=config.data.columns,
                )
    return find_base(
        config.model.path,
        dtype=config.model.dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        cache_dir=config.model.cache_dir,
        attn_implementation=config.model.attn_implementation,
        quantization=config.model.quantization,
        announce=announce,
    )


def _adapted(
    config: Config, base: BaseModel, lora: LoraConfig, resumed: ResumePoint | None
) -> tuple[nn.Module, Quantized | None, LoraConfig]:
    """The base on the meta device with its adapters, after all checks of names and shapes.

    Returned with what was packed, and the settings with the names that the base has today.
    """
    skeleton = base.skeleton()
    if config.adapter.path is not None:
        # Of a resumed run whose adapter is gone, the checkpoint has the settings.
        here = Path(config.adapter.path).expanduser()
        found = here if resumed else adapter_directory(config.adapter.path)
        lora = settings_today(skeleton, lora, found)
    base.check_stored(skeleton)
    check_loss(skeleton)
    quantized = base.pack(skeleton)
    with keyed_by("adapter"):
        attach(skeleton, lora, residual=True)
    load_record(skeleton, resumed.record if resumed else None)
    check_dropout(skeleton)
    check_gradients(skeleton)
    if config.adapter.path is not None and resumed is None:
        check_adapter(skeleton, adapter_directory(config.adapter.path))
    return skeleton, quantized, lora


def with_template(config: Config, tokenizer: Any) -> Any:
    """The tokenizer with the chat template that the configuration asks for."""
    template = config.data.chat_template
    text = None if template is None else template_text(template)
    set_template(tokenizer, text, config.data.chat_template_kwargs)
    return tokenizer


def _sampler(
    config: Config, data: Dataset | Stream, limits: Limits, announce: Callable[[str], None]
) -> Sampler | StreamSampler:
    train = config.train
    length = {train.governed_by: getattr(train, train.governed_by)}
    if isinstance(data, Dataset):
        order = (train.seed, config.data.shuffle)
        weights = data.weights
        return Sampler(len(data), train.global_batch_size, *order, **length, weights=weights)
    data.check = functools.partial(limits.check, "data.train")
    sampler = StreamSampler(data, train.global_batch_size, **length)
    if train.governed_by == "epochs":
        announce(f"data.train: {data.report} (counted in a pass of its own, for train.epochs)")
    data.announce = announce
    return sampler


def reading_of(config: Config, tokenizer: Any) -> dict[str, Any]:
    """How records are read and encoded: what `Reading` takes beside a source and its key."""
    return {
        "format": config.data.format,
        "tokenizer": tokenizer,
        "max_length": config.data.max_length,
        "on_error": config.data.on_error,
        "columns": config.data.columns,
    }


def _stream(config: Config, tokenizer: Any, announce: Callable[[str], None]) -> Stream:
    data, settings = config.data, reading_of(config, tokenizer)
    stream = Stream(
        data.train,
        window=data.shuffle_window,
        seed=config.train.seed,
        shuffle=data.shuffle,
        **settings,
    )
    order = f"shuffled in windows of {data.shuffle_window}" if data.shuffle else "not shuffled"
    announce(
        f"data.streaming: sequences are read file after file and {order}; of the first window: "
        f"{stream.report}"
    )
    return stream


def _load(
    config: Config, tokenizer: Any, announce: Callable[[str], None], writes: bool, key: str
) -> Dataset:
    arguments: dict[str, Any] = {
        "source": getattr(config.data, key),
        "key": f"data.{key}",
        "most": config.data.max_eval_samples if key == "eval" else None,
        **reading_of(config, tokenizer),
    }
    build = functools.partial(load_examples, **arguments)
    if config.data.cache_dir is None or not writes:
        dataset = build()
    else:
        dataset = cached(Path(config.data.cache_dir).expanduser(), build, announce, **arguments)
    announce(f"data.{key}: {dataset.report}")
    return dataset


def _steps_line(sampler: Sampler | StreamSampler, size: int) -> str:
    steps = sampler.total_steps
    last = sampler.sequences(steps) - sampler.sequences(steps - 1)
    rest = "" if last == size else f", the last of only {last}"
    return f"train: {steps} optimizer steps of {size} sequences{rest}"
