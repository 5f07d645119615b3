"""The configuration: every option of dlora once, with type, default, meaning and range.

`sections.py` has one frozen dataclass per section of the YAML file. `parse` reads a command line
and its file, `load` a file; what they return has passed `validate` of `validate.py`. How options
are declared is in `dlora.registry`; how they are read, in `sources.py` (where a value is found),
`options.py` (what it means) and `strict_yaml.py`. Nothing here loads torch.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dlora.config.adapters import COMMON, OWN, configs_of, problems_together, read
from dlora.config.chat_template import template_text
from dlora.config.members import ADAPTERS, Member
from dlora.config.options import Given, convert
from dlora.config.sections import (
    SCHEMA,
    SECTIONS,
    AdapterConfig,
    Config,
    DataConfig,
    ForgetConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ShardingConfig,
    TrainConfig,
    is_set,
    spelled,
    value_of,
)
from dlora.config.sources import print_help, read_file, scan_argv
from dlora.config.validate import CANNOT_ACT, parts_of, problems_of, validate
from dlora.errors import UsageError
from dlora.registry import Option, option, options_of

__all__ = [
    "SCHEMA",
    "SECTIONS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "ForgetConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Options",
    "OutputConfig",
    "ShardingConfig",
    "TrainConfig",
    "UsageError",
    "dump_yaml",
    "is_set",
    "load",
    "option",
    "parse",
    "parts_of",
    "to_dict",
    "validate",
    "value_of",
]


@dataclass(frozen=True)
class Options:
    """A parsed command line."""

    config: Config
    check: bool = False
    extra: Any = None  # an instance of the `extra` that `parse` was given


SWITCHES = {
    "check": "validate configuration, data and plan, print the budget, train nothing",
    "print_config": "print the resolved configuration and exit",
}

TEMPLATE = "data.chat_template"

# Reading and writing -----------------------------------------------------------------------------


def parse(argv: Sequence[str], prog: str, extra: type | None = None) -> Options:
    """Parse a command line; `--help` and `--print_config` print and exit with status 0.

    Args:
        prog: the program's name in `--help`.
        extra: a dataclass of further options of one command, all with defaults, declared by
            `option`: its field `gpus_per_node` is `--gpus-per-node`, and its instance is
            `Options.extra`. A field of type bool is a switch, which takes no value.

    Raises:
        UsageError: the command line, the file or a value is wrong.
    """
    declared = options_of(extra, lambda name: name.replace("_", "-")) if extra else {}
    extras = {name: replace(opt, key=f"--{name}") for name, opt in declared.items()}
    flags = {key: opt.doc for key, opt in extras.items() if opt.type is bool}
    valued = {key: opt for key, opt in {**extras, **SCHEMA}.items() if key not in flags}
    if {"-h", "--help"} & set(argv):
        docs = {name: cls.__doc__ or "" for name, cls in SECTIONS.items()}
        print_help(prog, valued, docs, {**SWITCHES, **flags})
        raise SystemExit(0)
    words = scan_argv(list(argv), ["config", ADAPTERS, *valued], {**SWITCHES, **flags})
    words |= dict.fromkeys(flags.keys() & words.keys(), "true")
    given = read_file(words["config"], SCHEMA) if "config" in words else {}
    known = (*SCHEMA, ADAPTERS)
    given |= {key: Given(word, is_word=True) for key, word in words.items() if key in known}
    members = read(given.pop(ADAPTERS)) if ADAPTERS in given else ()
    values = {key: convert(SCHEMA[key], value) for key, value in given.items()}
    if (
        values.get(TEMPLATE) or ""
    ).strip():  # the run and its checkpoints carry the text, not a file's name
        values[TEMPLATE] = template_text(values[TEMPLATE])
    config = _build(values, members)
    validate_all(config)
    if "print_config" in words:
        print(dump_yaml(config), end="")
        raise SystemExit(0)
    return Options(config, "check" in words, _build_extra(extra, extras, words))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration from a file, with `overrides` as on the command line; see `parse`."""
    return parse(["--config", str(path), *overrides], prog="dlora").config


def _build(values: dict[str, Any], members: tuple[Member, ...] = ()) -> Config:
    user_set = frozenset(values)
    for key in set.intersection(*({*member.values} for member in members)) if members else ():
        values.setdefault(key, members[0].values[key])  # nobody needs another one
    missing = [key for key, opt in SCHEMA.items() if opt.default is MISSING and key not in values]
    if missing:
        raise UsageError(f"required but not set: {', '.join(missing)}")
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name if spelled(f"{name}_") != name else f"{name}_"] = value
    built = {name: SECTIONS[name](**options) for name, options in sections.items()}
    return Config(**built, adapters=members, user_set=user_set)


def validate_all(config: Config) -> None:
    """`validate` of the configuration, or of each of the adapters that it trains together.

    What is wrong for all of them alike is said once.
    """
    if not config.adapters:
        validate(config)
        return
    found: dict[str, list[str]] = {}  # an option that all share may act for some of them
    for name, own in configs_of(config).items():
        for problem in (*problems_of(own), *problems_together(own)):
            found.setdefault(problem, []).append(name)
    lines = []
    for problem, names in found.items():
        if len(names) == len(config.adapters):
            lines.append(problem)
        elif problem.partition(".")[0] in OWN or CANNOT_ACT not in problem:
            lines.append(f"{ADAPTERS}[{', '.join(names)}]: {problem}")
    if lines:
        raise UsageError("; ".join(lines))


def _build_extra(extra: type | None, schema: dict[str, Option], words: dict[str, str]) -> Any:
    chosen = {}
    for key in schema.keys() & words.keys():
        value = convert(schema[key], Given(words[key], is_word=True))
        for problem in schema[key].problems(value):
            raise UsageError(problem)
        chosen[key.replace("-", "_")] = value
    return extra(**chosen) if extra else None


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """All sections as plain values, in the order of the contract."""
    return {
        name: {spelled(field): value for field, value in asdict(getattr(config, name)).items()}
        for name in SECTIONS
    }


def dump_yaml(config: Config) -> str:
    """The resolved configuration, which loads back to an equal one.

    That is why it leaves out options whose mere presence would contradict another one. Of several
    adapters each entry has all that may differ from the others'.
    """
    sections: dict[str, Any] = _sections_of(config)
    if config.adapters:
        entries = {n: _sections_of(own) for n, own in configs_of(config).items()}
        sections[ADAPTERS] = [
            {"name": name} | {section: _apart(own, section)[1] for section in OWN}
            for name, own in entries.items()
        ]
        sections |= {section: _apart(sections, section)[0] for section in OWN}
        sections = {name: body for name, body in sections.items() if body}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=2**20)


def _sections_of(config: Config) -> dict[str, dict[str, Any]]:
    """What `dump_yaml` writes of a configuration's sections."""
    sections = to_dict(config)
    if config.train.governed_by == "epochs":
        del sections["train"]["max_steps"]
    if config.train.tokens_per_micro_batch is not None:
        del sections["train"]["micro_batch_size"]
    for key, part in parts_of(config):
        for name in part.says.get("instead", ()):
            del sections[key.partition(".")[0]][name]
    return sections


def _apart(sections: dict[str, dict[str, Any]], section: str) -> tuple[dict[str, Any], ...]:
    """The options of a section that several adapters have in common, and those of each."""
    common: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in sections[section].items():
        common[f"{section}.{name}" not in COMMON][name] = value
    return common
