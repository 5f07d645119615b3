"""How options are declared, read and refused. This half knows no option by its name.

    option(), required()   declare a field of a dataclass   ──schema_of──>  {dotted key: Option}
    --config FILE          ──read_file──>  {dotted key: Given}  ┐
    --section.key VALUE    ──scan_argv──>  {dotted key: word}   ┴──convert──>  {dotted key: value}

jsonargparse knows what a type accepts. It is given one option at a time, so that every refusal is a
`UsageError` in one line that names the key, the value and what was expected, or the file and the
line, in place of its own report of several lines.
"""

import argparse
import copy
import dataclasses
import difflib
import math
import operator
import reprlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `output.dir: 2026-01-31` is a string, not a date."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_scalar(self, node: Any) -> Any:
        """JSON escapes a character beyond 16 bits as two surrogates, which PyYAML leaves apart."""
        text = super().construct_scalar(node)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The value of `text` (YAML, which contains JSON) and its node, which knows the lines."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_duplicates(node, source)
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"{source}:{line}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{source}:{line}: not valid YAML: {error.reason}") from None
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # such as `!!int x`, or 1000 open brackets
        raise UsageError(f"{source}: not valid YAML: {error}") from None


def _refuse_duplicates(root: yaml.Node, source: str) -> None:
    """Raise on the second of two equal keys, of which PyYAML would silently keep the last."""
    visited: set[int] = set()  # an alias may point at a node that contains it

    def visit(node: yaml.Node, path: tuple[str, ...]) -> None:
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            return
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item, path)
            return
        first_lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name = (key.tag, str(key.value))
            dotted = ".".join((*path, name[1]))
            if name in first_lines:
                raise UsageError(
                    f"{source}:{_line(key)}: {dotted} is a duplicate key, "
                    f"set in line {first_lines[name]} already"
                )
            first_lines[name] = _line(key)
            visit(value, (*path, name[1]))

    visit(root, ())


def read_file(path: str | Path, schema: Mapping[str, Option]) -> dict[str, Given]:
    """The values in a YAML or JSON file of sections, each with its file and line."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from None
    if Path(path).suffix == ".json":
        text = text.replace("\t", " ")  # JSON may be indented by tabs, YAML may not
    data, root = parse_yaml(text, str(path))
    if root is None or data is None:
        raise UsageError(f"{path}: is empty")
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:{_line(root)}: expected a mapping of sections, got {show(data)}")
    return dict(_leaves(data, root, str(path), schema))


def _leaves(
    data: dict[Any, Any], root: yaml.Node, path: str, schema: Mapping[str, Option]
) -> Iterator[tuple[str, Given]]:
    """Yield the options of a constructed file, whose nodes hold merge keys (`<<`) flattened."""
    sections = {key.partition(".")[0] for key in schema}
    nodes = {key.value: (key, value) for key, value in root.value}
    for section, body in data.items():
        key_node, body_node = nodes.get(str(section), (root, root))
        where = f"{path}:{_line(key_node)}: "
        if section in schema and "." in section:
            outer, _, inner = section.partition(".")
            raise UsageError(f"{where}write {section} as {inner}: indented under {outer}:")
        if section not in sections:
            raise unknown(str(section), [*schema, *sections], where)
        if not isinstance(body, dict):
            raise UsageError(f"{where}{section} must be a mapping of options, got {show(body)}")
        lines = {key.value: _line(key) for key, _ in body_node.value}
        for name, value in body.items():
            key, where = f"{section}.{name}", f"{path}:{lines.get(str(name), _line(body_node))}: "
            if key not in schema:
                raise unknown(key, schema, where)
            yield key, Given(value, where)


def scan_argv(
    argv: list[str], valued: Collection[str], switches: Collection[str]
) -> dict[str, str]:
    """The words of a command line by option name: `--name VALUE`, `--name=VALUE` or `--switch`.

    Names count only in full, once, and a value that starts with `--` needs the spelling with `=`.
    """
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise UsageError(f"{word}: unexpected argument (options are --section.key VALUE)")
        name, equals, value = word[2:].partition("=")
        if name in switches:
            if equals:
                raise UsageError(f"--{name} takes no value, got {show(value)}")
        elif name not in valued:
            raise unknown(name, [*valued, *switches], prefix="--")
        elif not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UsageError(f"--{name} needs a value")
        if name in given:
            raise UsageError(f"--{name} is given twice")
        given[name] = value
    return given


# Types ------------------------------------------------------------------------------------------


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


def print_help(
    prog: str,
    schema: Mapping[str, Option],
    sections: Mapping[str, str],
    switches: Mapping[str, str],
) -> None:
    """Print every option with type, default and meaning, under its section's one-line meaning."""
    parser = argparse.ArgumentParser(prog, usage=f"{prog} --config FILE [--section.key VALUE ...]")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of options")
    for name, doc in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=doc)
    groups = {name: parser.add_argument_group(name, doc) for name, doc in sections.items()}
    for key, opt in schema.items():
        default = "required" if opt.default is MISSING else f"default: {plain(opt.default)}"
        doc = f"{opt.doc} (type: {opt.spelling}{opt.range and ', ' + opt.range}, {default})"
        group = groups.get(key.partition(".")[0], parser)
        group.add_argument(f"--{key}", metavar="VALUE", help=doc.replace("%", "%%"))
    parser.print_help()
