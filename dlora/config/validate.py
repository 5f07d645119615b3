"""Checks of a configuration that need neither the model nor the data.

`inert.py` lists options that do nothing beside certain others; what a method, an optimizer, …
allows beside it is declared in its file, see `dlora.registry.Part`. Each check yields one clause
per problem.
"""

import importlib.util
import re
from collections.abc import Iterator

import fsspec

from dlora.config import evaluations
from dlora.config.inert import INERT
from dlora.config.options import show
from dlora.config.recompute import problem
from dlora.config.sections import SCHEMA, Config, is_set, record_format, task_name, value_of
from dlora.errors import LaterError, UsageError
from dlora.registry import ROOMS, Part, plain, room

CANNOT_ACT = " cannot act: "  # in what is said of an option that does nothing


def parts_of(config: Config) -> Iterator[tuple[str, Part]]:
    """(key, part) of every part that the configuration picks."""
    for name, key in ROOMS.items():
        part = room(name).get(value_of(config, key))
        if part is not None:
            yield key, part


def validate(config: Config) -> None:
    """Raise one `UsageError` that names every key whose value cannot be right."""
    if problems := problems_of(config):
        raise UsageError("; ".join(problems))


def problems_of(config: Config) -> list[str]:
    """A clause for every key whose value cannot be right."""
    right = (_bad_values, _bad_patterns, _bad_recompute)
    checks = (
        *right,
        _contradictions,
        evaluations.problems,
        _cannot_act,
        _not_built,
        _not_installed,
    )
    return [found for check in checks for found in check(config)]


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
    for name in ("target_modules", "exclude_modules"):
        if isinstance(expression := getattr(adapter, name), str):
            patterns.append((f"adapter.{name}", expression, "{}"))
    for key, pattern, place in patterns:
        if not isinstance(pattern, str):
            yield f"{key}: the name {show(pattern)} must be quoted"
            continue
        try:
            re.compile(place.replace("{}", pattern))
        except re.error as error:
            yield f"{key}: {show(pattern)} is not a regular expression: {error}"


def _bad_recompute(config: Config) -> Iterator[str]:
    if said := problem(config.sharding.activation_checkpointing):
        yield f"sharding.activation_checkpointing: {said}"


def _contradictions(config: Config) -> Iterator[str]:
    adapter, quantization = config.adapter, config.model.quantization
    init = adapter.init_lora_weights
    needs = room("lora.init")[init].says.get("needs")
    for key, part in parts_of(config):
        for other, relation, value, why in part.says.get("clashes", ()):
            if (value_of(config, other) == value) == (relation == "=="):
                said = plain(value_of(config, other))
                yield f"{other}: {said} cannot be combined with {key}: {part.name}, {why}"
        section = key.partition(".")[0]
        for name, own in part.says.get("instead", {}).items():
            if is_set(config, f"{section}.{name}"):
                yield (f"{section}.{name}: {part.name} uses {section}.{own}; set that instead")
    if adapter.use_dora and adapter.method != "lora":
        yield (f"adapter.use_dora: DoRA needs adapter.method: lora, not {adapter.method}")
    if quantization != "none" and needs == "gradient":
        yield (
            f"adapter.init_lora_weights: {init} needs gradients of W0, and model.quantization: "
            f"{quantization} packs it; set model.quantization: none"
        )
    elif quantization != "none" and needs == "weight" and adapter.use_dora:
        yield (
            "adapter.use_dora: DoRA needs the rows of W0, but with adapter.init_lora_weights: "
            f"{init} model.quantization: {quantization} packs the residual; drop one of them"
        )
    if adapter.method != "lora" and adapter.path is not None:
        yield (
            f"adapter.path: {adapter.method} cannot start from an adapter on disk, which is a "
            "plain LoRA"
        )
    yield from _bad_forgetting(config)
    trackers = config.output.report_to
    if "tensorboard" in trackers and not config.output.tensorboard:
        yield "output.report_to: tensorboard contradicts output.tensorboard: false; drop one"
    for name in sorted({name for name in trackers if trackers.count(name) > 1}):
        yield f"output.report_to: {name} is there twice"
    task, format = config.train.task, record_format(config)
    # The default says nothing: the file of a run has it too.
    if format == "labelled" and config.data.format not in (format, SCHEMA["data.format"].default):
        yield (
            f"data.format: {config.data.format} cannot act: train.task: {task} reads the fields "
            "text and label (data.columns names where they are)"
        )
    if config.train.tokens_per_micro_batch is not None:
        if is_set(config, "train.micro_batch_size"):
            yield (
                "train.tokens_per_micro_batch: train.micro_batch_size is set as well; set only one "
                "of the two"
            )
        if task == "seq2seq":
            yield (
                "train.tokens_per_micro_batch: train.task: seq2seq pads sources and answers apart; "
                "set train.micro_batch_size"
            )
    yield from _of_objective(config)
    if config.train.governed_by == "epochs" and is_set(config, "train.max_steps"):
        yield "train.max_steps: train.epochs is set as well; set only one of the two"


