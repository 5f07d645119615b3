"""Residency: frozen weights that stay gathered change no number, and their gathers are not sent."""

from typing import Any

import pytest
import torch
from ranks import Pools
from run_training import same_bits
from sampling import full
from tiny import VOCABULARY, whole

from dlora import LoraConfig, attach, shard
from dlora.sharding.engines.gather_groups import frozen_groups
from dlora.sharding.engines.protocol import engine_class

STEPS, ACCUMULATION = 4, 2


def trained(path: str, engine: str, base: str, resident: float) -> dict[str, Any]:
    """Bytes that each step sent, the adapter, and what W0 and the reduction need."""
    model = whole(path)
    torch.manual_seed(0)
    attach(model, LoraConfig(r=2))
    replica = shard(model, engine=engine, base=base, resident=resident)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3))
    draw = torch.Generator().manual_seed(replica.topology.rank)
    sent = []
    for _ in range(STEPS):
        replica.wire.take()
        for _ in range(ACCUMULATION):
            ids = torch.randint(VOCABULARY, (2, 9), generator=draw)
            model(input_ids=ids, labels=ids).loss.backward()
        gathers = replica.wire.take()
        replica.reduce_gradients()
        replica.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(gathers)
    groups = frozen_groups(engine_class(replica.engine.placement).groups(model))
    return {
        "sent": sent,
        "adapter": {name: p.detach() for name, p in replica.named.items()},
        "once": sum(group.gathered_bytes(replica.engine.placement.shard_size) for group in groups),
    }


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize(
    ("world", "per_node", "base"),
    [
        (4, 2, "node"),
        full(2, 2, "world"),  # 2 s each: one node of the first
    ],
)
def test_what_is_resident_is_not_sent_again(
    pools: Pools, saved_models: Any, engine: str, world: int, per_node: int, base: str
) -> None:
    runs = {}
    for resident in (0.0, 0.5, 1.0):
        arguments = (saved_models("llama"), engine, base, resident)
        runs[resident] = pools(world).run(trained, *arguments, ranks_per_node=per_node)
    for rank in range(world):
        none, half, full = (runs[resident][rank] for resident in (0.0, 0.5, 1.0))
        assert same_bits(none["adapter"], half["adapter"])
        assert same_bits(none["adapter"], full["adapter"])
        if engine == "fsdp2":  # all of it crosses once; sent is (p − 1)/p of the whole, p = 2
            assert full["sent"][0] == none["once"] / 2
        # DeepSpeed frees what is held, too, until it has seen one step.
        assert full["sent"][2:] == [0] * (STEPS - 2)
        # Blocks come first, which are gathered twice per micro-batch, as many as fit in the half.
        saved = (none["sent"][-1] - half["sent"][-1]) / (2 * ACCUMULATION)
        assert 0.25 * none["once"] / 2 < saved <= 0.5 * none["once"] / 2
        assert half["sent"][-2] == half["sent"][-1]
