"""A run needs what `pip install dlora` brings, and nothing that only the tests install."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from tiny import command, save_model

ROOT = Path(__file__).parents[1]
# Read by every Python at its start: what is hidden is neither found nor imported.
HIDE = """
import importlib.util, os, sys

HIDDEN = set(os.environ["HIDDEN"].split(","))
found = importlib.util.find_spec


class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in HIDDEN else found(name, package)
)
sys.meta_path.insert(0, Hider())
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: list[str]) -> set[str]:
    """The distributions that these requirements bring."""
    seen: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        marker, name = requirement.marker, canonical(requirement.name)
        extras = requirement.extras or {""}
        if name in seen or (marker and not any(marker.evaluate({"extra": e}) for e in extras)):
            continue
        seen.add(name)
        try:
            wanted += requires(name) or []
        except PackageNotFoundError:
            continue
    return seen


def test_a_run_needs_no_test_extra(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = closure(list(project["dependencies"])) | {"dlora", "pip", "setuptools"}
    hidden = {
        module
        for module, names in packages_distributions().items()
        if not brought & {canonical(name) for name in names} and not module.startswith("_")
    }
    assert {"peft", "deepspeed", "ray", "pytest"} <= hidden
    assert not {"torch", "transformers", "dlora", "yaml"} & hidden
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(HIDE)
    made = subprocess.run(
        [sys.executable, "-m", "dlora", "launch", "--nproc-per-node", "2", *words(tmp_path)],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path / 'hide'}{os.pathsep}{ROOT}", "HIDDEN": ",".join(hidden)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr[-2000:]


def words(place: Path) -> list[str]:
    """A run of two steps on a sharded base."""
    (place / "config.yaml").write_text("{}")
    model = save_model(place / "model", "llama")
    argv = command(model, place, sharding__base="world", train__global_batch_size=2)
    return ["--config", str(place / "config.yaml"), *argv]
