"""The rooms of dlora, and what each may import: the table, and the checks that make it a law.

A room is a folder of `dlora/`; its purpose is the first sentence of its `__init__.py`. Imports are
read from the syntax tree, wherever in a file they stand.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dlora

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES_AT_THE_TOP = 10
IMPORT_SECONDS = 2.0  # of processor time, for the public names without torch's own

# room → what it may import of dlora, beside itself and `errors`
TABLE = {
    "registry": "",
    "quant": "registry",
    "lora": "quant registry",
    "sharding": "registry",
    "data": "io registry",
    "objectives": "lora registry",
    "tasks": "base data lora objectives registry",
    "optim": "lora sharding registry",
    "config": "registry",
    "runtime": "hooks",
    "io": "runtime.memory",
    "metrics": "io",
    "base": "io quant lora sharding runtime",
    "methods": "base lora metrics sharding io optim",
    "checkpoint": "sharding io config lora",
    "adapters": "checkpoint lora methods quant io config registry",
    "plan": "adapters base checkpoint config data io lora methods objectives optim registry "
    "runtime sharding tasks",
    "evaluation": "adapters base checkpoint cli config data io lora objectives registry runtime "
    "sharding.topology tasks",
    "training": "adapters base checkpoint config data evaluation hooks io lora methods metrics "
    "objectives optim plan quant registry report runtime sharding tasks",
    "together": "adapters base config data hooks lora methods metrics objectives optim plan "
    "registry report runtime sharding training",
    "export": "adapters base io lora metrics runtime cli",
    "library": "adapters base checkpoint cli data io lora metrics runtime tasks",
    "analysis": "adapters base cli io library lora methods metrics runtime",
    "report": "config io metrics runtime",
    "integrations": "api",  # and what `dlora` exports: see `PUBLIC`
    "launchers": "train config hooks",
}
# What a room that stands on public names takes from `dlora` itself.
PUBLIC = {"integrations"}
EXPORTED = {f"dlora.{name}" for name in dlora.__all__}
# A program that has a room's name, and is above it.
PROGRAMS = {"dlora/data/__main__.py": "training runtime"}
# room → the only packages that it may import beside dlora and the standard library
LIBRARIES = {
    "quant": "torch bitsandbytes triton",
    "lora": "torch triton",
    "sharding": "torch deepspeed",
    "config": "yaml fsspec",
    "registry": "",
}
# package → the only files that may import it
OWNERS = {
    "ray": "launchers/",
    "deepspeed": "dlora/sharding/engines/zero3.py",
    "lightning": "dlora/integrations/lightning.py",
    "trl": "dlora/integrations/trl.py",
    "bitsandbytes": "dlora/quant/dequantize.py dlora/optim/eight_bit.py",
    "lm_eval": "dlora/evaluation/harness.py",
    "triton": "dlora/quant/triton_unpack.py dlora/lora/triton_dropout.py",
}
# What may be imported inside a function: heavy packages, and those that only an extra installs.
HEAVY = {"transformers", "accelerate", "torch.utils.tensorboard", "matplotlib", "ray", "deepspeed"}
HEAVY |= {"launchers.ray_board", "launchers.ray_stop", "launchers.ray_worker"}  # they import ray
HEAVY |= {"torch.nn.attention.varlen", "torch._inductor.compile_fx"}
# Both import torch's compiler, which takes seconds
OPTIONAL = {
    "bitsandbytes",
    "zstandard",
    "compression",
    "pathspec",
    "s3fs",
    "huggingface_hub",
    "aiohttp",
    "prometheus_client",
    "cma",
    "sacrebleu",
    "rouge_score",
    "dlora.evaluation.harness",  # it imports lm_eval
    "dlora.quant.triton_unpack",  # they import Triton
    "dlora.lora.triton_dropout",
}


@dataclass(frozen=True)
class Import:
    """`import name`, or `from … import name` as its full dotted name."""

    line: int
    name: str
    in_function: bool

    def of(self, *packages: str) -> bool:
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a file; an import by name (`import_module("x")`) counts as well."""
    tree = ast.parse(source)
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.split("/")[:-1][: -(node.level - 1) or None] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            by_name = ast.unparse(node.func).endswith(("import_module", "__import__"))
            names = [str(node.args[0].value)] if by_name else []
        yield from (Import(node.lineno, name, id(node) in inside) for name in names)


def room_of(file: str) -> str:
    """`dlora/lora/attach.py` → `lora`; of a file at the top, its own name."""
    parts = file.removesuffix(".py").split("/")
    return parts[0] if parts[0] == "launchers" else parts[1]


