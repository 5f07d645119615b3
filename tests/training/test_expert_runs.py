"""Runs that adapt stacked experts (`adapter.target_parameters`), sharded, packed and merged."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import quiet_peft
from peft import PeftModel
from refusals import preparation, refusal
from run_training import Runs, check_near, relative_error
from safetensors.torch import load_file
from tiny import whole

from dlora.export.command import main as export

pytestmark = quiet_peft
STEPS = 3
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(3, 200, 7)[None]


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(
        words,
        train__max_steps=STEPS,
        adapter__target_parameters=EXPERTS,
        adapter__target_modules=["q_proj"],
    )


@pytest.mark.parametrize(
    ("model", "packed", "engine"),
    [("mixtral", "none", "fsdp2"), ("mixtral_blocks", "nf4", "zero3")],
)
def test_training_is_that_of_one_process(run: Runs, model: str, packed: str, engine: str) -> None:
    one = run("one", 1, model, model__quantization=packed)
    where = {"sharding__engine": engine, "sharding__base": "world"}
    check_near(run("run", 2, model, model__quantization=packed, **where), one)
    names = one[0][0]["tensors"]
    assert {name.split(".adapter.")[1] for name in names if "experts" in name} == {
        f"{parameter}.lora_{factor}"
        for parameter in ("gate_up_proj", "down_proj")
        for factor in "AB"
    }


def test_an_adapter_goes_to_peft_and_into_the_files_of_the_base(
    run: Runs, saved_models: Any, tmp_path: Path
) -> None:
    """The files of a Mixtral have keys for each expert, and gate and up apart."""
    base = saved_models("mixtral")
    run("run", 1, "mixtral", output__save_every=2, output__keep_last=5, optimizer__lr=0.02)
    adapter, merged = tmp_path / "run/adapter", tmp_path / "merged"
    with torch.no_grad():
        there = PeftModel.from_pretrained(whole(base), adapter).eval()
        expected = there(IDS).logits
        assert relative_error(whole(base)(IDS).logits, expected) > 1e-3
        assert export(["--adapter", str(adapter), "--to", str(merged), "--merge"]) == 0
        assert relative_error(whole(merged)(IDS).logits, expected) < 1e-5
    ours, theirs = (load_file(path / "model.safetensors") for path in (merged, Path(base)))
    assert ours.keys() == theirs.keys()
    changed = {key.rpartition("layers.")[2] for key in ours if not ours[key].equal(theirs[key])}
    assert len(changed) == 2 * (1 + 4 * 3) and all("experts" in k or "q_proj" in k for k in changed)

    checkpoint = tmp_path / "run/checkpoints/step-000002"
    assert export(["--adapter", str(checkpoint), "--to", str(tmp_path / "plain")]) == 0
    resumed = run("resumed", 1, "mixtral", output__resume=str(checkpoint), optimizer__lr=0.02)
    assert [line["step"] for line in resumed[1]] == [3]
    again = load_file(tmp_path / "resumed/adapter/adapter_model.safetensors")
    once = load_file(adapter / "adapter_model.safetensors")
    assert again.keys() == once.keys() and all(again[key].equal(once[key]) for key in once)


def test_what_is_left_and_what_cannot_act_is_said_before_a_weight_is_read(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_weights_are_read: None
) -> None:
    preparation(words(tmp_path / "run", "mixtral"))
    said = capsys.readouterr().out
    assert "adapter.target_modules: all-linear leaves stacked weights of experts alone" in said
    assert "target_parameters: [experts.gate_up_proj, experts.down_proj] adapts them" in said
    for settings, message in (
        ({"adapter__lora_dropout": 0.1}, "adapter.lora_dropout: 0.1 cannot act"),
        ({"optimizer__name": "lora_pro"}, "adapter.target_parameters"),
        (
            {"adapter__method": "adalora", "adapter__r": None, "adapter__lora_alpha": None},
            "adapter.target_parameters: need a plain LoRA, not adalora",
        ),
    ):
        settings = {"adapter__target_parameters": EXPERTS} | settings
        assert message in refusal(preparation, words(tmp_path / "run", "mixtral", **settings))
