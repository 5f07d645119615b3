"""The life cycle of an adapter: which state may follow which, and what is refused in one line."""

import pytest
import torch
from refusals import refusal
from torch import nn

from dlora import LoraConfig, UsageError, attach, disabled, merge, shard, unmerge
from dlora.lora.states import AdapterState, Stateful

U, ON, OFF, MERGED, EMPTY = AdapterState
ALLOWED = {
    *[(U, ON), (U, OFF), (ON, OFF), (ON, MERGED), (ON, EMPTY)],
    *[(OFF, U), (OFF, ON), (OFF, EMPTY), (MERGED, ON)],
}


@pytest.mark.parametrize("now", AdapterState, ids=lambda state: state.name)
@pytest.mark.parametrize("then", AdapterState, ids=lambda state: state.name)
def test_a_state_follows_where_the_table_says(now: AdapterState, then: AdapterState) -> None:
    child = Stateful()
    child.state = now
    if (now, then) in ALLOWED:
        child.become(then)
        assert child.state is then
        return
    assert f"the adapter {now.value}, so it cannot" in refusal(child.become, then)
    assert child.state is now


def waiting() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    return attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga"))


def test_adapters_that_wait_for_gradients_compute_and_are_neither_merged_nor_stepped() -> None:
    model, x = waiting(), torch.randn(3, 8)
    adapter = model[0].adapter
    assert adapter.state is U and adapter.active
    with disabled(model):
        assert adapter.state is OFF
    assert adapter.state is U
    with pytest.raises(UsageError, match=r"merge: the adapter of 0 waits for dlora.start_from"):
        merge(model)
    model(x).sum().backward()
    with pytest.raises(UsageError, match="start_from_gradients.* before the first step"):
        shard(model).reduce_gradients()


def test_a_model_is_not_merged_while_it_is_disabled() -> None:
    model = attach(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    before = model[0].weight
    with disabled(model):
        assert "merge: the adapter of 0 is switched off" in refusal(merge, model)
    assert model[0].weight is before and model[0].adapter.state is ON
    unmerge(merge(model))
    assert model[0].adapter.state is ON
