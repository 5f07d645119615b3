"""Loops that forget `reduce_gradients`: they end as those that do not, or are refused in a line."""

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loops import batches, place, sharded_by_transformers
from ranks import Pools
from run_training import same_bits
from tiny import whole
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from dlora import LoraConfig, UsageError, attach, shard
from dlora.sharding.replica.forgotten_reduction import _guards

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
STEPS, LR = 4, 1e-2


def started(path: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(place()[0])
    model = attach(whole(path), CONFIG)
    return model, shard(model, **{"base": "none", **options})


def values(replica: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in replica.named.items()}


def optimizers(replica: Any, count: int) -> list[Any]:
    """One for all, or one for A and one for B."""
    groups = replica.parameter_groups(lr=LR, loraplus_lr_ratio=4.0)
    parts = [groups] if count == 1 else [groups[:1], groups[1:]]
    return [torch.optim.AdamW(part, lr=LR) for part in parts]


def loop(path: str, reduces: bool, how: str) -> dict[str, Any]:
    """A few steps; the adapters after them, what was warned of, and the reductions made."""
    model, replica = started(
        path,
        base="world" if how == "plain" else "none",
        optimizer_state="divided" if how == "divided" else "auto",
    )
    used = optimizers(replica, 2 if how == "two optimizers" else 1)
    if how == "divided":
        replica.attach_optimizer(used[0])
    rank, _ = place()

    def passed(ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        if how != "no batch" or rank == 0:
            loss.backward()
        if reduces:
            replica.reduce_gradients()
        return loss

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for ids in batches(STEPS):
            if how == "closure":
                used[0].step(lambda ids=ids: passed(ids))
            else:
                if how == "accumulation":
                    model(input_ids=ids, labels=ids).loss.backward()
                passed(ids)
                for optimizer in used:
                    optimizer.step()
            for optimizer in used:
                optimizer.zero_grad(set_to_none=how != "zeros")
    replica.audit()
    said = [str(w.message) for w in warned if "reduce_gradients" in str(w.message)]
    return {"adapter": values(replica), "said": said, "reductions": replica.reductions}


HOWS = ["plain", "divided", "closure", "accumulation", "two optimizers", "no batch", "zeros"]


@pytest.mark.parametrize("how", HOWS)
def test_a_step_begins_with_the_reduction_that_was_forgotten(
    pools: Pools, saved_models: Any, how: str
) -> None:
    path = saved_models("llama")
    wanted = pools(2).run(loop, path, True, how)
    found = pools(2).run(loop, path, False, how)
    for result, other in zip(found, wanted, strict=True):
        assert same_bits(result["adapter"], other["adapter"])
        assert result["reductions"] == other["reductions"] == STEPS
        assert len(result["said"]) == 1 and not other["said"]
        assert "was not called before optimizer.step()" in result["said"][0]


def scaled(path: str, enabled: bool) -> str:
    model, replica = started(path)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=LR))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=enabled)
    ids = next(batches(1))
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    try:
        scaler.step(optimizer)
    except UsageError as error:
        return str(error)
    return "stepped"


def test_a_scaler_needs_the_reduction(pools: Pools, saved_models: Any) -> None:
    """It looks for infinite values before the step begins, on each rank for itself."""
    path = saved_models("llama")
    for said in pools(2).run(scaled, path, True):
        assert said.startswith("replica.reduce_gradients() was not called: with a GradScaler")
    assert pools(2).run(scaled, path, False) == ["stepped"] * 2


def wrapped(path: str) -> dict[str, Any]:
    """DDP reduces by itself."""
    torch.manual_seed(0)
    model = attach(whole(path), CONFIG)
    replica = shard(model, base="none")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameter_groups(lr=LR), lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for ids in batches(2):
            ddp(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    replica.audit()
    return {"reductions": replica.reductions, "adapter": values(replica)}


def test_a_model_in_ddp_is_reduced_by_it(pools: Pools, saved_models: Any) -> None:
    results = pools(2).run(wrapped, saved_models("llama"))
    assert [result["reductions"] for result in results] == [0, 0]
    assert same_bits(results[0]["adapter"], results[1]["adapter"])


def trained_by_transformers(path: str, out: str) -> dict[str, Any]:
    """Stock Trainer reduces what is replicated beside a base that transformers sharded."""
    model = attach(sharded_by_transformers(path), CONFIG)
    replica = shard(model)
    rows = [{"input_ids": row, "labels": row} for row in next(batches(1, 16))]
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": LR, "report_to": []}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    before = values(replica)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Trainer(model, TrainingArguments(out, use_cpu=True, **settings), train_dataset=rows).train()
    replica.audit()
    said = [str(w.message) for w in warned if "reduce_gradients" in str(w.message)]
    after = values(replica)
    moved = [not torch.equal(before[name], after[name]) for name in after]
    return {"adapter": after, "said": said, "reductions": replica.reductions, "moved": all(moved)}


def test_a_stock_trainer_reduces_by_itself(pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    results = pools(2).run(trained_by_transformers, saved_models("llama"), str(tmp_path))
    assert same_bits(results[0]["adapter"], results[1]["adapter"])
    for result in results:
        assert result["moved"] and result["reductions"] == 0 and not result["said"]


def clipped(path: str) -> str:
    model, replica = started(path)
    ids = next(batches(1))
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UsageError) as raised:
        replica.clip(1.0)
    replica.reduce_gradients()
    replica.clip(1.0)
    return str(raised.value)


@pytest.mark.parametrize("world", [1, 2])
def test_clip_before_the_reduction_is_refused(pools: Pools, saved_models: Any, world: int) -> None:
    for said in pools(world).run(clipped, saved_models("llama")):
        assert said.startswith("replica.clip would clip this rank's own gradients: call replica.re")


def alone(path: str) -> list[str]:
    """One process needs no reduction, and nothing watches its steps."""
    _, replica = started(path)
    assert replica._guard is None and not _guards
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loop(path, False, "plain")
    return [str(w.message) for w in warned if "reduce_gradients" in str(w.message)]


def test_one_process_is_left_alone(pools: Pools, saved_models: Any) -> None:
    assert pools(1).run(alone, saved_models("llama")) == [[]]


def forgotten(path: str) -> bool:
    model, replica = started(path)
    seen = weakref.ref(replica)
    del model, replica
    gc.collect()
    return seen() is None


def test_a_replica_that_nobody_has_is_freed(pools: Pools, saved_models: Any) -> None:
    assert pools(2).run(forgotten, saved_models("llama")) == [True, True]
