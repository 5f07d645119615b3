"""Names, links and numbers of strangers: what leads elsewhere or is no number is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import loaded, write_checkpoint
from hostile import CONFIG, WEIGHTS, agree, edit_json, readings, starting_from
from refusals import preparation, refusal
from safetensors.torch import load_file, save_file
from tiny import command
from torch import Tensor

from dlora import AdaLoraConfig, attach, load_adapter
from dlora.base.model import BaseWeights, find_base
from dlora.export import command as export
from dlora.io.files import inside
from dlora.lora.attach import load_record

FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


# -- names and links that lead elsewhere -----------------------------------------------------------


@pytest.mark.parametrize("name", ["../{}", "{root}", "a/../../{}", 3, None, ""], ids=str)
def test_an_index_names_files_of_its_base_alone(name: Any, base: Path, tmp_path: Path):
    index = base / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    key, shard = next(iter(names.items()))
    shutil.copyfile(base / shard, base.parent / shard)
    if isinstance(name, str):
        name = name.format(shard, root=base.parent / shard)
    edit_json(index, weight_map=names | {key: name})
    for work in (
        lambda: preparation(command(base, tmp_path)),
        lambda: BaseWeights(find_base(str(base))).from_pretrained(),
    ):
        said = refusal(work)
        assert f"{name!r} is not the name of a file in it" in said
        assert said.startswith("model.path: ")


def test_an_adapter_beside_a_base_is_not_loaded_with_it(adapter: Path, base: Path, tmp_path: Path):
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(adapter / name, base / name)
    said = refusal(preparation, command(base, tmp_path))
    assert said.startswith(f"model.path: {base} contains an adapter_config.json")
    assert said == refusal(lambda: BaseWeights(find_base(str(base))).from_pretrained())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_an_adapter_is_refused(name: str, adapter: Path, base: Path):
    elsewhere = adapter.with_name("elsewhere")
    (adapter / name).rename(elsewhere)
    (adapter / name).symlink_to(Path("..", "elsewhere"))
    for work in readings(adapter, base):
        said = refusal(work)
        assert f"{adapter / name}: is a link out of its directory, to {elsewhere}" in said


def test_links_that_stay_inside_or_lead_to_the_hub_s_blobs_pass(
    adapter: Path, base: Path, tmp_path: Path
):
    snapshot = tmp_path / "hub/models--o--a/snapshots/abc"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copyfile(adapter / name, blobs / str(number))
        (snapshot / name).symlink_to(Path("..", "..", "blobs", str(number)))
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)  # the directory itself the user has named
    (adapter / "real").mkdir()
    (adapter / WEIGHTS).rename(adapter / "real" / WEIGHTS)
    (adapter / WEIGHTS).symlink_to(Path("real", WEIGHTS))
    values = [
        load_adapter(loaded(base), place).get_parameter(
            "model.layers.1.self_attn.q_proj.adapter.lora_B"
        )
        for place in (adapter, snapshot, linked)
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    for place in (adapter, snapshot, linked):
        preparation(starting_from(place, base))


def test_what_only_looks_like_the_hub_s_cache(tmp_path: Path):
    snapshot = tmp_path / "r/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").touch()
    (tmp_path / "r/blobs").symlink_to(tmp_path / "private")
    for name, target in {
        "blob": "../../blobs/key",  # which is a link out itself
        "other": "../../other",
        "ring": "ring",
    }.items():
        (snapshot / name).symlink_to(target)
        assert str(snapshot / name) in refusal(inside, snapshot, name)


# -- numbers ---------------------------------------------------------------------------------------


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        tensor.view(-1)[-1] = value
        return tensor

    return change


STRANGE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (with_value(math.nan), "contains NaN or infinite values"),
    "inf": (with_value(math.inf, torch.bfloat16), "contains NaN or infinite values"),
    "beyond float32": (with_value(1e300, torch.float64), "contains NaN or infinite values"),
    "integers": (with_value(1, torch.int64), "I64"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_finite_number_is_refused(
    case: str, adapter: Path, base: Path, request: pytest.FixtureRequest
):
    """Naming the tensor, before weights of the base are read, and with nothing written."""
    change, message = STRANGE[case]
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {FACTOR: change(tensors[FACTOR])}, adapter / WEIGHTS)
    model = loaded(base)
    request.getfixturevalue("no_weights_are_read")
    for work in (lambda: load_adapter(model, adapter), *readings(adapter, base)[1:]):
        said = refusal(work)
        assert f"{adapter / WEIGHTS}" in said and FACTOR in said and message in said
    assert not hasattr(model, "dlora")
    assert not (adapter.parent / "to").exists()


def test_a_checkpoint_of_what_is_no_number_is_not_exported(base: Path, tmp_path: Path):
    directory, _ = write_checkpoint(base, tmp_path / "run")
    file = directory / "adapter.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: with_value(math.nan)(tensors[name])}, file)
    agree(directory)
    words = ["--adapter", str(directory), "--to", str(tmp_path / "to")]
    for more in ([], ["--merge"]):
        said = refusal(export.main, [*words, *more])
        assert said == f"{file}: {name} contains NaN or infinite values"
    assert not (tmp_path / "to").exists()


ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 10**12}, "r: must be >= 1 and <= 65536"),
    "another r": ({"r": 60_000}, "has shape [2, "),
    "r of one": ({"rank_pattern": {"1.self_attn.q_proj": 60_000}}, "has shape [2, "),
    "r as text": ({"r": "2"}, "r: expected int, got '2'"),
    "alpha": ({"lora_alpha": math.inf}, "lora_alpha: must be a finite number"),
    "no alpha": ({"lora_alpha": math.nan}, "lora_alpha: must be a finite number"),
    "alpha of one": (
        {"alpha_pattern": {"q_proj": 1e300}},
        "alpha_pattern['q_proj']: must be > 0 and <=",
    ),
    "dropout": ({"lora_dropout": "x"}, "lora_dropout: 'x' has an unexpected type"),
    "targets": ({"target_modules": [["q_proj"]]}, "[['q_proj']] has an unexpected type"),
    "saved": ({"modules_to_save": "norm"}, "modules_to_save: 'norm' has an unexpected type"),
    "pattern": ({"rank_pattern": [1]}, "rank_pattern: [1] has an unexpected type"),
    "base": ({"base_model_name_or_path": ["x"]}, "['x'] has an unexpected type"),
    "more layers": ({"target_modules": ["q_proj", "v_proj"]}, "v_proj.lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_settings_are_refused(case: str, adapter: Path, base: Path):
    changes, message = ABSURD[case]
    edit_json(adapter / CONFIG, **changes)
    model = loaded(base)
    for work in (
        lambda: load_adapter(model, adapter),
        lambda: preparation(starting_from(adapter, base)),
    ):
        assert message in refusal(work)
    assert not hasattr(model, "dlora")  # so nothing of such a size was made


def test_a_triplet_that_never_was(base: Path):
    model = loaded(base)
    attach(model, AdaLoraConfig(init_r=3, target_r=2, target_modules=["q_proj"]))
    record = {"shrunk": True, "kept": {path: [0, 3] for path in model.dlora.adapted}}
    assert "has triplet 3 of model.layers.0" in refusal(load_record, model, record)
