"""A wheel built from a clean clone and installed into an empty environment runs the commands."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from tracked import copy_tracked
from transformers import LlamaConfig

COMMAND_SECONDS = 300  # each takes a few, alone


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel") / "clone"
    copy_tracked(directory)
    return directory


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    """Built in the clone, by the setuptools that is installed, without a network."""
    built = clone.parent / "dist"
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    call([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(built), "."], clone)
    (file,) = built.glob("dlora-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """`bin` of an environment with the wheel alone, which sees this one's other packages."""
    root = wheel.parents[1] / "venv"
    venv.create(root, symlinks=True)
    names = {"base": str(root), "platbase": str(root)}
    # Packages on a path of a .pth file are seen, but no .pth file there: not the editable dlora.
    others = Path(sysconfig.get_path("purelib", vars=names)) / "others.pth"
    others.write_text(sysconfig.get_path("purelib") + "\n")
    python = root / "bin" / "python"
    alone = ["--no-deps", "--no-index", "--ignore-installed", "--quiet"]
    call([str(python), "-m", "pip", "install", *alone, str(wheel)], root)
    return python.parent


def call(command: list[str], directory: Path) -> str:
    """Standard output of a command that ends with 0, which sees no source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert made.returncode == 0, f"{command}\n{made.stdout[-2000:]}\n{made.stderr[-2000:]}"
    return made.stdout


def test_the_wheel_has_every_module_and_the_launchers_as_part_of_dlora(
    wheel: Path, clone: Path
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if name.endswith(".py")}
    sources = {path.relative_to(clone).as_posix() for path in (clone / "dlora").rglob("*.py")}
    launchers = {f"dlora/launchers/{path.name}" for path in (clone / "launchers").glob("*.py")}
    assert "dlora/launchers/ray_train.py" in launchers
    assert modules == sources | launchers
    assert {f"dlora/report/page.{kind}" for kind in ("css", "html.j2", "js")} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dlora"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_command_lists_its_commands(installed: Path, tmp_path: Path) -> None:
    listed = call([str(installed / "dlora"), "--help"], tmp_path)
    assert all(name in listed for name in ("train", "launch", "plan", "export", "generate"))


def test_the_plan_of_a_model_needs_its_configuration_alone(installed: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path / "m")
    keys = ["--model.path=m", "--data.train=none.jsonl", "--output.dir=runs"]
    machines = ["--nodes=2", "--gpus-per-node=2", "--gpu-memory-gb=8"]
    printed = call([str(installed / "dlora"), "plan", *keys, *machines], tmp_path)
    assert "world" in printed and "node" in printed


def test_a_launcher_runs_under_its_installed_name(installed: Path, tmp_path: Path) -> None:
    words = ["-m", "dlora.launchers.ray_train", "--help"]
    assert "usage: dlora.launchers.ray_train" in call([str(installed / "python"), *words], tmp_path)
    found = "from importlib.util import find_spec; print(find_spec('launchers'))"
    assert call([str(installed / "python"), "-c", found], tmp_path).strip() == "None"
