"""A base whose files are not the model that its config.json describes is refused, unread."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_json
from refusals import preparation, refusal
from safetensors.torch import load_file, save_file
from tiny import MODELS, command

from dlora.base.loading import BaseWeights
from dlora.base.model import find_base
from dlora.errors import UsageError

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


def edited(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Damages a model directory: `edit` changes the tensors of its one file."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


def without(*keys: str) -> Callable[[Path], None]:
    return edited(lambda tensors: [tensors.pop(key) for key in keys] and None)


def configured(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **values)


def cut_short(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def one_shard_gone(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()


UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
GATE_UP = r"model\.layers\.1\.mlp\.experts\.gate_up_proj"
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no weights": ("llama", lambda d: (d / WEIGHTS).unlink(), "contains neither model.safetensors"),
    "one is missing": ("llama", without(UP), f"do not contain {UP}"),
    "two are missing": ("llama", without("lm_head.weight", UP), "and 1 more$"),
    "another width": ("llama", configured(intermediate_size=72), r"contains model\.layers\.0\.mlp\."
                      r"\w+\.weight as \[\d+, \d+\], but the model needs floats"),
    "more layers": ("llama", configured(num_hidden_layers=3), r"do not contain model\.layers\.2\."),
    "cut short": ("llama", cut_short, "is damaged or not a safetensors file"),
    "a shard is gone": ("llama", one_shard_gone, "model-00001-of-00001.*file not found"),
    "integers": ("llama", edited(lambda t: t.update({UP: t[UP].to(torch.int8)})),
                 f"contains {UP} as I8"),
    "tied, without either": ("tied", without("model.embed_tokens.weight"),
                             r"do not contain (model\.embed_tokens|lm_head)\.weight"),
    "untied, without a head": ("tied", configured(tie_word_embeddings=False), "contain lm_head"),
    "an expert is missing": ("mixtral", without(*(EXPERT.format(3, part) for part in (1, 2, 3))),
                             r"model\.layers\.1\.mlp\.experts\.\w+ as \[3, "),
    "half an expert is missing": ("mixtral", without(EXPERT.format(3, 1)), GATE_UP),
    "all first halves are missing": (
        "mixtral", without(*(EXPERT.format(expert, 1) for expert in range(4))), GATE_UP),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_the_model_is_refused(saved_models: Any, tmp_path: Path, case: str) -> None:
    model, damage, message = CASES[case]
    base = Path(shutil.copytree(saved_models(model), tmp_path / "base"))
    damage(base)
    said = refusal(preparation, command(base, tmp_path))
    assert re.search(message, said) and said.startswith("model.path: ")


@pytest.mark.parametrize("model", MODELS)
def test_whole_bases_pass(saved_models: Any, tmp_path: Path, model: str) -> None:
    assert preparation(command(saved_models(model), tmp_path)).base.path == saved_models(model)


def test_what_a_hub_brings_is_checked_while_it_is_read(saved_models: Any, tmp_path: Path) -> None:
    """Where files could not be checked before, the report of the loading is."""
    for damage, message in (
        (without(UP), f"do not contain {UP}"),
        (edited(lambda t: t.update({UP: t[UP][1:].clone()})), rf"has {UP} as \[69, 40\]"),
    ):
        base = tmp_path / message.split()[0] / "base"
        shutil.copytree(saved_models("llama"), base)
        damage(base)
        with pytest.raises(UsageError, match=message):
            BaseWeights(find_base(str(base), dtype="float32")).from_pretrained()


HUB = """
import sys
from pathlib import Path
from refusals import preparation
from tiny import command
from dlora.errors import UsageError

for name in ("whole", "damaged", "away"):
    try:
        preparation(command(f"org/{name}", Path(sys.argv[1])))
    except UsageError as error:
        print(f"result {name}: {error}")
    else:
        print(f"result {name}: passes")
"""


def test_what_a_hub_has_brought_already_is_checked(saved_models: Any, tmp_path: Path) -> None:
    """Weights that are still to be brought are not, for a check."""
    for name in ("whole", "damaged", "away"):
        repository = tmp_path / "hub" / f"models--org--{name}"
        snapshot = repository / "snapshots" / "abc"
        shutil.copytree(saved_models("llama"), snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        if name == "damaged":
            without(UP)(snapshot)
        if name == "away":
            (snapshot / WEIGHTS).unlink()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path)],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    assert results == [
        "result whole: passes",
        f"result damaged: model.path: the files of org/damaged do not contain {UP}",
        "result away: passes",
    ]
