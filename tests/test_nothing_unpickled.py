"""No file of dlora unpickles, or runs what a file says: a law, read from the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("dlora", "launchers", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
# A part of a dotted name, an argument's name, or a module that is imported by its name.
UNPICKLING = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list", "read_pickle", "Unpickler", "allow_pickle",
}  # fmt: skip
# What runs or builds whatever a file says; `torch.load` even with weights_only.
EXECUTING = (
    "torch.load", "torch.jit.load", "torch.hub", "torch.package", "numpy.load", "np.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader", "eval()", "exec()", "compile()", "runpy",
)  # fmt: skip


def names(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, attribute `a.b`, call `a()`, and argument."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.lineno, f"{node.func.id}()"
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(source: str) -> list[str]:
    return sorted(
        f"{line}: {name}"
        for line, name in names(source)
        if UNPICKLING.intersection(name.split("."))
        or any(f"{name}.".startswith(f"{banned}.") for banned in EXECUTING)
    )


@pytest.mark.parametrize("file", FILES)
def test_a_file_unpickles_nothing(file: str) -> None:
    assert violations((ROOT / file).read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as json",
        "from torch import load",
        "x = torch.load('f', weights_only=True)",
        "m = __import__('cloudpickle')",
        "dist.broadcast_object_list([])",
        "x = other.load('f', allow_pickle=True)",
        "class L(yaml.FullLoader): pass",
        "x = eval('1')",
    ],
)
def test_a_planted_violation_is_found(source: str) -> None:
    assert violations(source)


def test_the_mode_of_a_model_is_no_violation() -> None:
    assert violations("eval = None\nmodel.eval()\nf(eval)\nre.compile('a')") == []
