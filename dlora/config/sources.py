"""Where options come from: a file and a command line, read strictly, and the help that lists them.

    --config FILE          ──read_file──>  {dotted key: Given}
    --section.key VALUE    ──scan_argv──>  {dotted key: word}

Every refusal is a `UsageError` in one line that names the file and the line, or the option.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from dlora.config.members import ADAPTERS
from dlora.config.options import Given, show, unknown
from dlora.config.strict_yaml import line_of, parse_yaml
from dlora.errors import UsageError
from dlora.registry import Option, plain

ADAPTERS_HELP = (
    "several adapters that are trained together, each as a run of its own would: a list of "
    "{name: ..., adapter: {...}, optimizer: {...}, train: {...}, data: {...}}"
)


def read_file(path: str | Path, schema: Mapping[str, Option]) -> dict[str, Given]:
    """The values in a YAML or JSON file of sections by dotted key, each with its file and line."""
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
        raise UsageError(
            f"{path}:{line_of(root)}: expected a mapping of sections, got {show(data)}"
        )
    return dict(_leaves(data, root, str(path), schema))


def _leaves(
    data: dict[Any, Any], root: yaml.Node, path: str, schema: Mapping[str, Option]
) -> Iterator[tuple[str, Given]]:
    """Yield the options of a constructed file, in whose nodes merge keys (`<<`) are flattened."""
    sections = {key.partition(".")[0] for key in schema}
    nodes = {key.value: (key, value) for key, value in root.value}
    for section, body in data.items():
        key_node, body_node = nodes.get(str(section), (root, root))
        where = f"{path}:{line_of(key_node)}: "
        if section in schema and "." in section:
            outer, _, inner = section.partition(".")
            raise UsageError(f"{where}write {section} as {inner}: indented under {outer}:")
        if section == ADAPTERS:
            yield ADAPTERS, Given(body, where)
            continue
        if section not in sections:
            raise unknown(str(section), [*schema, *sections], where)
        if not isinstance(body, dict):
            raise UsageError(f"{where}{section} must be a mapping of options, got {show(body)}")
        lines = {key.value: line_of(key) for key, _ in body_node.value}
        for name, value in body.items():
            key, where = f"{section}.{name}", f"{path}:{lines.get(str(name), line_of(body_node))}: "
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


def print_help(
    prog: str,
    schema: Mapping[str, Option],
    sections: Mapping[str, str],
    switches: Mapping[str, str],
) -> None:
    """Print the options that work, with type, default and meaning, below each section's meaning."""
    parser = argparse.ArgumentParser(prog, usage=f"{prog} --config FILE [--section.key VALUE ...]")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of options")
    for name, doc in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=doc)
    groups = {name: parser.add_argument_group(name, doc) for name, doc in sections.items()}
    for key, opt in schema.items():
        if opt.is_planned:
            continue
        default = "required" if opt.default is MISSING else f"default: {plain(opt.default)}"
        doc = f"{opt.help} (type: {opt.spelling}{opt.range and ', ' + opt.range}, {default})"
        group = groups.get(key.partition(".")[0], parser)
        group.add_argument(f"--{key}", metavar="VALUE", help=doc.replace("%", "%%"))
    parser.add_argument(f"--{ADAPTERS}", metavar="VALUE", help=ADAPTERS_HELP)
    parser.print_help()
