"""What a configuration may say, as far as that needs neither model nor data.

Two tables say what a value may ask for: `BUILT` lists the choices that work so far, `INERT` the
options that do nothing beside certain others. Each check yields one clause per problem.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator

import fsspec

from dlora.config.options import plain, show
from dlora.config.sections import SCHEMA, Config, is_set, value_of
from dlora.errors import LaterError, UsageError

# What works so far. Any other choice of these keys is refused as "later": delete what gets built.
BUILT: dict[str, tuple[object, ...]] = {
    "model.dtype": ("bfloat16", "float32"),
    "data.format": ("chat", "alpaca", "sharegpt", "text"),
    "data.packing": (False,),
    "train.objective": ("sft",),
}


EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")


def _is_gguf(c: Config) -> bool:
    return c.model.path.endswith(".gguf")


def _is_local(c: Config) -> bool:
    return _is_gguf(c) or os.path.isdir(os.path.expanduser(c.model.path))


# (options, when they do nothing, why): set to something else than the default, they are refused.
INERT: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("model.revision", _is_local, "model.path is local"),
    ("model.cache_dir", lambda c: not _is_gguf(c), "only a .gguf base is converted"),
    ("model.trust_remote_code", _is_gguf, "a .gguf file brings no code"),
    (
        "adapter.r adapter.lora_alpha adapter.target_modules adapter.use_rslora adapter.use_dora "
        "adapter.init_lora_weights adapter.rank_pattern adapter.alpha_pattern "
        "adapter.modules_to_save",
        lambda c: c.adapter.path is not None,
        "the adapter at adapter.path decides it",
    ),
    (
        "adapter.lora_ga_gamma adapter.lora_ga_batches",
        lambda c: c.adapter.init_lora_weights != "lora_ga",
        "adapter.init_lora_weights is not lora_ga",
    ),
    (
        "adapter.init_r adapter.target_r adapter.tinit adapter.tfinal adapter.deltaT "
        "adapter.beta1 adapter.beta2 adapter.orth_reg_weight adapter.importance "
        "adapter.budget_unit",
        lambda c: c.adapter.method != "adalora",
        "adapter.method is not adalora",
    ),
    (
        "adapter.rank_pattern adapter.init_lora_weights",
        lambda c: c.adapter.method == "adalora",
        "adalora starts every module alike, at adapter.init_r and with lambda = 0",
    ),
    (
        "adapter.flora_r_out adapter.flora_kernel_r",
        lambda c: c.adapter.method != "flora",
        "adapter.method is not flora",
    ),
    (
        "adapter.init_lora_weights",
        lambda c: c.adapter.method == "flora",
        "flora starts with its core at 0",
    ),
    (
        "adapter.beta1 adapter.beta2",
        lambda c: c.adapter.method == "adalora" and c.adapter.importance != "uncertainty",
        "only adapter.importance: uncertainty averages over steps",
    ),
    (
        "output.eval_every",
        lambda c: c.data.eval is None and c.output.eval_every != 0,  # 0 asks for nothing
        "data.eval is null",
    ),
    (
        "optimizer.lora_pro_moments",
        lambda c: c.optimizer.name != "lora_pro",
        "optimizer.name is not lora_pro",
    ),
    (
        "optimizer.loraplus_lr_ratio",
        lambda c: c.optimizer.name == "lora_pro",
        "lora_pro's updates of A and B are one update of W, at one rate",
    ),
    ("sharding.cpu_offload", lambda c: c.sharding.engine != "zero3", "only zero3 offloads W0"),
    ("output.resume_force", lambda c: c.output.resume == "none", "output.resume is none"),
)


def validate(config: Config) -> None:
    """Raise one `UsageError` that names every key whose value cannot be right."""
    checks = (_bad_values, _bad_patterns, _contradictions, _cannot_act, _not_built, _not_installed)
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        raise UsageError("; ".join(problems))


def _bad_values(config: Config) -> Iterator[str]:
    for key, opt in SCHEMA.items():
        yield from opt.problems(value_of(config, key))


def _bad_patterns(config: Config) -> Iterator[str]:
    """Regular expressions that do not compile in the place where PEFT's rules put them."""
    adapter = config.adapter
    patterns: list[tuple[str, object, str]] = [
        (f"adapter.{name}", pattern, r"(.*\.)?({})$")
        for name in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(adapter, name)
    ]
    if isinstance(adapter.target_modules, str):
        patterns.append(("adapter.target_modules", adapter.target_modules, "{}"))
    for key, pattern, place in patterns:
        if not isinstance(pattern, str):
            yield f"{key}: the name {show(pattern)} must be quoted"
            continue
        try:
            re.compile(place.replace("{}", pattern))
        except re.error as error:
            yield f"{key}: {show(pattern)} is not a regular expression: {error}"


