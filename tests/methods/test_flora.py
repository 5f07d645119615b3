"""FLoRA and convolutions beside a sharded base: what one process computes, resumed exactly."""

import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from causal_models import relative_error
from own_loops import place, steps
from ranks import Pools
from run_training import Runs, check_near, same_bits
from sampling import full
from stopped_runs import crashed
from tiny import whole as loaded
from unet import TARGETS, noisy, unet

from dlora import FloraConfig, LoraConfig, attach, save_adapter, shard
from dlora.export.command import main as export
from dlora.sharding.engines.protocol import is_divided

STEPS, ROWS = 4, 6
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "flora": FloraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, flora_r_out=3, flora_kernel_r=2
    ),
}


def own_loop(method: str, engine: str, out: str) -> dict[str, Any]:
    """A loop of one's own over the UNet, its rows divided over the ranks."""
    rank, world = place()
    model = unet()
    replica = shard(model, engine=engine, base="world")
    divided = {n.rpartition(".")[0] for n, p in model.named_parameters() if is_divided(p)}
    torch.manual_seed(0)
    attach(model, CONFIGS[method])
    groups = replica.parameter_groups(lr=1e-2, loraplus_lr_ratio=4, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, eps=1e-4, fused=True)  # of noise it makes no steps
    losses = []

    def forward(step: int) -> torch.Tensor:
        x, times, target = (part.chunk(world)[rank] for part in noisy(rows=ROWS, seed=step))
        losses.append(F.mse_loss(model(x, times), target))
        return losses[-1]

    norms = steps(replica, optimizer, map(forward, range(STEPS)))
    save_adapter(model, Path(out) / f"rank-{rank}")
    x, times, _ = noisy(seed=99)
    with torch.no_grad():
        after = model(x, times)
    return {
        "losses": torch.stack(losses).detach(),
        "norms": torch.stack(norms),
        "after": after,
        "adapter": {name: p.detach() for name, p in replica.named.items()},
        "divided": divided,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("method", "engine", "world"),
    [
        # 2 to 10 s each: each method and each engine is in the other two
        full("lora", "fsdp2", 2),
        full("lora", "zero3", 2),  # 4 s
        ("flora", "fsdp2", 3),
        full("flora", "zero3", 2),
        full("lora", "fsdp2", 3),
        full("lora", "zero3", 3),
        full("flora", "fsdp2", 2),
        full("flora", "zero3", 3),
    ],
)
def test_sharded_convolutions_are_those_of_one_process(
    pools: Pools, tmp_path: Path, method: str, engine: str, world: int
) -> None:
    one = pools(1).run(own_loop, method, engine, str(tmp_path / "one"))[0]
    results = pools(world).run(own_loop, method, engine, str(tmp_path))
    loss = torch.stack([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(loss, one["losses"], rtol=1e-5, atol=0)
    assert one["losses"][-1] < one["losses"][0] and not one["divided"]
    for result in results:
        assert {"conv_in", "down", "blocks.1.mix", "conv_out"} <= result["divided"]
        assert same_bits(result["adapter"], results[0]["adapter"])
        torch.testing.assert_close(result["norms"], one["norms"], rtol=1e-5, atol=0)
        for name, tensor in one["adapter"].items():
            assert relative_error(result["adapter"][name], tensor) < 5e-4, name
    theirs = peft.PeftModel.from_pretrained(unet(), tmp_path / f"rank-{world - 1}")
    x, times, _ = noisy(seed=99)
    with torch.no_grad():
        assert relative_error(theirs(x, times), one["after"]) < 1e-5


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(
        words,
        adapter__method="flora",
        adapter__flora_r_out=3,
        adapter__lora_dropout=0.1,
        optimizer__loraplus_lr_ratio=4,
        output__save_every=3,
        train__max_steps=8,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_flora_is_one_process_and_resumed_exactly(
    run: Runs, saved_models: Any, tmp_path: Path
) -> None:
    whole = run("whole", 2)
    check_near(whole, run("one", 1))
    assert any(name.endswith("lora_core") for name in whole[0][0]["tensors"])
    assert run("broken", 2, work=crashed, arguments=(6,))[0] == ["crashed"] * 2
    again = run("broken", 2)
    assert all(same_bits(result["tensors"], whole[0][0]["tensors"]) for result in again[0])
    assert again[1][-2:] == whole[1][-2:]

    last = max((tmp_path / "whole/checkpoints").glob("step-*"))
    assert export(["--adapter", str(last), "--to", str(tmp_path / "plain")]) == 0
    assert export(["--adapter", str(last), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    ids, logits = torch.arange(12)[None], []
    for adapter in ("whole/adapter", "plain", None):
        model = loaded(saved_models("llama") if adapter else tmp_path / "merged")
        model = peft.PeftModel.from_pretrained(model, tmp_path / adapter) if adapter else model
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert relative_error(logits[2], logits[0]) < 1e-5
