"""ZeRO-3 beside a user's own code: activation checkpointing, engines, generation."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_loops import join_deepspeed
from ranks import Pool, Pools
from run_training import relative_error
from tiny import VOCABULARY, whole

import dlora.sharding.engines.zero3
from dlora import LoraConfig, attach, disabled, shard

STEPS = 3


def checkpointed(path: str, engine: str, reentrant: bool | None) -> dict[str, Any]:
    """Steps with activations kept (None), or recomputed in one of torch's two ways."""
    model = whole(path)
    torch.manual_seed(0)
    attach(model, LoraConfig(r=4))
    replica = shard(model, engine=engine, base="world")
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # a reentrant segment without it has no gradient
    model.train()
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3))
    draw = torch.Generator().manual_seed(replica.topology.rank)
    norms = []
    for _ in range(STEPS):
        for _ in range(2):
            ids = torch.randint(VOCABULARY, (2, 9), generator=draw)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        replica.reduce_gradients()
        norms.append(float(replica.clip(1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "adapter": {n: p.detach() for n, p in replica.named.items()}}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_numbers(
    pools: Pools, saved_models: Any, engine: str, reentrant: bool
) -> None:
    """promise 1.11: engine × kind of activation checkpointing × LoRA."""
    [*wanted] = pools(2).run(checkpointed, saved_models("llama"), "fsdp2", None)
    results = pools(2).run(checkpointed, saved_models("llama"), engine, reentrant)
    for got, expected in zip(results, wanted, strict=True):
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for name, tensor in expected["adapter"].items():
            assert relative_error(got["adapter"][name], tensor) < 1e-5, name


def gathered_ahead(path: str) -> tuple[int, int, bool]:
    """Bytes of gathers without and with DeepSpeed's look-ahead, and whether losses agree."""
    sent, losses = [], []
    for ahead in (False, True):
        dlora.sharding.engines.zero3.PREFETCH = ahead
        model = whole(path)
        torch.manual_seed(0)
        attach(model, LoraConfig(r=4))
        replica = shard(model, engine="zero3", base="world")
        for step in range(4):
            ids = torch.arange(18).view(2, 9) + step
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            gathers = replica.wire.take()
            replica.reduce_gradients()
            replica.zero_grad()
            replica.wire.take()
            losses.append(loss.detach())
        sent.append(gathers)
    dlora.sharding.engines.zero3.PREFETCH = torch.cuda.is_available()
    return sent[0], sent[1], torch.equal(torch.stack(losses[:4]), torch.stack(losses[4:]))


def test_looking_ahead_changes_no_number(pools: Pools, saved_models: Any) -> None:
    """What accelerators do; it may send less, since some weights wait for backward gathered."""
    for plain, ahead, agree in pools(2).run(gathered_ahead, saved_models("llama")):
        assert agree
        assert 0 < ahead <= plain


def refused(path: str, case: str) -> str:
    """What `shard` says to a DeepSpeed engine that it cannot work beside."""
    import deepspeed

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
    }
    adam = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
    join_deepspeed()
    model = whole(path)
    if case == "adapters partitioned":
        attach(model, LoraConfig(r=2))
        deepspeed.initialize(model=model, config=settings)
    elif case == "partitioned afterwards":
        attach(model, LoraConfig(r=2))
        shard(model, base="none")
        engine, *_ = deepspeed.initialize(model=model, config=settings | {"optimizer": adam})
        ids = torch.arange(12)[None]
        try:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
        except Exception as error:
            return f"{type(error).__name__}: shard: {error}"
    else:
        stage = {"stage": 2 if case == "optimizer section at stage 2" else 3}
        settings |= {"optimizer": adam, "zero_optimization": stage}
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        attach(model, LoraConfig(r=2))
        model = engine if case == "pass engine.module" else model
    try:
        shard(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("adapters partitioned", "lora_A is divided over ranks; attach after the base is sharded"),
        ("optimizer section", "this DeepSpeed engine has an optimizer section"),
        ("optimizer section at stage 2", "this DeepSpeed engine has an optimizer section"),
        ("partitioned afterwards", "the adapters were partitioned by a DeepSpeed engine that was"),
        ("pass engine.module", "this is a DeepSpeed engine, which"),
    ],
)
def test_an_engine_that_would_interfere_is_refused(
    saved_models: Any, tmp_path: Path, case: str, told: str
) -> None:
    pool = Pool(2, tmp_path)  # DeepSpeed's engines remember the process group of their first one
    results = pool.run(refused, saved_models("llama"), case)
    pool.close()
    for said in results:
        assert said.startswith("UsageError: shard: ") and told in said and "\n" not in said


def generated(path: str) -> tuple[Any, Any, Any, str]:
    """Greedy tokens of the model, of its base, and of an unsharded twin; what was printed."""
    twin, model, printed = whole(path), whole(path), io.StringIO()
    torch.manual_seed(0)
    attach(model, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    shard(model, engine="zero3", base="world")
    ids = torch.arange(5, 11).view(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        adapted = model.eval().generate(ids, **options)
        with disabled(model):
            base = model.generate(ids, **options)
    dist.barrier()
    return adapted, base, twin.generate(ids, **options), printed.getvalue()


def test_generation_through_gathers(pools: Pools, saved_models: Any) -> None:
    for adapted, base, wanted, printed in pools(2).run(generated, saved_models("llama")):
        assert torch.equal(base, wanted)
        assert not torch.equal(adapted, wanted)
        assert "warn" not in printed.lower()