def _of_objective(config: Config) -> Iterator[str]:
    """What an objective and the layout of records do not have in common."""
    objective, format = config.train.objective, config.data.format
    part = room("objectives").get(objective)
    if part is None:  # it comes later
        return
    reads = part.says.get("formats", ())
    if reads and format not in reads:
        yield (
            f"data.format: train.objective: {objective} reads {' or '.join(reads)}, not {format}; "
            f"set data.format: {reads[0]}"
        )
    of = [str(p.name) for p in room("objectives").values() if format in p.says.get("formats", ())]
    if of and objective not in of:
        yield (
            f"train.objective: {objective} cannot read data.format: {format}, which is for "
            f"{', '.join(sorted(of))}"
        )
    if config.train.tokens_per_micro_batch is not None and task_name(config) == "preference":
        yield (
            f"train.tokens_per_micro_batch: train.objective: {objective} has pairs, whose answers "
            "have a row each; set train.micro_batch_size, which counts pairs"
        )
    copied = value_of(config, "dpo.reference") == "adapter"
    if objective == "dpo" and copied and config.adapter.path is None:
        yield (
            "dpo.reference: adapter is a copy of the adapter at adapter.path, which is null; set "
            "adapter.path or leave it at auto"
        )


def _bad_forgetting(config: Config) -> Iterator[str]:
    """What cannot be measured, or undone, of a model's forgetting."""
    if config.forget.data is None:
        return
    if (task := task_name(config)) != "causal":
        brings = task != config.train.task
        key, value = ("objective", config.train.objective) if brings else ("task", task)
        yield (
            f"forget.data: train.{key}: {value} cannot be combined with it: forgetting is measured "
            "in the logits of a causal language model"
        )
    if config.forget.action == "rollback" and config.adapter.method == "adalora":
        yield (
            "forget.action: rollback cannot be combined with adapter.method: adalora, whose "
            "triplets are cut away in training; set forget.action: stop"
        )
    if config.forget.action == "rollback" and config.output.remote is not None:
        yield (
            "forget.action: rollback cannot be combined with output.remote, whose newest "
            "checkpoints it would have to take back; set forget.action: stop"
        )


def _cannot_act(config: Config) -> Iterator[str]:
    for key, why in _inert(config):
        if (value := value_of(config, key)) != SCHEMA[key].default:
            yield f"{key}: {show(value)}{CANNOT_ACT}{why}"


def _inert(config: Config) -> Iterator[tuple[str, str]]:
    """(key, reason) of the options that do nothing in this configuration."""
    for keys, when, why in INERT:
        yield from ((key, why) for key in keys.split() if when(config))
    for key, part in parts_of(config):
        section = key.partition(".")[0]
        yield from ((f"{section}.{n}", why) for n, why in part.says.get("unused", {}).items())
    for key, opt in SCHEMA.items():
        if opt.owners and value_of(config, ROOMS[opt.room]) not in opt.owners:
            yield key, f"{ROOMS[opt.room]} is not {' or '.join(map(plain, opt.owners))}"
            continue
        for name, wanted in opt.when.items():
            other = f"{key.rpartition('.')[0]}.{name}"
            if value_of(config, other) != wanted:
                yield key, f"{other} is not {plain(wanted)}"


def _not_built(config: Config) -> Iterator[str]:
    for key, opt in SCHEMA.items():
        if (value := value_of(config, key)) in opt.later:
            yield str(LaterError(key, plain(value)))


def _not_installed(config: Config) -> Iterator[str]:
    if (url := config.output.remote) is not None:
        try:
            fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
        except (ImportError, ValueError) as error:
            yield f"output.remote: {url}: {error}"
    for tracker in config.output.report_to:
        if not _is_installed(tracker):  # its package has its name
            yield f"output.report_to: {tracker} is not installed: pip install {tracker}"
    if config.output.metrics_port is not None and not _is_installed("prometheus_client"):
        yield "output.metrics_port: needs prometheus_client: pip install 'dlora[prometheus]'"
    for score, package in evaluations.packages(config):
        if not _is_installed(package):
            install = package.replace("_", "-")
            yield f"output.eval_metrics: {score} needs {install}: pip install 'dlora[eval]'"
    for _, part in parts_of(config):
        for package in part.says.get("requires", {}):
            if importlib.util.find_spec(package) is None:
                yield part.missing(package)


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a directory of its name, as trackers make, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
