"""`adapters`: several adapters that one run trains together, each as a run of its own would.

    adapters:
      - name: a
        adapter: {r: 8}
        optimizer: {lr: 1.0e-4}
      - name: b
        data: {train: other.jsonl}

An entry stands for the whole configuration with its own keys in the place of the common ones, and
with `output.dir/adapters/NAME` as its directory: `config_of` makes that.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dlora.config.chat_template import template_text
from dlora.config.members import ADAPTERS, Member
from dlora.config.options import Given, convert, show, unknown
from dlora.config.sections import SCHEMA, SECTIONS, Config, value_of
from dlora.config.strict_yaml import parse_yaml
from dlora.errors import UsageError
from dlora.registry import plain, room

OWN = ("adapter", "optimizer", "train", "data")  # sections that an entry may have
COMMON = (  # keys of these that are the same for all
    "train.task",
    "train.num_labels",
    "train.objective",
    "train.compile",
    "train.compile_cache",
    "train.deterministic",
    "data.packing",
    "data.streaming",
)
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TAKEN = ("default", "__base__")
_EITHER = (
    ("train.max_steps", "train.epochs"),
    ("train.micro_batch_size", "train.tokens_per_micro_batch"),
)
# (key, values that can act, why no other can): together, in every entry.
_LIMITS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("train.task", ("causal",), "its head is trained whole, by every adapter another one"),
    ("train.compile", (False, "auto"), "blocks that several adapters share run without graphs"),
    ("data.streaming", (False,), "data sets of several adapters are read into memory"),
    ("sharding.optimizer_state", ("auto", "replicated"), "each adapter's state is whole"),
    ("output.metrics_port", (None,), "an endpoint serves the figures of one adapter"),
    ("output.early_stopping", (None,), "the others would go on, and it could not be resumed"),
    ("forget.data", (None,), "what is forgotten is measured of one adapter"),
    ("output.remote", (None,), "copies elsewhere are those of one adapter"),
    ("adapter.modules_to_save", ([],), "a module that is trained whole acts on all tokens alike"),
    ("adapter.target_parameters", ([],), "a whole parameter acts on all tokens alike"),
)


def read(given: Given) -> tuple[Member, ...]:
    """The entries as the user wrote them.

    Raises:
        UsageError: one is no mapping of sections, or has a name or a key that cannot be.
    """
    value = parse_yaml(given.value, ADAPTERS)[0] if given.is_word else given.value
    if not isinstance(value, list) or not value:
        raise UsageError(f"{given.where}{ADAPTERS}: expected a list of adapters, got {show(value)}")
    members: list[Member] = []
    for number, entry in enumerate(value, 1):
        members.append(_member(entry, number, given.where))
        if members[-1].name in [other.name for other in members[:-1]]:
            raise UsageError(f"{given.where}{ADAPTERS}: the name {members[-1].name} is there twice")
    return tuple(members)


def _member(entry: Any, number: int, where: str) -> Member:
    which = f"{where}{ADAPTERS}: the entry {number}"
    if not isinstance(entry, dict):
        raise UsageError(f"{which} must be a mapping with a name, got {show(entry)}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
        raise UsageError(
            f"{which}: name: letters, digits, _ and - make a name, got {show(name)}"
            + (", which means the adapter without one" if name in _TAKEN else "")
        )
    return Member(name, dict(_values(entry, f"{where}{ADAPTERS}[{name}]: ")))


def _values(entry: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    for section, body in entry.items():
        if section == "name":
            continue
        if section not in OWN:
            if section in SECTIONS:
                raise UsageError(
                    f"{where}{section} is the same for all adapters; an entry has {', '.join(OWN)}"
                )
            raise unknown(str(section), OWN, where)
        if not isinstance(body, dict):
            raise UsageError(f"{where}{section} must be a mapping of options, got {show(body)}")
        for option, value in body.items():
            key = f"{section}.{option}"
            if key not in SCHEMA:
                raise unknown(key, [k for k in SCHEMA if k.partition(".")[0] in OWN], where)
            if key in COMMON:
                raise UsageError(f"{where}{key} is the same for all adapters; set it beside them")
            found = convert(SCHEMA[key], Given(value, where))
            if key == "data.chat_template" and (found or "").strip():
                try:
                    found = template_text(found)  # as of the common one: not a file's name
                except UsageError as error:
                    raise UsageError(f"{where}{error}") from None
            yield key, found


def config_of(config: Config, member: Member) -> Config:
    """The configuration of the run that would train this one alone."""
    values: dict[str, Any] = dict(member.values)
    user_set = config.user_set | values.keys() | {"output.dir"}
    for pair in _EITHER:  # the entry's own choice replaces the common one
        for one, other in (pair, pair[::-1]):
            if one in values and other not in values:
                values[other], user_set = SCHEMA[other].default, user_set - {other}
    values["output.dir"] = str(config.output.directory / ADAPTERS / member.name)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {name: replace(getattr(config, name), **own) for name, own in sections.items()}
    return replace(config, **changed, adapters=(), user_set=user_set)


def configs_of(config: Config) -> dict[str, Config]:
    """`config_of` every entry, by name."""
    return {member.name: config_of(config, member) for member in config.adapters}


def problems_together(config: Config) -> Iterator[str]:
    """What one of the entries, whose whole configuration this is, cannot have beside others."""
    for key, allowed, why in _LIMITS:
        if (value := value_of(config, key)) not in allowed:
            yield f"{key}: {plain(value)} trains one adapter at a time: {why}"
    if config.train.tokens_per_micro_batch == "auto":
        yield "train.tokens_per_micro_batch: auto fits one adapter at a time: set a number"
    for tracker in config.output.report_to:
        if tracker != "tensorboard":
            yield f"output.report_to: {tracker} follows one adapter at a time"
    objective = config.train.objective
    part = room("objectives").get(objective)
    if part is not None and part.says.get("task"):
        yield f"train.objective: {objective} trains one adapter at a time"
    init, method = config.adapter.init_lora_weights, config.adapter.method
    needs = room("lora.init")[init].says.get("needs")
    if needs == "gradient":
        yield f"adapter.init_lora_weights: {init} starts one adapter at a time"
    if needs == "weight" and config.model.quantization != "none":
        yield (
            f"adapter.init_lora_weights: {init} packs W0 as the residual of one adapter "
            f"(model.quantization: {config.model.quantization})"
        )
    if room("optim")[config.optimizer.name].says["divides"] == "pairs":
        yield f"optimizer.name: {config.optimizer.name} divides the state of one adapter"
    if room("lora.variants")[method].says.get("alone", False):
        yield f"adapter.method: {method} trains one adapter at a time"
