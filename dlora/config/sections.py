"""The sections of a configuration: every option once, with type, default, meaning and range.

What belongs to one method, initialisation, optimizer, … is declared in its own file, and so are the
options of any adapter, in `lora/config.py`; `carries` gives the sections a field for each of them.
"""

import keyword
import operator
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from dlora.config.forget import ForgetConfig
from dlora.config.members import Member
from dlora.config.output import OutputConfig
from dlora.registry import Option, carries, option, options_of, required, room

T = TypeVar("T")
Attention = Literal[
    "auto",
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base W0: where it comes from and how it is stored."""

    path: str = required("hub id, local directory, or a .gguf file")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run the Python code that comes with the model")
    cache_dir: str = option("~/.cache/dlora", "for converted bases; printed when written to")
    dtype: Literal["bfloat16", "float32", "auto"] = option(
        "bfloat16", "type of W0; auto: bfloat16 where native, else float32", later=("float16",)
    )
    quantization: str = option("none", "packed storage of W0", room="quant")
    attn_implementation: Attention = option(
        "auto", "transformers' attention kernel; auto: sdpa where the class has it, else its own"
    )


@dataclass(frozen=True, kw_only=True)
@carries("lora.config", "lora.init", "lora.variants")
class AdapterConfig:
    """What is trained beside W0; names and meanings are PEFT's."""

    method: str = option("lora", "the form of the adapter", room="lora.variants")
    path: str | None = option(
        None, "start from this adapter, a directory or hub id, instead of a fresh one"
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that one of the sources above declares."""


@dataclass(frozen=True, kw_only=True)
@carries("sharding.engines")
class ShardingConfig:
    """Where W0 lives among the ranks."""

    engine: str = option("fsdp2", "what shards and gathers W0", room="sharding.engines")
    base: Literal["auto", "none", "node", "world"] = option(
        "auto", "sharded over the world, over a node, or none: a whole copy per rank"
    )
    ranks_per_node: int | None = option(
        None, "ranks per node; null: as the launcher started them", ge=1
    )
    optimizer_state: Literal["auto", "replicated", "divided"] = option(
        "auto",
        "replicated: whole on every rank, saves need no collective; divided: 1/ranks of it on each "
        "rank, for large adapters, saves are collective",
    )
    activation_checkpointing: bool | Literal["auto"] | dict[str, int | bool] = option(
        False,
        "recompute activations in backward: in all blocks, in each k-th one ({every: k}), with "
        "their inputs in host memory ({offload: true}), or auto: the cheapest of these that fits",
    )
    memory_budget_gb: float | None = option(
        None, "GB per rank; spare memory keeps frozen layers gathered", gt=0
    )
    reduce_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "in which gradients of A and B are sent; sums are float32; null: float32"
    )
    audit: Literal["stop", "heal"] = option(
        "stop",
        "if A or B differ between ranks: stop, or heal by the majority of ranks",
    )
    timeout_seconds: float = option(600.0, "a collective that takes longer ends the run", gt=0)
    loading_timeout_seconds: float = option(
        3600.0,
        "the same until all ranks have their data and weights, some from a slower disk",
        gt=0,
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that an engine's file declares."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the adapter learns from."""

    train: str | list[str | dict[str, str | float]] | dict[str, str | float] = required(
        "file, glob, directory of datasets.save_to_disk, data set id of the Hugging Face hub, "
        "{path: ..., weight: w, split: ..., name: ..., revision: ...}, a list of these, or "
        "builtin:docstrings"
    )
    eval: str | list[str | dict[str, str | float]] | dict[str, str | float] | None = option(
        None, "as train, or builtin:docstrings-heldout; weights cannot act"
    )
    columns: dict[str, str] = option({}, "{field of the format: the column that it is in}")
    max_eval_samples: int | None = option(
        None, "evaluate on the first so many records of data.eval; null: on all", ge=1
    )
    format: str = option("chat", "layout of a record", room="data.formats", later=("unpaired",))
    chat_template: str | None = option(
        None, "a Jinja file, or the template itself, in place of the tokenizer's chat template"
    )
    chat_template_kwargs: dict[str, bool | str | int | float | None] = option(
        {}, "variables of the chat template, such as {enable_thinking: false}"
    )
    max_length: int = option(1024, "longest sequence, in tokens", ge=2)
    shuffle: bool = option(True, "a new order each epoch, drawn from train.seed")
    streaming: bool = option(
        False, "read data.train while training, in windows, instead of keeping it in memory"
    )
    shuffle_window: int = option(
        10_000, "sequences that are shuffled together", ge=1, when={"streaming": True}
    )
    cache_dir: str | None = option(
        None, "keep what is encoded in this directory, by content, and read it again; null: no"
    )
    packing: bool | Literal["auto"] = option(
        "auto",
        "the sequences of a micro-batch share one row, without padding between them, and never see "
        "each other; auto: where the architecture allows it exactly",
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "if a record cannot be used: stop and name its line, or skip and count it"
    )


@dataclass(frozen=True, kw_only=True)
@carries("optim")
class OptimizerConfig:
    """How A and B are updated."""

    name: str = option("adamw", "the update rule", room="optim")
    lr: float = option(2e-4, "peak learning rate, of A where the two differ", ge=0)
    loraplus_lr_ratio: float = option(1.0, "LoRA+: lr of B over lr of A", gt=0)
    weight_decay: float = option(0.0, "decay of A and B towards zero", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "lr after warm-up")
    warmup_ratio: float = option(0.03, "share of the steps in which lr rises", ge=0, le=1)
    max_grad_norm: float = option(1.0, "clip the gradient norm to this; 0: no clipping", ge=0)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that a file of `optim` declares."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How much is trained, and on what objective."""

    task: str = option("causal", "what the model is trained to do", room="tasks")
    num_labels: int | None = option(
        None,
        "labels of a classification; null: as many as data.train has",
        ge=2,
        when={"task": "classification"},
    )
    objective: str = option("sft", "the loss", room="objectives", later=("kto",))
    max_steps: int = option(200, "optimizer steps in all", ge=1)
    epochs: int | None = option(None, "passes over the data; set it instead of max_steps", ge=1)
    global_batch_size: int = option(32, "sequences per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = option(4, "sequences per rank and forward", ge=1)
    tokens_per_micro_batch: int | Literal["auto"] | None = option(
        None,
        "tokens per rank and forward, padding included, in place of micro_batch_size; auto: as "
        "many as fit by the plan",
        ge=1,
    )
    allow_unused: bool = option(
        False, "continue even if a trained tensor had no gradient in the first 10 steps"
    )
    deterministic: bool = option(
        False, "the same bits from run to run on GPUs as well, by slower kernels"
    )
    compile: bool | Literal["auto"] = option(
        "auto",
        "each block as graphs of torch.compile; auto: where there is a compiler and the run is "
        "long enough to earn the time that it takes",
    )
    compile_cache: str | None = option(
        "~/.cache/dlora/compile",
        "where torch's compiler keeps what it made: a directory that nobody else may write to, "
        "since torch unpickles it; null: nowhere",
    )
    seed: int = option(0, "seed of initialisation, data order and dropout", ge=0, lt=2**32)

    @property
    def governed_by(self) -> Literal["max_steps", "epochs"]:
        """Which of the two decides when the run ends."""
        return "max_steps" if self.epochs is None else "epochs"


def spelled(name: str) -> str:
    """How a field's option is written: a field cannot have the name of a word of Python's."""
    bare = name.removesuffix("_")
    return bare if keyword.iskeyword(bare) else name


def _sections_of_objectives(cls: type[T]) -> type[T]:
    """Add a section for every objective that has options, under the objective's name."""
    for name, part in room("objectives").items():
        if part.options:
            made = [(o.name, o.type, o.field("objectives", (name,))) for o in part.options]
            section = make_dataclass(str(name), made, frozen=True, kw_only=True)
            for word in (o.name for o in part.options if spelled(o.name) != o.name):
                setattr(section, spelled(word), property(operator.attrgetter(word)))
            section.__doc__ = f"How train.objective: {name} counts."
            cls.__annotations__[str(name)] = section
            setattr(cls, str(name), field(default_factory=section))
    return cls


@dataclass(frozen=True, kw_only=True)
@_sections_of_objectives
class Config:
    """All sections, and which dotted keys the user set (in the file or on the command line).

    Attributes:
        adapters: what is trained together in one run; empty: the one adapter of the sections.
    """

    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    forget: ForgetConfig = field(default_factory=ForgetConfig)
    output: OutputConfig
    adapters: tuple[Member, ...] = ()
    user_set: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


SECTIONS: dict[str, type] = {
    name: hint
    for name, hint in get_type_hints(Config).items()
    if name not in ("adapters", "user_set")
}
SCHEMA: dict[str, Option] = {}  # by dotted key, in the order of the contract
for _name, _section in SECTIONS.items():
    SCHEMA |= options_of(_section, lambda field, of=_name: f"{of}.{spelled(field)}")  # type: ignore[misc]


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    return operator.attrgetter(key)(config)


def task_name(config: Config) -> str:
    """What the model is trained to do: `train.task`, or what the objective makes of it."""
    part = room("objectives").get(config.train.objective)  # none: it comes later
    return (part.says.get("task") if part else None) or config.train.task


def record_format(config: Config) -> str:
    """The layout of records: that of the task, which for some is another than `data.format`."""
    return room("tasks")[task_name(config)].says.get("format") or config.data.format


def is_set(config: Config, key: str) -> bool:
    """Whether the user set `key`; in a `Config` built in Python: whether it is not the default."""
    return key in config.user_set or value_of(config, key) != SCHEMA[key].default
