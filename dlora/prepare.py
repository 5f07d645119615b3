"""Everything that a run needs and that can be wrong, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dlora.adapter_files import read_config
from dlora.base_model import BaseModel, check_experts_divide, find_base
from dlora.config import Config
from dlora.data import Dataset, Sampler, check_source, load_examples
from dlora.errors import UsageError
from dlora.lora.attach import attach, trainable_parameters
from dlora.lora.config import LoraConfig
from dlora.objectives.targets import model_parts
from dlora.plan import Budget, budget
from dlora.sharding.mesh import Placement, Topology, resolve_placement
from dlora.sharding.share import state_is_divided


@dataclass(frozen=True)
class Preparation:
    """What `prepare` found out; no weights."""

    base: BaseModel
    tokenizer: Any
    train: Dataset
    eval: Dataset | None
    sampler: Sampler
    lora: LoraConfig
    placement: Placement
    topology: Topology
    divided: bool  # the optimizer state, over ranks
    budget: Budget

    @property
    def fingerprint(self) -> str:
        """Equal on ranks that are about to train the same."""
        data = [self.train.fingerprint, self.eval.fingerprint if self.eval else ""]
        return " ".join([*data, str(self.lora), str(self.divided)])

    @property
    def pad_id(self) -> int:
        """Token of padded positions; which one does not matter, since they are masked."""
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def prepare(
    config: Config, rank: int, world: int, local_world: int, announce: Callable[[str], None]
) -> Preparation:
    """Read the data, the tokenizer and the model's skeleton, and plan.

    Raises:
        UsageError: data, model or adapter settings are wrong, named by key, file or line.
    """
    topology = Topology(rank, world, config.sharding.ranks_per_node or local_world)
    placement = resolve_placement(
        config.sharding.engine,
        config.sharding.base,
        topology,
        offload=config.sharding.cpu_offload,
    )
    divided = state_is_divided(config.sharding.optimizer_state)
    lora = lora_config(config)
    if config.model.path.endswith(".gguf"):
        # Its tokenizer comes with the conversion, and a typo in the data must not wait for that.
        for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if source is not None:
                check_source(source, key=key, format=config.data.format)
    base = find_base(
        config.model.path,
        dtype=config.model.dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        cache_dir=config.model.cache_dir,
        attn_implementation=config.model.attn_implementation,
        announce=announce,
    )
    skeleton = base.skeleton()
    model_parts(skeleton)
    check_experts_divide(skeleton, placement)
    with keyed_by("adapter"):
        attach(skeleton, lora)
    tokenizer = base.tokenizer()
    train = _load(config, "train", config.data.train, tokenizer, announce)
    held_out = config.data.eval and _load(config, "eval", config.data.eval, tokenizer, announce)
    sampler = Sampler(
        len(train),
        config.train.global_batch_size,
        config.train.seed,
        config.data.shuffle,
        **_length(config),
    )
    announce(_said_of_steps(sampler, config.train.global_batch_size))
    if divided:
        announce(
            f"optimizer state: divided, 1/{world} on each rank, so a save needs all ranks: each "
            "sends its part to rank 0 (sharding.optimizer_state)"
        )
    micro_batches = -(-config.train.global_batch_size // (world * config.train.micro_batch_size))
    planned = budget(
        skeleton,
        trainable_parameters(skeleton),
        placement,
        topology,
        optimizer=config.optimizer.name,
        micro_batches=micro_batches,
        checkpointing=config.sharding.activation_checkpointing,
        divided=divided,
    )
    return Preparation(
        base,
        tokenizer,
        train,
        held_out or None,
        sampler,
        lora,
        placement,
        topology,
        divided,
        planned,
    )


def lora_config(config: Config) -> LoraConfig:
    """The `adapter` section, or the configuration of the adapter that it starts from."""
    section = config.adapter
    with keyed_by("adapter"):
        if section.path is not None:
            return replace(read_config(section.path), lora_dropout=section.lora_dropout)
        return LoraConfig(
            r=section.r,
            lora_alpha=section.lora_alpha,
            lora_dropout=section.lora_dropout,
            target_modules=section.target_modules,
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
            init_lora_weights=section.init_lora_weights,
            rank_pattern=section.rank_pattern,
            alpha_pattern=section.alpha_pattern,
            modules_to_save=section.modules_to_save,
        )


@contextmanager
def keyed_by(section: str) -> Iterator[None]:
    """Inside, a `UsageError` on a field (`r: …`) names the section's key (`adapter.r: …`)."""
    try:
        yield
    except UsageError as error:
        field = str(error).partition(":")[0].partition("[")[0]
        if field not in LoraConfig.__dataclass_fields__:
            raise
        raise UsageError(f"{section}.{error}") from None


def _load(
    config: Config,
    key: str,
    source: str | list[str],
    tokenizer: Any,
    announce: Callable[[str], None],
) -> Dataset:
    dataset = load_examples(
        source,
        key=f"data.{key}",
        format=config.data.format,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
    )
    announce(f"data.{key}: {dataset.report}")
    return dataset


def _said_of_steps(sampler: Sampler, size: int) -> str:
    steps = sampler.total_steps
    last = len(sampler.step(steps - 1))
    rest = "" if last == size else f", the last one of the {last} that are left"
    return f"train: {steps} optimizer steps of {size} sequences{rest}"


def _length(config: Config) -> dict[str, int]:
    if config.train.epochs is not None:
        return {"epochs": config.train.epochs}
    return {"max_steps": config.train.max_steps}
