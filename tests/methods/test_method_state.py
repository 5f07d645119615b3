"""A method with a state in one file: what its replica calls, and what a checkpoint has of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from dlora import LoraConfig, UsageError, attach, shard
from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.writing import write
from dlora.lora.method_state import MethodState, PlannedState
from dlora.lora.variants import VARIANTS, LoraAdapter
from dlora.methods.trained_replica import TrainedReplica
from dlora.plan.method import MethodPlan, method_plan


class Counting(MethodState):
    """Adds 1 to gradients, and counts the steps in a tensor beside each parameter."""

    def __init__(self, model: nn.Module, replica: TrainedReplica) -> None:
        self.replica, self.calls = replica, list[Any]()
        self.counts = {name: torch.zeros_like(p.data) for name, p in replica.named.items()}

    def before_reduce(self, tokens: int) -> None:
        self.calls.append(tokens)
        for name in self.replica.named:
            self.replica.gradient(name).add_(tokens)

    def after_step(self, optimizer: torch.optim.Optimizer, *, skipped: bool = False) -> None:
        self.calls.append("skipped" if skipped else "step")
        for count in self.counts.values():
            count += 1

    def tensors(self) -> dict[str, Any]:
        return {"counts": {name: {"steps": count} for name, count in self.counts.items()}}

    def record(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_record(self, step: int, record: Any) -> None:
        self.calls = [step] * record["calls"]

    def load_tensors(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for key, value in tensors:
            self.counts[key.removesuffix(".steps")].copy_(value)


@dataclass(frozen=True)
class CountingConfig(LoraConfig):
    method: ClassVar[str] = "counting"


class CountingAdapter(LoraAdapter):
    settings = CountingConfig
    state_class = Counting

    def planned_state(self, config: Any) -> PlannedState:
        return PlannedState({"lora_A": 1, "lora_B": 1}, summed=3)


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> TrainedReplica:
    monkeypatch.setitem(VARIANTS, "counting", CountingAdapter)
    return started(CountingConfig(r=2, target_modules=["0"]))


def started(config: LoraConfig) -> TrainedReplica:
    return shard(attach(nn.Sequential(nn.Linear(3, 4)), config))


def test_a_loop_calls_it_and_a_checkpoint_has_it(replica: TrainedReplica, tmp_path: Path) -> None:
    model, state = replica._model, replica.method
    assert isinstance(state, Counting)
    optimizer = torch.optim.SGD(replica.parameter_groups(lr=0.1))
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    model(torch.ones(1, 3)).sum().backward()
    replica.reduce_gradients(tokens=2)
    assert torch.equal(model[0].adapter.lora_A.grad, torch.ones(2, 3))  # B is 0, and so was it
    optimizer.step()
    other.step()
    replica.skip_step(optimizer)
    assert state.calls == [2, "step", "skipped"]
    content = capture(replica, replica.states(optimizer), {"step": 1}, state.record())
    assert content is not None
    directory = write(content, tmp_path, "{}", 1)
    assert (directory / "counts.safetensors").exists()
    found = checkpoints.read(directory)
    assert checkpoints.method_record(directory) == found.record == {"calls": 3}

    again = started(CountingConfig(r=2, target_modules=["0"]))
    again.method.load_record(1, found.record)
    again.method.load_tensors("counts", found.states["counts"].items())
    assert again.method.record() == {"calls": 3}
    counts = again.method.tensors()["counts"]
    assert all(torch.equal(c["steps"], torch.full_like(c["steps"], 2)) for c in counts.values())


def test_the_plan_counts_what_it_says(replica: TrainedReplica) -> None:
    planned = method_plan(replica._model)
    assert planned.summed == 3
    assert [list(named) for named in planned.copies] == [list(replica.named)]


def test_a_method_without_a_state_needs_none() -> None:
    replica = started(LoraConfig(r=2, target_modules=["0"]))
    state = replica.method
    assert type(state) is MethodState
    assert state.record() is None and not (state.tensors() or state.metrics() or state.progress())
    assert method_plan(replica._model) == MethodPlan()
    LoraAdapter.check_record(None, ())
    with pytest.raises(UsageError, match="^method: lora has no state, but"):
        LoraAdapter.check_record({"calls": 3}, ())
