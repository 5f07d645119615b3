"""8-bit AdamW over a replica against bitsandbytes over plain tensors."""

from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from causal_models import causal_model, token_ids
from torch import nn

from dlora import LoraConfig, attach, shard
from dlora.config.load import OptimizerConfig
from dlora.optim.eight_bit import MAP_BYTES, adamw8bit, state_bytes
from dlora.plan.state import state_of
from dlora.sharding.topology import Topology

GROUPS = {"loraplus_lr_ratio": 4.0, "weight_decay": 0.1}


def replica_of_model() -> tuple[Any, Any]:
    """Adapters of which some tensors have 4096 elements and more."""
    model = causal_model("llama")
    config = LoraConfig(r=128, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    replica = shard(attach(model, config))
    sizes = [p.numel() for p in replica.named.values()]
    assert min(sizes) < 4096 < max(sizes) and any(n % 256 for n in sizes)
    return model, replica


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_is_bitsandbytes_on_plain_tensors_bit_for_bit(paged: bool) -> None:
    """The same gradients to both: views of a flat buffer, and tensors of their own."""
    model, replica = replica_of_model()
    groups = replica.parameter_groups(lr=1e-3, **GROUPS)
    optimizer = replica.attach_optimizer(adamw8bit(groups, paged=paged))
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in replica.named.items()}
    names = {id(p): name for name, p in replica.named.items()}
    groups = [
        {**group, "params": [twins[names[id(p)]] for p in group["params"]]}
        for group in replica.parameter_groups(lr=1e-3, **GROUPS)
    ]
    plain = (PagedAdamW8bit if paged else AdamW8bit)(groups)
    for step in range(6):
        ids = token_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        replica.reduce_gradients()
        replica.clip(1.0)
        for name, parameter in replica.named.items():
            twins[name].grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
        replica.zero_grad()
        for name, parameter in replica.named.items():
            assert torch.equal(parameter, twins[name]), name
    for name, parameter in replica.named.items():
        ours, theirs = optimizer.state[parameter], plain.state[twins[name]]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(theirs[slot]), ours[slot]) for slot in theirs)


def test_the_plan_counts_its_bytes() -> None:
    """Every storage once, and in all about a quarter of AdamW's."""
    _, replica = replica_of_model()
    optimizer = adamw8bit(replica.parameter_groups(lr=1e-3), paged=False)
    storages = {
        state.untyped_storage().data_ptr(): state.untyped_storage().nbytes()
        for slots in optimizer.state.values()
        for slot, state in slots.items()
        if slot != "step"
    }
    sizes = [p.numel() for p in replica.named.values()]
    assert sum(storages.values()) == sum(map(state_bytes, sizes)) + MAP_BYTES
    large = [n for n in sizes if n >= 4096]
    assert sum(map(state_bytes, large)) < 0.26 * 8 * sum(large)
    for name in ("adamw8bit", "paged_adamw8bit"):
        planned = state_of(OptimizerConfig(name=name), replica.named, Topology(0, 4, 2), False)
        assert planned.held == sum(storages.values())
