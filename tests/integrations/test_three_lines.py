"""README's two scripts: PEFT under `Trainer`, and what three lines make of it."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from hugging_face import fresh_state, losses, sequences
from ranks import Pools

README = Path(__file__).parents[2] / "README.md"
# What a tiny run on CPUs needs beside; the same in both scripts.
STARTED = "from hugging_face import same_start\nsame_start(model)\nargs = "
SETTINGS = "max_steps=3, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True"


def script(kept: str) -> str:
    """The lines of README's diff that have one of the marks `kept`."""
    (block,) = re.findall(r"```diff\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    return "\n".join(line[1:] for line in block.splitlines() if line[:1] in kept)


def trained(text: str, base: str, directory: Path) -> list[float]:
    fresh_state()
    for name, value in {
        "args = ": STARTED,
        "max_steps=3": SETTINGS,
        '"out"': repr(str(directory / "out")),
    }.items():
        assert name in text
        text = text.replace(name, value)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "script.py"
    file.write_text(text)
    names = runpy.run_path(str(file), {"base": base, "dataset": sequences()})
    return losses(names["trainer"])


def test_both_scripts_have_the_same_losses(pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    assert [len(script(mark).split("\n")) for mark in "-+"] == [2 + 1, 3 + 1]  # and the empty line
    base = saved_models("llama")
    wanted = pools(1).run(trained, script(" -"), base, tmp_path / "peft")[0]
    ours = script(" +")
    assert pools(1).run(trained, ours, base, tmp_path / "dlora")[0] == pytest.approx(
        wanted, rel=1e-5
    )
    on_two = ours.replace("batch_size=4", "batch_size=2")
    on_two = on_two.replace("model=model,", 'model=model, sharding={"base": "world"},')
    assert on_two != ours
    for found in pools(2).run(trained, on_two, base, tmp_path / "two"):
        assert found == pytest.approx(wanted, rel=1e-5)
    for name in ("peft", "dlora", "two"):
        assert (tmp_path / name / "out" / "adapter_model.safetensors").exists()
