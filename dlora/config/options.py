"""How options are declared, converted and refused. This half knows no option by its name.

    option(), required()   declare a field of a dataclass   ──schema_of──>  {dotted key: Option}
    what was read          {dotted key: Given}              ──convert────>  {dotted key: value}

jsonargparse knows what a type accepts. It is given one option at a time, so that every refusal is a
`UsageError` in one line that names the key, the value and what was expected, in place of its own
report of several lines.
"""

import copy
import dataclasses
import difflib
import math
import operator
import reprlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from dlora.config.strict_yaml import parse_yaml
from dlora.errors import UsageError

T = TypeVar("T")

_COMPARISONS = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


@dataclass(frozen=True)
class Option:
    """One option: everything that `--help`, the type check and the range check need to know."""

    key: str
    type: Any
    default: Any  # MISSING where the user has to choose
    doc: str
    bounds: Mapping[str, float]  # {"ge": 1}, for a number or for each value of a dict

    @property
    def spelling(self) -> str:
        """The type in words: "one of lora, adalora, flora", "int or null"."""
        return " or ".join(map(_spell_type, _members(self.type)))

    @property
    def range(self) -> str:
        """The bounds in words: ">= 0 and < 1", or nothing."""
        return " and ".join(f"{_COMPARISONS[k][0]} {bound}" for k, bound in self.bounds.items())

    def problems(self, value: Any) -> Iterator[str]:
        """What is wrong with a value of the right type: a number out of range, or nothing in it."""
        if value == [] and self.default != []:
            yield f"{self.key}: is empty"
        parts = value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, dict | list) else [value]:
            if isinstance(part, str) and not part.strip():
                yield f"{self.key}: is empty"
            elif isinstance(part, float) and not math.isfinite(part):
                yield f"{self.key}: must be a finite number, got {part}"
            elif isinstance(part, int | float) and not all(
                _COMPARISONS[k][1](part, bound) for k, bound in self.bounds.items()
            ):
                yield f"{self.key}: must be {self.range}, got {part}"


class Given(NamedTuple):
    """A value as the user wrote it. `where` starts a message about it: "run.yaml:7: ", or ""."""

    value: Any
    where: str = ""
    is_word: bool = False  # a word of the command line: a string whatever the type


# Declaring options ------------------------------------------------------------------------------


def option(default: T, doc: str, **bounds: float) -> T:
    """A dataclass field with a default, its meaning for `--help`, and bounds (ge, gt, le, lt)."""
    assert bounds.keys() <= _COMPARISONS.keys(), bounds
    metadata = {"doc": doc, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(doc: str) -> Any:
    """A dataclass field that the user has to set."""
    return field(metadata={"doc": doc, "bounds": {}})


def schema_of(section: type, spell: Callable[[str], str]) -> dict[str, Option]:
    """The options that a dataclass declares, by the key that `spell` makes of a field's name."""
    hints = get_type_hints(section)
    schema = {}
    for f in dataclasses.fields(section):
        key, default = spell(f.name), f.default
        if f.default_factory is not MISSING:
            default = f.default_factory()
        schema[key] = Option(key, hints[f.name], default, **f.metadata)
    return schema


# Reading ----------------------------------------------------------------------------------------


def convert(opt: Option, given: Given) -> Any:
    """The value of the option's type that the user meant."""
    from jsonargparse import ArgumentError, ArgumentParser

    value, members = given.value, _members(opt.type)
    if given.is_word and get_origin(opt.type) is dict:
        given = Given(parse_yaml(value, opt.key)[0])  # ours refuses a duplicate key
    elif not given.is_word and isinstance(value, str) and str in members:
        return value  # quoted in the file: "null" stays a string
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--value", type=opt.type)
    try:
        if given.is_word:
            value = parser.parse_args([f"--value={value}"]).value
        else:
            value = parser.parse_object({"value": given.value}).value
    except (ArgumentError, RecursionError):
        raise _mistyped(opt, given) from None
    # jsonargparse reads null as "not given" whatever the type, and 1 as equal to the choice true.
    is_null = value is None and type(None) not in members
    if is_null or (
        isinstance(value, int) and get_origin(opt.type) is Literal and value is not True
    ):
        raise _mistyped(opt, given)
    return value


def _mistyped(opt: Option, given: Given) -> UsageError:
    return UsageError(f"{given.where}{opt.key}: expected {opt.spelling}, got {show(given.value)}")


def _members(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)


def _spell_type(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(map(plain, get_args(type_)))
    if get_origin(type_) is not None:
        return str(type_)
    names = {bool: "true or false", type(None): "null"}
    return names[type_] if type_ in names else str(type_.__name__)


def show(value: object) -> str:
    """`value` for a message: quoted if a string, else as YAML spells it, and never long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def plain(value: object) -> str:
    """`value` as one would type it."""
    return value if isinstance(value, str) else show(value)


# Help -------------------------------------------------------------------------------------------


def unknown(key: str, names: Collection[str], where: str = "", prefix: str = "") -> UsageError:
    """The refusal of a key that is none of `names`, with the key that was probably meant."""
    section, _, name = key.rpartition(".")
    guesses = [n for n in names if n.rpartition(".")[2] == name or key.startswith(n + ".")]
    siblings = [n for n in names if n.startswith(section + ".")]
    children = [n for n in names if n.startswith(key + ".")]
    if not guesses and not children:
        scores = {n: _likeness(name, n.rpartition(".")[2]) for n in siblings or names}
        best = max(scores, key=lambda n: scores[n])
        guesses = [best] if scores[best][0] >= 0.6 else []
    if guesses:
        hint = f"did you mean {' or '.join(prefix + guess for guess in guesses)}?"
    elif children or siblings:
        hint = "there are " + ", ".join(prefix + n for n in children or siblings)
    else:
        hint = "--help lists them all"
    return UsageError(f"{where}{prefix}{key} is not an option ({hint})")


def _likeness(word: str, name: str) -> tuple[float, float]:
    """How near `word` is to `name`, or to a part of it: `alpha` and `rnak` stand for parts."""
    whole, *parts = (
        difflib.SequenceMatcher(None, word, part).ratio() for part in (name, *name.split("_"))
    )
    return max(whole, 0.9 * max(parts)), whole