def violations(source: str, file: str) -> list[str]:
    """What `source` imports that its place forbids, as `file:line name: reason`."""
    room, found = room_of(file), []
    for use in imports(source, file):
        package = use.name.split(".")[0]
        below = PROGRAMS.get(file, TABLE.get(room, ""))
        allowed = [f"dlora.{name}" for name in ("errors", room, *below.split())]
        allowed += EXPORTED if room in PUBLIC else ()
        if room in TABLE and use.of("dlora") and not use.of(*allowed):
            found.append((use, f"{room}/ may import {TABLE[room] or 'nothing'}"))
        if room != "launchers" and use.of("launchers", "dlora.launchers"):
            found.append((use, "nobody imports launchers/"))
        libraries = LIBRARIES.get(room, package).split()
        if package not in ("dlora", "__future__", *libraries, *sys.stdlib_module_names):
            found.append((use, f"{room}/ stands on {LIBRARIES[room]} alone"))
        if package in OWNERS and not file.startswith(tuple(OWNERS[package].split())):
            found.append((use, f"{package} stays in {OWNERS[package]}"))
        if room != "integrations" and use.of("dlora.integrations"):
            found.append((use, "nobody imports integrations/"))
        if room in ("lora", "quant") and use.of("torch.distributed"):
            found.append((use, "mathematics knows no process groups"))
        if use.in_function and not use.of(*HEAVY, *OPTIONAL):
            found.append((use, "imports stand at the top of a file"))
    return [f"{file}:{use.line} {use.name}: {reason}" for use, reason in found]


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("dlora", "launchers")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_what_its_room_may(file: str) -> None:
    assert violations((ROOT / file).read_text("utf-8"), file) == []


def test_every_room_has_its_row_and_its_sentence() -> None:
    folders = {path.parent for path in (ROOT / "dlora").glob("*/__init__.py")}
    assert {folder.name for folder in folders} | {"launchers"} == set(TABLE)
    for folder in sorted(folders):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
        assert text.split("\n\n")[0].endswith("."), f"{folder.name}/ has no sentence"


def test_few_files_lie_beside_the_rooms() -> None:
    assert len(list((ROOT / "dlora").glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {*TABLE, "k8s", "gpu", "models"}


def test_no_import_leads_back() -> None:
    """No circle of files, however it is hidden."""
    modules = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in FILES}
    edges = {}
    for module, file in modules.items():
        names = [use.name for use in imports((ROOT / file).read_text("utf-8"), file)]
        edges[module] = {
            name if name in modules else name.rpartition(".")[0] for name in names
        } & modules.keys() - {module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_using_dlora_loads_torch_and_nothing_larger() -> None:
    """Importing it loads not even that. And a command loads transformers, and torch's compiler,
    once it needs a model: before, it has said what is wrong, or answered `--help`."""
    program = (
        "import sys, time, dlora; print(*sys.modules); import torch; began = time.process_time(); "
        "[getattr(dlora, name) for name in dlora.__all__]; "
        "print(time.process_time() - began, *sys.modules); from importlib import import_module; "
        "from dlora.__main__ import COMMANDS, MODULES; "
        "[import_module(MODULES.get(name, f'dlora.{name}')) for name in COMMANDS]; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    at_first, imported, by_commands = done.stdout.splitlines()
    assert not {"torch", "numpy", "yaml"} & set(at_first.split())
    assert not {"transformers.modeling_utils", "torch._dynamo"} & set(by_commands.split())
    seconds, *modules = imported.split()
    loaded = {name.partition(".")[0] for name in modules}
    assert {"dlora", "torch"} <= loaded
    assert not loaded & {"deepspeed", "ray", "transformers", "peft", "bitsandbytes", "triton"}
    assert "matplotlib" not in loaded
    assert float(seconds) < IMPORT_SECONDS


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dlora/lora/x.py", "import torch.distributed as dist"),
        ("dlora/lora/x.py", "from ..sharding import topology"),
        ("dlora/sharding/x.py", "from dlora.lora.attach import attach"),
        ("dlora/sharding/x.py", "m = __import__('transformers')"),
        ("dlora/quant/nf4.py", "import bitsandbytes"),
        ("dlora/quant/nf4.py", "import triton"),
        ("dlora/train.py", "importlib.import_module('ray.train')"),
        ("dlora/train.py", "from dlora.launchers import argv"),
        ("dlora/train.py", "def f():\n    from dlora.data import Dataset"),
        ("launchers/ray_train.py", "from dlora.sharding.topology import Topology"),
        ("dlora/integrations/x.py", "from dlora.sharding.topology import Topology"),
        ("dlora/training/x.py", "from dlora.integrations import adapter"),
        ("dlora/integrations/loop.py", "import lightning"),
    ],
)
def test_a_planted_violation_is_found(file: str, source: str) -> None:
    assert violations(source, file)
