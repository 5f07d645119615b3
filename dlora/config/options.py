"""From what the user wrote to a value of the option's type, or one line that says what is wrong.

word of the command line  ──YAML──>  value  ──the members of the type, one by one──>  value
value in a file           ───────────────>  ────────────────────────────────────────>
"""

import difflib
import reprlib
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args, get_origin

from dlora.config.strict_yaml import parse_yaml
from dlora.errors import UsageError
from dlora.registry import Option, plain
from dlora.registry.options import members


class Given(NamedTuple):
    """A value as the user wrote it. `where` starts a message about it: "run.yaml:7: ", or ""."""

    value: Any
    where: str = ""
    is_word: bool = False  # a word of the command line: a string whatever the type


class _UnfitError(ValueError):
    """A value is not of a type."""


def convert(opt: Option, given: Given) -> Any:
    """The value of the option's type that the user meant.

    Raises:
        UsageError: it is of no member of the type.
    """
    value = _parsed(opt, given.value) if given.is_word else given.value
    for member in members(opt.accepted):
        if member is not str:
            try:
                return _fitted(member, value, given)
            except _UnfitError:
                continue
    if str in members(opt.accepted):  # last: any word is one
        text = given.value
        if isinstance(text, str):
            return text
    raise UsageError(f"{given.where}{opt.key}: expected {opt.spelling}, got {show(given.value)}")


def _parsed(opt: Option, word: str) -> Any:
    """A word as YAML reads it; unchanged if YAML cannot, as `[qv]_proj$`."""
    try:
        return parse_yaml(word, opt.key)[0]
    except UsageError:
        kinds = members(opt.accepted)
        is_mapping = any(get_origin(kind) is dict for kind in kinds)
        if is_mapping and (str not in kinds or word.lstrip().startswith("{")):
            raise  # of a duplicate key
        return word


def _fitted(type_: Any, value: Any, given: Given | None = None) -> Any:
    """`value` as a value of `type_`, which is no union.

    Numbers may be strings: YAML reads 2e-4 as one.
    """
    if get_origin(type_) is Literal:
        for choice in get_args(type_):
            if choice == value and type(choice) is type(value):
                return choice
            if given is not None and given.is_word and plain(choice) == given.value:
                return choice
    elif get_origin(type_) is dict and isinstance(value, dict):
        kinds = members(get_args(type_)[1])
        return {name: _first(kinds, item) for name, item in value.items()}
    elif get_origin(type_) is list and isinstance(value, list):
        kinds = members(get_args(type_)[0])
        return [_first(kinds, item) for item in value]
    elif (
        type_ is type(None)
        and value is None
        and (given is None or given.value is None or given.value.strip())
    ):
        return None
    elif type_ is bool and isinstance(value, bool) or type_ is str and isinstance(value, str):
        return value
    elif type_ in (int, float) and isinstance(value, (int, str, type_)):
        try:
            if not isinstance(value, bool):
                return type_(value)
        except (ValueError, OverflowError):
            pass
    raise _UnfitError


def _first(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return _fitted(kind, value)
        except _UnfitError:
            continue
    raise _UnfitError


def show(value: object) -> str:
    """`value` for a message: quoted if a string, else as YAML spells it, and never long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def unknown(key: str, names: Collection[str], where: str = "", prefix: str = "") -> UsageError:
    """The error for a `key` that is not in `names`, with the keys that may have been meant."""
    section, _, name = key.rpartition(".")
    guesses = [n for n in names if n.rpartition(".")[2] == name or key.startswith(n + ".")]
    siblings = [n for n in names if n.startswith(section + ".")]
    children = [n for n in names if n.startswith(key + ".")]
    if not guesses and not children:
        scores = {n: _likeness(name, n.rpartition(".")[2]) for n in siblings or names}
        dots = key.count(".")  # of two as near, a section for a section
        best = max(scores, key=lambda n: (scores[n], n.count(".") == dots))
        guesses = [best] if scores[best][0] >= 0.6 else []
    if guesses:
        hint = f"did you mean {' or '.join(prefix + guess for guess in guesses)}?"
    elif children or siblings:
        hint = "options: " + ", ".join(prefix + n for n in children or siblings)
    else:
        hint = "--help lists them all"
    return UsageError(f"{where}{prefix}{key} is not an option ({hint})")


def _likeness(word: str, name: str) -> tuple[float, float]:
    """How near `word` is to `name`, or to a part of it: `alpha` and `rnak` stand for parts."""
    whole, *parts = (
        difflib.SequenceMatcher(None, word, part).ratio() for part in (name, *name.split("_"))
    )
    return max(whole, 0.9 * max(parts)), whole
