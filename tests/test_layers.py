"""The layering of dlora as a law: who may import whom, read from the syntax tree.

Mathematics (quant/ below lora/) knows torch alone; distribution (sharding/) knows no mathematics;
what joins the two knows both; nothing in dlora knows Ray. Nothing is unpickled anywhere.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("dlora", "launchers", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
SIDES = ("optim", "data", "objectives", "checkpoint", "metrics")
CONCRETE = ("sharding.fsdp2", "sharding.zero3", "sharding.replicated", "lora.variants")
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


@dataclass(frozen=True)
class Use:
    """A dotted name that a file imports, reaches as `a.b.c`, calls as `a()`, names in a string, or
    gives an argument by."""

    line: int
    name: str
    is_import: bool

    def of(self, *packages: str) -> bool:
        return any(self.name == p or self.name.startswith(f"{p}.") for p in packages)


def uses(source: str, file: str) -> Iterator[Use]:
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Use(node.lineno, alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (Use(node.lineno, f"{module}.{alias.name}", True) for alias in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            yield Use(node.lineno, ast.unparse(node), False)
        elif isinstance(node, ast.keyword) and node.arg:
            yield Use(node.value.lineno, node.arg, False)
        elif isinstance(node, ast.Call) and node.args:
            if isinstance(node.func, ast.Name):
                yield Use(node.lineno, f"{node.func.id}()", False)
            name, argument = ast.unparse(node.func).rpartition(".")[2], node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield Use(node.lineno, str(argument.value), True)


@dataclass(frozen=True)
class Rule:
    """In files whose path starts with one of `where`, no use may be `forbidden`."""

    where: tuple[str, ...]
    forbidden: Callable[[Use, str], bool]
    reason: str


def unpickles(use: Use, file: str) -> bool:
    parts = use.name.split(".")
    return bool(UNPICKLING.intersection(parts)) or use.of(*EXECUTING)


def outside(*allowed: str) -> Callable[[Use, str], bool]:
    """An import from dlora that is not in one of `allowed`."""
    names = tuple(f"dlora.{name}" for name in allowed)
    return lambda use, file: use.is_import and use.of("dlora") and not use.of(*names)


def another_side_s_inside(use: Use, file: str) -> bool:
    """`dlora.data.NO_TARGET` is public; `dlora.data.collate` is a module and so an inside."""
    others = [f"dlora.{side}" for side in SIDES if side != side_of(file)]
    module = ROOT.joinpath(*use.name.split(".")[:3])
    is_inside = use.name.count(".") > 2 or module.with_suffix(".py").exists()
    return use.is_import and use.of(*others) and is_inside


def above_a_side(use: Use, file: str) -> bool:
    return outside("errors", "files", "lora", "sharding", *SIDES)(use, file)


def is_the_kernel_of(use: Use, file: str) -> bool:
    return file == "dlora/quant/dequantize.py" and use.of("bitsandbytes")


def side_of(file: str) -> str:
    return file.split("/")[1].removesuffix(".py")


LORA, QUANT, SHARDING = ("dlora/lora/",), ("dlora/quant/",), ("dlora/sharding/",)
SIDE_FILES = tuple(f"dlora/{side}{end}" for side in SIDES for end in ("/", ".py"))
TORCH_ALONE = ("dlora", "torch", *sys.stdlib_module_names)
RULES = (
    Rule(("",), unpickles, "nothing is unpickled"),
    Rule(("dlora/",), lambda u, f: u.is_import and u.of("ray"), "dlora does not know Ray"),
    Rule(LORA, lambda u, f: u.is_import and not u.of(*TORCH_ALONE), "lora/ imports torch alone"),
    Rule(LORA, lambda u, f: u.of("torch.distributed"), "lora/ is not distributed"),
    Rule(LORA, outside("lora", "quant", "errors"), "lora/ stands on quant/, below the rest"),
    Rule(
        QUANT,
        lambda u, f: u.is_import and not u.of(*TORCH_ALONE) and not is_the_kernel_of(u, f),
        "quant/ imports torch alone, and bitsandbytes in its own file",
    ),
    Rule(QUANT, lambda u, f: u.of("torch.distributed"), "quant/ is not distributed"),
    Rule(QUANT, outside("quant"), "quant/ stands below the rest of dlora"),
    Rule(SHARDING, outside("sharding", "errors"), "sharding/ stands beside lora/, below the rest"),
    Rule(SHARDING, lambda u, f: u.is_import and u.of("transformers"), "sharding/ knows no models"),
    Rule(
        SHARDING,
        lambda u, f: u.is_import and u.of("deepspeed") and "zero3" not in f,
        "deepspeed stays in its own file",
    ),
    Rule(SIDE_FILES, another_side_s_inside, "each other's insides are private"),
    Rule(SIDE_FILES, above_a_side, "these stand below what joins them"),
    Rule(
        SIDE_FILES,
        lambda u, f: u.is_import and u.of(*(f"dlora.{name}" for name in CONCRETE)),
        "concrete engines and variants are not known here",
    ),
    Rule(
        ("launchers/",),
        outside("train", "hooks", "config", "errors"),
        "launchers use dlora.train with its hooks, dlora.config.load and dlora.errors",
    ),
)


def violations(source: str, file: str) -> list[str]:
    """What `source` does that its place forbids, as `file:line name: reason`."""
    rules = [rule for rule in RULES if file.startswith(rule.where)]
    found = {
        f"{file}:{use.line} {use.name}: {rule.reason}"
        for use in uses(source, file)
        for rule in rules
        if rule.forbidden(use, file)
    }
    return sorted(found)


@pytest.mark.parametrize("file", FILES)
def test_the_layers_hold(file: str) -> None:
    assert violations((ROOT / file).read_text("utf-8"), file) == []


PLANTED = {
    "distributed mathematics": ("dlora/lora/merge.py", "import torch.distributed as dist"),
    "from": ("dlora/lora/merge.py", "from torch import distributed"),
    "DTensor": ("dlora/lora/variants/x.py", "from torch.distributed.tensor import DTensor"),
    "by attribute": ("dlora/lora/merge.py", "import torch\nn = torch.distributed.get_rank()"),
    "by string": ("dlora/lora/merge.py", "m = __import__('transformers')"),
    "ray by string": ("dlora/train.py", "importlib.import_module('ray.train')"),
    "inside a function": ("dlora/lora/x.py", "def f():\n    import deepspeed"),
    "mathematics above": ("dlora/lora/x.py", "from dlora.sharding.topology import Topology"),
    "relative": ("dlora/lora/x.py", "from ..sharding import mesh"),
    "another library": ("dlora/lora/x.py", "import numpy"),
    "adapters in packing": ("dlora/quant/x.py", "from dlora.lora.attach import attach"),
    "distributed packing": ("dlora/quant/x.py", "import torch.distributed as dist"),
    "another library's packing": ("dlora/quant/nf4.py", "import bitsandbytes"),
    "packing in sharding": ("dlora/sharding/x.py", "from dlora.quant.linear import pack"),
    "adapters in sharding": ("dlora/sharding/x.py", "from dlora.lora.attach import attach"),
    "models in sharding": ("dlora/sharding/x.py", "import transformers"),
    "deepspeed elsewhere": ("dlora/sharding/engines/fsdp2.py", "from deepspeed import zero"),
    "the loop in sharding": ("dlora/sharding/x.py", "from dlora.train import build"),
    "insides of data": ("dlora/optim/x.py", "from dlora.data.collate import collate"),
    "insides of optim": ("dlora/objectives/x.py", "from dlora.optim import groups"),
    "an engine": ("dlora/checkpoint/format.py", "from dlora.sharding.engines.fsdp2 import Fsdp2"),
    "a variant": ("dlora/optim/groups.py", "from dlora.lora.variants.lora import LoraAdapter"),
    "the configuration": ("dlora/metrics/log.py", "from dlora.config.load import Config"),
    "ray": ("dlora/train.py", "from ray import train"),
    "a launcher's depth": (
        "launchers/ray_train.py",
        "from dlora.sharding.topology import Topology",
    ),
    "pickle": ("dlora/io/files.py", "import pickle"),
    "from pickle": ("dlora/io/files.py", "from pickle import loads"),
    "torch.load": ("dlora/io/files.py", "import torch\nx = torch.load('f', weights_only=True)"),
    "from torch": ("dlora/io/files.py", "from torch import load"),
    "renamed": ("dlora/io/files.py", "import pickle as json"),
    "objects": ("dlora/runtime/ranks.py", "dist.broadcast_object_list([])"),
    "numpy": ("benchmarks/rows.py", "import numpy as np\nx = np.load('f')"),
    "from numpy": ("benchmarks/rows.py", "from numpy import load"),
    "an argument": ("benchmarks/rows.py", "x = other.load('f', allow_pickle=True)"),
    "unsafe YAML": ("dlora/config/load.py", "import yaml\nx = yaml.load(text, Loader=yaml.Loader)"),
    "a loader": ("dlora/config/strict_yaml.py", "class L(yaml.FullLoader): pass"),
    "eval": ("dlora/config/load.py", "x = eval('1')"),
    "exec": ("launchers/x.py", "exec(open('f').read())"),
    "more objects": ("launchers/x.py", "from torch.distributed import all_gather_object"),
}
HARMLESS = {
    "errors": ("dlora/lora/x.py", "from dlora.errors import UsageError\nimport torch.nn as nn"),
    "a type": ("dlora/objectives/x.py", "from dlora.lora.layers import CHILD"),
    "a public name": ("dlora/objectives/x.py", "from dlora.data import NO_TARGET"),
    "packing": ("dlora/lora/x.py", "from dlora.quant.linear import whole"),
    "the kernels' file": ("dlora/quant/dequantize.py", "import bitsandbytes"),
    "its own file": ("dlora/sharding/engines/zero3.py", "import deepspeed"),
    "the mode of a model": (
        "dlora/generate.py",
        "eval = None\nmodel.eval()\nf(eval)\ng(data.eval)",
    ),
    "safe YAML": ("dlora/config/load.py", "import re, yaml\nyaml.safe_load(t)\nre.compile('a')"),
    "words": ("dlora/lora/x.py", '"""transformers and ray are not used here"""\nray = 1'),
    "the command": ("launchers/x.py", "import ray\nfrom dlora.train import main"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case: str) -> None:
    file, source = PLANTED[case]
    assert len(violations(source, file)) >= 1


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_allowed_is_not_reported(case: str) -> None:
    file, source = HARMLESS[case]
    assert violations(source, file) == []


def test_the_files_were_found() -> None:
    """An empty list would pass every test above."""
    assert {
        "dlora/lora/functional.py",
        "dlora/quant/nf4.py",
        "dlora/sharding/replica/replica.py",
        "dlora/train.py",
    } <= set(FILES)


def test_importing_dlora_loads_torch_and_nothing_larger() -> None:
    program = "import sys, dlora; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"dlora", "torch"} <= loaded
    assert not loaded & {"deepspeed", "ray", "transformers", "peft", "bitsandbytes", "matplotlib"}
