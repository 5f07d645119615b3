"""`train.deterministic`: what torch is told, and which operators a step then calls."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Calls
from causal_models import causal_model, token_ids
from refusals import refusal

from dlora import AdaLoraConfig, LoraConfig, attach, train
from dlora.objectives.chunked_loss import install
from dlora.runtime.determinism import deterministic

# Those for which torch documents an error on CUDA where deterministic kernels are wanted.
REFUSED = {
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "median",
    "mode",
    "max_pool3d_with_indices_backward",
    "max_unpool2d",
    "nll_loss2d_forward",
    "put",
    "replication_pad1d_backward",
    "reflection_pad1d_backward",
    "upsample_bicubic2d_backward",
    "upsample_linear1d_backward",
    "upsample_nearest2d_backward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: LoraConfig(r=2, lora_dropout=0.1),
    "look-ups": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "dora": lambda: LoraConfig(r=2, use_dora=True),
    "adalora": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10),
    "whole": lambda: LoraConfig(r=2, modules_to_save=["lm_head", "model.norm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_calls_what_has_no_deterministic_kernel(name: str) -> None:
    model = causal_model("llama")
    attach(model, CONFIGS[name]())
    install(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = token_ids()
    positions = (ids >= 0).nonzero()
    with deterministic(True), Calls() as calls:
        assert torch.are_deterministic_algorithms_enabled()
        model(input_ids=ids, targets=ids, positions=positions).backward()
        optimizer.step()
    called = {name.split(".")[1].rstrip("_") for name in calls.counted}
    assert called & REFUSED == set() and len(called) > 20
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)

    def run(wanted: bool, text: str) -> None:
        with deterministic(wanted):
            raise RuntimeError(text)

    text = "put_ does not have a deterministic implementation, but you set 'torch.use_…'"
    said = refusal(run, True, text)
    assert said.startswith("train.deterministic: put_ has no deterministic kernel; ")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for wanted, other in ((False, text), (True, "out of memory")):
        with pytest.raises(RuntimeError, match=other[:10]):
            run(wanted, other)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_option_holds_for_all_of_a_run(
    monkeypatch: pytest.MonkeyPatch, words: Any, tmp_path: Path, wanted: bool
) -> None:
    """From before weights are read; and no longer than the run."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    seen = []

    class Run:
        def __init__(self, *_: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

        def run(self) -> int:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return 0

    monkeypatch.setattr(train, "Run", Run)
    argv = words(tmp_path / "run", train__deterministic=wanted, train__max_steps=1)
    assert train.main(argv) == 0
    assert seen == [wanted, wanted]
    assert not torch.are_deterministic_algorithms_enabled()
