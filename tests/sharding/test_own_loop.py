"""The contract's calls in a loop of the user's own: attach, shard, reduce_gradients, clip."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_loops import BASES, batches, place, started
from ranks import Pools
from run_training import relative_error, same_bits
from sampling import full
from tiny import whole
from torch import nn
from torch.distributed.fsdp import fully_shard

from dlora import LoraConfig, UsageError, attach, load_adapter, save_adapter, shard
from dlora.sharding.engines.protocol import is_divided

STEPS = 8
CONFIG = LoraConfig(r=4, lora_alpha=8)


def own_loop(path: str, base: str, attach_first: bool, by_tokens: bool, out: str) -> dict[str, Any]:
    """The loop of contract.md, section 4."""
    model, replica = started(path, base, CONFIG, attach_first, resident=0.5)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3), fused=True)
    losses, norms = [], []
    for ids in batches(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        if by_tokens:
            (loss * ids.numel()).backward()
            replica.reduce_gradients(tokens=ids.numel())
        else:
            loss.backward()
            replica.reduce_gradients()
        losses.append(loss.detach())
        norms.append(replica.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    save_adapter(model, Path(out) / f"rank-{place()[0]}")
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "adapter": {name: p.detach() for name, p in replica.named.items()},
        "names": [name for name, _ in model.named_parameters() if ".adapter." not in name],
        "divided": any(map(is_divided, model.parameters())),
    }


@pytest.fixture(scope="module")
def one_process(
    pools: Pools, saved_models: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = str(tmp_path_factory.mktemp("one"))
    arguments = (saved_models("llama"), "sharded by dlora", True, False, out)
    return pools(1).run(own_loop, *arguments)[0]


@pytest.mark.parametrize(
    ("attach_first", "by_tokens"),
    [
        (True, False),
        (False, True),
        # 2 s each: both orders and both kinds of mean are in the others
        full(True, True),
        full(False, False),
    ],
)
@pytest.mark.parametrize(
    ("world", "base"), [(1, "sharded by dlora"), *((2, base) for base in BASES)]
)
def test_the_loop_gives_what_one_process_gives(
    pools: Pools,
    saved_models: Any,
    one_process: dict[str, Any],
    tmp_path: Path,
    world: int,
    base: str,
    attach_first: bool,
    by_tokens: bool,
) -> None:
    """promise 1.2: what any rank saves is what was trained.

    promise 1.4: plain files on every engine; promise 4.2: attach works after `zero.Init`.
    """
    arguments = (saved_models("llama"), base, attach_first, by_tokens, str(tmp_path))
    results = pools(world).run(own_loop, *arguments)
    loss = torch.stack([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(loss, one_process["losses"], rtol=1e-5, atol=0)
    for result in results:
        assert result["divided"] == (world > 1)
        assert result["names"] == one_process["names"]
        assert same_bits(result["adapter"], results[0]["adapter"])
        torch.testing.assert_close(result["norms"], one_process["norms"], rtol=1e-5, atol=0)
        for name, tensor in one_process["adapter"].items():
            assert relative_error(result["adapter"][name], tensor) < 1e-5, name
    model = load_adapter(whole(saved_models("llama")), tmp_path / f"rank-{world - 1}")
    saved = {n: p.detach() for n, p in model.named_parameters() if ".adapter." in n}
    assert same_bits(saved, results[0]["adapter"])


def chosen(free: list[float]) -> str:
    """The base that `auto` stands for where each rank has so much free memory, in sizes of W0."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        mine = int(free[dist.get_rank()] * nbytes)
        patch.setattr("dlora.plan.own_loop.free_bytes", lambda *_: mine)
        return shard(model).engine.placement.base


@pytest.mark.parametrize(
    ("free", "base"),
    [
        ([2, 2, 2, 2], "none"),
        ([2, 2, 0.5, 2], "node"),  # the rank with the least decides
        ([2, 2, 2, 0.1], "world"),
    ],
)
def test_auto_is_the_cheapest_base_that_fits(pools: Pools, free: list[float], base: str) -> None:
    """W0 may take half of the memory; on one node there is no `node`."""
    assert pools(4).run(chosen, free, ranks_per_node=2) == [base] * 4
    on_one_node = "world" if base == "node" else base
    assert pools(4).run(chosen, free) == [on_one_node] * 4


def partitioned_adapters(path: str) -> None:
    model = attach(whole(path), CONFIG)
    fully_shard(model)
    shard(model)


def test_adapters_that_were_partitioned_are_refused(pools: Pools, saved_models: Any) -> None:
    with pytest.raises(AssertionError, match="UsageError: shard: model.* is divided over ranks"):
        pools(2).run(partitioned_adapters, saved_models("llama"))


def test_ranks_without_a_process_group_are_refused(
    saved_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would train an adapter each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="^shard: 2 processes .* call .*init_process_group"):
        shard(attach(whole(saved_models("llama")), CONFIG))


@pytest.mark.parametrize("setting", ["engine", "base"])
def test_unknown_settings_are_refused_on_one_process(saved_models: Any, setting: str) -> None:
    model = attach(whole(saved_models("llama")), CONFIG)
    with pytest.raises(UsageError, match=f"^sharding.{setting}: expected one of "):
        shard(model, **{setting: "foo"})


def sharded_on(engine: str, device: str) -> dict[str, bool]:
    """Whether each parameter is divided, of a model that `shard` puts on a device."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 2))
    attach(model, CONFIG)
    shard(model, engine, "world", device=device)
    model(torch.ones(1, 8)).sum().backward()
    assert {t.device.type for t in model.parameters()} == {device}
    return {name: is_divided(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_device_is_taken_by_each_engine(pools: Pools, engine: str) -> None:
    for divided in pools(2).run(sharded_on, engine, "cpu"):
        assert divided["0.0.weight"] and divided["0.1.weight"]
        assert not any(is_so for name, is_so in divided.items() if ".adapter." in name)


def test_a_model_on_the_cpu_beside_a_gpu_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="shard: the model is on the CPU, beside a GPU"):
        shard(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(nn.Linear(4, 4), device="cpu")
