"""FLoRA and convolutions beside a sharded base: what one process computes, resumed exactly."""

from pathlib import Path
from typing import Any

import peft
import pytest
import test_quantized_methods
import torch
import torch.distributed as dist
import torch.nn.functional as F
from causal_models import relative_error
from ranks import Pools
from run_training import figures, same_bits, train
from test_resume import crashed
from transformers import AutoModelForCausalLM
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
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = unet()
    replica = shard(model, engine=engine, base="world")
    divided = {n.rpartition(".")[0] for n, p in model.named_parameters() if is_divided(p)}
    torch.manual_seed(0)
    attach(model, CONFIGS[method])
    groups = replica.parameter_groups(lr=1e-2, loraplus_lr_ratio=4, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, eps=1e-4, fused=True)  # of noise it makes no steps
    losses, norms = [], []
    for step in range(STEPS):
        x, times, target = (part.chunk(world)[rank] for part in noisy(rows=ROWS, seed=step))
        loss = F.mse_loss(model(x, times), target)
        loss.backward()
        replica.reduce_gradients()
        losses.append(loss.detach())
        norms.append(replica.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    save_adapter(model, Path(out) / f"rank-{rank}")
    x, times, _ = noisy(seed=99)
    with torch.no_grad():
        after = model(x, times)
    return {
        "losses": torch.stack(losses),
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
        pytest.param("lora", "fsdp2", 2, marks=pytest.mark.full),
        ("lora", "zero3", 2),
        ("flora", "fsdp2", 3),
        pytest.param("flora", "zero3", 2, marks=pytest.mark.full),
        pytest.param("lora", "fsdp2", 3, marks=pytest.mark.full),
        pytest.param("lora", "zero3", 3, marks=pytest.mark.full),
        pytest.param("flora", "fsdp2", 2, marks=pytest.mark.full),
        pytest.param("flora", "zero3", 3, marks=pytest.mark.full),
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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_flora_is_one_process_and_resumed_exactly(
    pools: Pools, saved_models: Any, run_words: Any, tmp_path: Path
) -> None:
    def words(name: str) -> list[str]:
        return run_words(
            tmp_path / name,
            adapter__method="flora",
            adapter__flora_r_out=3,
            adapter__lora_dropout=0.1,
            optimizer__loraplus_lr_ratio=4,
            output__save_every=3,
            train__max_steps=8,
        )

    one = pools(1).run(train, words("one"))[0]
    whole = pools(2).run(train, words("whole"))
    assert pools(2).run(crashed, words("broken")) == ["crashed"] * 2
    again = pools(2).run(train, words("broken"))
    for result, wanted in zip(again, whole, strict=True):
        assert same_bits(result["tensors"], wanted["tensors"])
    assert figures(tmp_path / "broken")[-2:] == figures(tmp_path / "whole")[-2:]
    assert any(name.endswith("lora_core") for name in one["tensors"])
    for name, tensor in one["tensors"].items():
        assert relative_error(whole[0]["tensors"][name], tensor) < 1e-4, name

    last = max((tmp_path / "whole/checkpoints").glob("step-*"))
    assert export(["--adapter", str(last), "--to", str(tmp_path / "plain")]) == 0
    assert export(["--adapter", str(last), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    ids, logits = torch.arange(12)[None], []
    for adapter in ("whole/adapter", "plain", None):
        base = saved_models("llama") if adapter else tmp_path / "merged"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, tmp_path / adapter) if adapter else model
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert relative_error(logits[2], logits[0]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize(("engine", "name", "world"), [("fsdp2", "nf4", 3), ("zero3", "int8", 2)])
def test_beside_a_packed_base(
    pools: Pools,
    saved_models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    name: str,
    world: int,
) -> None:
    settings = {"adapter__method": "flora", "adapter__flora_r_out": 3}
    monkeypatch.setitem(test_quantized_methods.METHODS, "flora", settings)
    test_quantized_methods.test_a_method_beside_a_packed_base(
        pools, saved_models, tmp_path, "flora", engine, name, world
    )
