"""Options: how one is declared as a field of a dataclass, and the check of its values."""

import copy
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


@dataclass(frozen=True)
class Option:
    """One option: everything that `--help`, the type check and the range check need to know.

    Attributes:
        default: MISSING where the user has to choose.
        bounds: {"ge": 1}, for a number or for each value of a dict.
        later: choices that are planned and do not work yet.
        when: {option of the same section: value} beside which alone this one acts.
        room, owners: the parts that declare it, where it belongs to parts.
    """

    key: str
    type: Any
    default: Any
    doc: str
    bounds: Mapping[str, float]
    later: tuple[Any, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
    room: str = ""
    owners: tuple[str | bool, ...] = ()

    @property
    def accepted(self) -> Any:
        """The type, with the choices that come later."""
        if get_origin(self.type) is Literal:
            return Literal[(*get_args(self.type), *self.later)]
        return self.type

    @property
    def is_planned(self) -> bool:
        """Whether it is a switch that cannot be turned on yet, which no page and no help lists."""
        return get_args(self.type) == (False,)

    @property
    def spelling(self) -> str:
        """The type in words: "one of lora, adalora, flora", "int or null"."""
        return " or ".join(map(_spell_type, members(self.type)))

    @property
    def range(self) -> str:
        """The bounds in words: ">= 0 and < 1", or nothing."""
        return " and ".join(f"{_COMPARISONS[k][0]} {bound}" for k, bound in self.bounds.items())

    @property
    def help(self) -> str:
        """Whose it is, and what it means."""
        return f"{', '.join(map(plain, self.owners))}: {self.doc}" if self.owners else self.doc

    def problems(self, value: Any) -> Iterator[str]:
        """What is wrong with a value of the right type: a number out of range, or nothing in it."""
        if value == [] and self.default != []:
            yield f"{self.key}: is empty"
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        if isinstance(value, list):
            parts = [(None, part) for part in value]
        for name, part in parts:
            key = self.key if name is None else f"{self.key}[{name!r}]"
            if isinstance(part, str) and not part.strip():
                yield f"{key}: is empty"
            elif isinstance(part, float) and not math.isfinite(part):
                yield f"{key}: must be a finite number, got {part}"
            elif isinstance(part, int | float) and not all(
                _COMPARISONS[k][1](part, bound) for k, bound in self.bounds.items()
            ):
                yield f"{key}: must be {self.range}, got {part}"


def option(
    default: T,
    doc: str,
    *,
    room: str = "",
    later: tuple[Any, ...] = (),
    when: Mapping[str, Any] | None = None,
    **bounds: float,
) -> T:
    """A dataclass field with a default and its meaning for `--help`.

    Args:
        room: the choices are the names of this room's parts.
        later, when: see `Option`.
        bounds: ge, gt, le, lt.
    """
    assert bounds.keys() <= _COMPARISONS.keys(), bounds
    metadata = {"doc": doc, "bounds": bounds, "later": later, "when": when or {}, "choices": room}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(doc: str) -> Any:
    """A dataclass field that the user has to set."""
    return field(metadata={"doc": doc, "bounds": {}})


def members(type_: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, itself."""
    return get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)


def is_of(value: Any, type_: Any) -> bool:
    """Whether a value that a program gives is of a type: an int is a float, and no bool is an int.

    A tuple counts as a list.
    """
    origin = get_origin(type_)
    if origin is Literal:
        return any(value == c and type(value) is type(c) for c in get_args(type_))
    if origin is dict:
        return isinstance(value, Mapping) and all(
            any(is_of(v, m) for m in members(get_args(type_)[1])) for v in value.values()
        )
    if origin is list:
        return isinstance(value, list | tuple) and all(
            any(is_of(v, m) for m in members(get_args(type_)[0])) for v in value
        )
    if type_ in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if type_ is float else isinstance(value, type_)


def _spell_type(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(map(plain, get_args(type_)))
    if get_origin(type_) in (dict, list):
        inner = " or ".join(map(_spell_type, members(get_args(type_)[-1]))).removeprefix("one of ")
        return (
            f"a mapping of names to {inner}" if get_origin(type_) is dict else f"a list of {inner}"
        )
    names = {bool: "true or false", type(None): "null"}
    return names[type_] if type_ in names else str(type_.__name__)


def plain(value: object) -> str:
    """`value` as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
