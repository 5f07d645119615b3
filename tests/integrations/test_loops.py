"""Accelerate, Lightning and loops by hand: PEFT's losses in one process, and exact resumes."""

import math
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hugging_face import fresh_state, written
from loops import RUNS, Setting, adapted, by_peft, overflowing, run, saved
from peft import PeftModel
from ranks import Pools
from tiny import whole

from dlora import LoraConfig, UsageError, attach, save_adapter, shard
from dlora.integrations.accelerate import prepare
from dlora.integrations.transformers import DloraCallback

FULL = pytest.mark.full
SAMPLE = {
    ("hand", 2, Setting("zero3", "divided", "lora", 0.2, "fp16")),
    ("accelerate", 2, Setting("fsdp2", "divided", "lora", 0.2, "bf16")),
    ("lightning", 2, Setting("fsdp2", "divided", "lora", 0.2, "bf16")),
    ("hand", 1, Setting("fsdp2", "replicated", "adalora")),
    ("hand", 2, Setting("fsdp2", "replicated", "lora", 0.2, "no", "lora_pro")),
    ("accelerate", 2, Setting("zero3", "divided", "adalora")),
    ("lightning", 2, Setting("zero3", "divided", "adalora")),
}
RESUMED = SAMPLE | {
    (kind, ranks, Setting(engine, state, method, 0.2 if method == "lora" else 0.0))
    for kind, ranks, engine, state, method in product(
        RUNS, (1, 2), ("fsdp2", "zero3"), ("replicated", "divided"), ("lora", "adalora", "pissa")
    )
}
CASES = [
    pytest.param(
        *case, id="-".join(map(str, (*case[:2], *case[2]))), marks=case not in SAMPLE and FULL or ()
    )
    for case in sorted(RESUMED)
]


@pytest.mark.parametrize("kind", RUNS)
def test_losses_are_those_of_peft_in_one_process(
    kind: str, pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    base = saved_models("llama")
    wanted = pools(1).run(by_peft, base)[0]
    for ranks, engine, state in (
        (1, "fsdp2", "replicated"),
        (2, "fsdp2", "replicated"),
        (2, "zero3", "divided"),
    ):
        directory = tmp_path / f"{engine}{ranks}"
        found = pools(ranks).run(run, kind, base, directory, Setting(engine, state))
        losses = [mean(at) for at in zip(*(result.losses for result in found), strict=True)]
        assert losses == pytest.approx(wanted, rel=1e-5), (ranks, engine)
        assert {result.reductions for result in found} == {len(wanted) // 2}


@pytest.mark.parametrize(("kind", "ranks", "setting"), CASES)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    kind: str, ranks: int, setting: Setting, pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    base = saved_models("llama")
    straight = pools(ranks).run(run, kind, base, tmp_path, setting)
    resumed = pools(ranks).run(run, kind, base, tmp_path, setting, True)
    for one, other in zip(straight, resumed, strict=True):
        assert one.losses[4:] == other.losses
    first, second = written(saved(kind, tmp_path, False)), written(saved(kind, tmp_path, True))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    PeftModel.from_pretrained(whole(base), saved(kind, tmp_path, True))
    assert not list(tmp_path.rglob("model*.safetensors"))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_overflow_on_one_rank_is_a_skipped_step_on_all(
    method: str, pools: Pools, saved_models: Any
) -> None:
    found = pools(2).run(overflowing, saved_models("llama"), method)
    for norms, changed, scale, step in found:
        assert [math.isfinite(norm) for norm in norms] == [True, False, True]
        assert norms == found[0][0]
        assert changed == [True, method == "adalora", True]  # its masks fall as scheduled
        assert scale == 2.0**7  # halved once
        assert step == (3 if method == "adalora" else 0)  # its schedule has gone on


def test_what_would_break_a_loop_is_refused(saved_models: Any, tmp_path: Path) -> None:
    fresh_state()
    model = adapted(saved_models("llama"), Setting())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UsageError, match="DloraCallback: the model is not sharded"):
        DloraCallback(model, optimizer)
    accelerator = Accelerator(cpu=True)
    prepare(accelerator, model, optimizer)
    with pytest.raises(UsageError, match="prepare: this Accelerator has a model of dlora already"):
        prepare(accelerator, model, optimizer)
    with pytest.raises(UsageError, match="dlora_state.safetensors: file not found"):
        save_adapter(model, tmp_path)
        DloraCallback(model, optimizer).load(tmp_path)
    (tmp_path / "dlora_state.safetensors").write_bytes(b"{}")
    with pytest.raises(UsageError, match="dlora_state.safetensors: damaged"):
        DloraCallback(model, optimizer).load(tmp_path)


def test_trained_adapters_with_names_are_refused(saved_models: Any) -> None:
    """None of them would be stepped or saved; frozen ones stay where they are."""
    model = attach(whole(saved_models("llama")), LoraConfig(r=2))
    attach(model, LoraConfig(r=2), "frozen", is_trainable=False)
    optimizer = torch.optim.AdamW(shard(model).parameter_groups(lr=1e-3))
    DloraCallback(model, optimizer)
    attach(model, LoraConfig(r=2), "trained")
    with pytest.raises(UsageError, match=r"^model: trains adapters by name \(trained\)"):
        DloraCallback(model, optimizer)