def _contradictions(config: Config) -> Iterator[str]:
    name, divided = config.optimizer.name, config.sharding.optimizer_state == "divided"
    if divided and name in EIGHT_BIT:
        yield (
            f"sharding.optimizer_state: divided does not go with optimizer.name: {name}, whose "
            "moments share scales block by block, and are a quarter of adamw's anyway"
        )
    if config.adapter.method == "adalora" and name in EIGHT_BIT:
        yield (
            f"optimizer.name: {name} keeps moments in blocks that share a scale, and these cannot "
            "be cut where adapter.method: adalora prunes"
        )
    if name == "lora_pro" and config.adapter.method != "lora":
        yield (
            "optimizer.name: lora_pro steps pairs of A and B, and adapter.method: "
            f"{config.adapter.method} has more than these"
        )
    if config.adapter.use_dora and config.adapter.method != "lora":
        yield (
            "adapter.use_dora: a magnitude goes with a plain LoRA, not with adapter.method: "
            f"{config.adapter.method}"
        )
    quantization, init = config.model.quantization, config.adapter.init_lora_weights
    if quantization != "none" and init == "lora_ga":
        yield (
            f"adapter.init_lora_weights: lora_ga needs gradients of W0, and model.quantization: "
            f"{quantization} packs it; estimate and train on a 16-bit base"
        )
    elif quantization != "none" and init in ("pissa", "milora") and config.adapter.use_dora:
        yield (
            f"adapter.use_dora: of a base that {quantization} packs without what {init} starts "
            "from there are no rows to take magnitudes of; leave one of the three out"
        )
    if config.adapter.method == "adalora" and is_set(config, "adapter.r"):
        yield "adapter.r: adalora starts from adapter.init_r, set that instead"
    if config.adapter.method != "lora" and config.adapter.path is not None:
        yield (
            f"adapter.path: an adapter on disk is a plain LoRA, and {config.adapter.method} starts "
            "afresh"
        )
    if config.train.governed_by == "epochs" and is_set(config, "train.max_steps"):
        yield "train.max_steps and train.epochs are both set, keep one"


def _cannot_act(config: Config) -> Iterator[str]:
    for keys, when, why in INERT:
        for key in keys.split() if when(config) else ():
            if (value := value_of(config, key)) != SCHEMA[key].default:
                yield f"{key}: {show(value)} cannot act: {why}"


def _not_built(config: Config) -> Iterator[str]:
    for key, built in BUILT.items():
        if (value := value_of(config, key)) not in built:
            yield str(LaterError(key, plain(value)))


def _not_installed(config: Config) -> Iterator[str]:
    if (url := config.output.remote) is not None:
        try:
            fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
        except (ImportError, ValueError) as error:
            yield f"output.remote: {url}: {error}"
    if config.sharding.engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        yield "sharding.engine: zero3 needs deepspeed: pip install 'dlora[zero3]'"
    name = config.optimizer.name
    if name in EIGHT_BIT and importlib.util.find_spec("bitsandbytes") is None:
        yield f"optimizer.name: {name} needs bitsandbytes: pip install 'dlora[quant]'"
