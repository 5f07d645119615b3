"""YAML and JSON text, read strictly: safe, and with an error for duplicate keys."""

from typing import Any

import yaml

from dlora.errors import UsageError


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


def line_of(node: yaml.Node) -> int:
    """The line in which a node begins, counted from 1."""
    return node.start_mark.line + 1


def parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """Parse YAML, which contains JSON.

    Args:
        source: what the text is, for errors.

    Returns:
        The value, and its node, which knows the lines; (None, None) for an empty text.

    Raises:
        UsageError: it is not valid, or has a key twice.
    """
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
                    f"{source}:{line_of(key)}: {dotted} is a duplicate key, "
                    f"set in line {first_lines[name]} already"
                )
            first_lines[name] = line_of(key)
            visit(value, (*path, name[1]))

    visit(root, ())
