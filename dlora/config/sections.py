"""The sections of a configuration: every option once, with type, default, meaning and range."""

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from dlora.config.options import Option, option, required, schema_of

Attention = Literal[
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
]
InitLoraWeights = Literal[True, "gaussian", "orthogonal", "pissa", "milora", "lora_ga"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base W0: where it comes from and how it is stored."""

    path: str = required("hub id, local directory, or a .gguf file")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run the Python code that comes with the model")
    cache_dir: str = option("~/.cache/dlora", "holds converted bases; printed when written to")
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "storage and compute type of W0"
    )
    quantization: Literal["none", "nf4", "nf4-dq", "int8"] = option("none", "packed storage of W0")
    attn_implementation: Attention = option("sdpa", "transformers' attention kernel")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained beside W0; names and meanings are PEFT's."""

    method: Literal["lora", "adalora", "flora"] = option("lora", "the form of the adapter")
    path: str | None = option(None, "start from this adapter instead of a fresh one")
    r: int = option(16, "LoRA rank: A is r x in, B is out x r", ge=1)
    lora_alpha: int | float = option(32, "the update is scaled by lora_alpha / r", gt=0)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = option(
        "all-linear", "all-linear, a list of names, or a regular expression"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = option(False, "weight-decomposed LoRA: a trained magnitude per output")
    init_lora_weights: InitLoraWeights = option(
        True,
        "true: A is Kaiming-uniform and B zero; pissa, milora: of W0; lora_ga: of its gradient",
    )
    lora_ga_gamma: float = option(16.0, "lora_ga: a larger one makes a smaller start", gt=0)
    lora_ga_batches: int = option(
        2, "lora_ga: the gradient is estimated on the sequences of so many first steps", ge=1
    )
    rank_pattern: dict[str, int] = option({}, "r by module name or regular expression", ge=1)
    alpha_pattern: dict[str, int | float] = option(
        {}, "lora_alpha by module name or regular expression", gt=0
    )
    modules_to_save: list[str] = option([], "modules trained and saved in full")
    flora_r_out: int | None = option(None, "flora: the core is r x this; null: r x r", ge=1)
    flora_kernel_r: int | None = option(
        None, "flora: rank of each dim of a convolution's kernel; null: its size", ge=1
    )
    init_r: int = option(12, "adalora: rank at the start", ge=1)
    target_r: int = option(8, "adalora: mean rank at the end", ge=1)
    tinit: int = option(0, "adalora: steps before the first pruning", ge=0)
    tfinal: int = option(0, "adalora: steps after the last pruning", ge=0)
    deltaT: int = option(1, "adalora: steps between two prunings", ge=1)  # noqa: N815 - PEFT's name
    beta1: float = option(0.85, "adalora: smoothing of the sensitivity", ge=0, lt=1)
    beta2: float = option(0.85, "adalora: smoothing of the uncertainty", ge=0, lt=1)
    orth_reg_weight: float = option(0.5, "adalora: weight of the orthogonality penalty", ge=0)
    importance: Literal["uncertainty", "sensitivity", "magnitude"] = option(
        "uncertainty",
        "adalora: what judges a triplet: averages of sensitivity and uncertainty, sensitivity in "
        "the mask's step, or |lambda|",
    )
    budget_unit: Literal["triplets", "params"] = option(
        "triplets", "adalora: what budgets count; params: wide matrices pay what they cost"
    )


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where W0 lives among the ranks."""

    engine: Literal["fsdp2", "zero3"] = option("fsdp2", "what shards and gathers W0")
    base: Literal["auto", "none", "node", "world"] = option(
        "auto", "sharded over the world, over a node, or none: a whole copy per rank"
    )
    ranks_per_node: int | None = option(
        None, "ranks that share a node; null: as the launcher says", ge=1
    )
    cpu_offload: bool = option(False, "zero3: keep the ranks' parts of W0 in host memory")
    optimizer_state: Literal["auto", "replicated", "divided"] = option(
        "auto",
        "replicated: on every rank, saves need no collective; divided: 1/ranks of it on each, for "
        "large adapters, saves are collective",
    )
    activation_checkpointing: bool = option(False, "recompute activations in backward")
    memory_budget_gb: float | None = option(
        None, "per rank; spare memory keeps frozen layers resident", gt=0
    )
    audit: Literal["stop", "heal"] = option(
        "stop", "where A or B differ between ranks: stop, or give all the bits that most ranks have"
    )
    timeout_seconds: float = option(600.0, "a collective that takes longer ends the run", gt=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the adapter learns from."""

    train: str | list[str] = required("file, list of files, glob, or builtin:docstrings")
    eval: str | list[str] | None = option(None, "likewise; also builtin:docstrings-heldout")
    format: Literal["chat", "alpaca", "sharegpt", "text", "preference"] = option(
        "chat", "layout of a record"
    )
    max_length: int = option(1024, "longest sequence, in tokens", ge=2)
    shuffle: bool = option(True, "a new order each epoch, drawn from train.seed")
    packing: bool = option(False, "several sequences in one row")
    on_error: Literal["stop", "skip"] = option(
        "stop", "at a record that cannot be used: stop and name its line, or skip and count it"
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How A and B are updated."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lora_pro", "sgd"] = option(
        "adamw", "the update rule"
    )
    lr: float = option(2e-4, "peak learning rate, of A where the two differ", ge=0)
    lora_pro_moments: Literal["low", "full"] = option(
        "low", "lora_pro: moments of the sizes of A and B, or of W as in the paper, at its lr"
    )
    loraplus_lr_ratio: float = option(1.0, "LoRA+: lr of B over lr of A", gt=0)
    weight_decay: float = option(0.0, "decay of A and B towards zero", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "lr after warm-up")
    warmup_ratio: float = option(0.03, "share of the steps in which lr rises", ge=0, le=1)
    max_grad_norm: float = option(1.0, "clip the gradient norm to this; 0: no clipping", ge=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How much is trained, and on what objective."""

    objective: Literal["sft", "dpo"] = option("sft", "the loss")
    max_steps: int = option(200, "optimizer steps in all", ge=1)
    epochs: int | None = option(None, "passes over the data, set instead of max_steps", ge=1)
    global_batch_size: int = option(32, "sequences per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = option(4, "sequences per rank and forward", ge=1)
    allow_unused: bool = option(
        False, "go on although a trained tensor has had no gradient in the first 10 steps"
    )
    seed: int = option(0, "of initialisation, data order and dropout", ge=0, lt=2**32)

    @property
    def governed_by(self) -> Literal["max_steps", "epochs"]:
        """Which of the two decides when the run ends."""
        return "max_steps" if self.epochs is None else "epochs"


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run writes, and how it resumes."""

    dir: str = required("directory of the run")
    log_every: int = option(1, "steps between metrics; 0: never", ge=0)
    eval_every: int = option(50, "steps between evaluations; 0: never", ge=0)
    save_every: int = option(50, "steps between checkpoints; 0: never", ge=0)
    keep_last: int = option(2, "checkpoints to keep", ge=1)
    remote: str | None = option(
        None, "an fsspec URL (s3://..., gs://...): checkpoints are copied there and fetched from it"
    )
    resume: str = option("auto", "auto, none, or the path of a checkpoint")
    stop_file: str | None = option(
        None, "a path: when it appears the run commits and exits, as on SIGTERM"
    )
    resume_force: bool = option(False, "resume although base, data or settings differ")
    tensorboard: bool = option(True, "write the metrics as scalars too")
    samples: int = option(0, "answers to held-out prompts, printed before and after", ge=0)

    @property
    def directory(self) -> Path:
        """`output.dir` as a path."""
        return Path(self.dir).expanduser()

    @property
    def stop_path(self) -> Path | None:
        """`output.stop_file` as a path."""
        return None if self.stop_file is None else Path(self.stop_file).expanduser()


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections, and which dotted keys the user set (in the file or on the command line)."""

    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig
    user_set: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


SECTIONS: dict[str, type] = {
    name: hint for name, hint in get_type_hints(Config).items() if name != "user_set"
}
SCHEMA: dict[str, Option] = {}  # by dotted key, in the order of the contract
for _name, _section in SECTIONS.items():
    SCHEMA |= schema_of(_section, f"{_name}.{{}}".format)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return operator.attrgetter(key)(config)


def is_set(config: Config, key: str) -> bool:
    """Whether the user chose `key`; a `Config` built in Python shows only what left its default."""
    return key in config.user_set or value_of(config, key) != SCHEMA[key].default
