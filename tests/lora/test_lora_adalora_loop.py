"""AdaLoRA in a loop of one's own, with nothing to call: budgets, revival, and the shrinking."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from adalora_nets import Ours, adapted, data, kept_of, mse, net, orthogonality, randomize
from causal_models import relative_error
from refusals import refusal
from torch import nn

from dlora import AdaLoraConfig, LoraConfig, attach, shard
from dlora.lora.adalora import importance
from dlora.lora.attach import named_adapters
from dlora.lora.method_state import MethodState
from dlora.sharding.replica.optimizer_state import ReplicaError

PHASES = {"total_step": 30, "tinit": 4, "tfinal": 8, "deltaT": 3}


@pytest.mark.parametrize("kind", ["uncertainty", "sensitivity", "magnitude"])
def test_the_kept_count_is_the_budget_after_every_mask(kind: str) -> None:
    run = Ours.start(adapted(importance=kind, **PHASES))
    allocator = run.replica.method
    schedule = allocator.schedule
    assert (schedule.initial, schedule.final) == (18, 9)
    for t in range(1, 31):
        run.step(mse(run.model, t))
        assert allocator.step == t
        if schedule.masks(t):
            assert (
                sum(allocator.ranks.values())
                == schedule.budget(t)
                == sum(int(values.count_nonzero()) for values in run.values().values())
            )
        figures = allocator.metrics()
        assert figures["kept_ranks"] == sum(allocator.ranks.values())
        assert figures["budget"] == schedule.budget(t)
        assert math.isfinite(figures["orth_loss"])
    assert sorted(allocator.masks) == [6, 9, 12, 15, 18, 21, 22]
    assert allocator.masks[22] == allocator.ranks == {p: len(v) for p, v in run.values().items()}


def by_hand(values: dict[str, list[float]], **settings: Any) -> Ours:
    """λ as given, an optimizer that moves nothing, and a mask after the first step."""
    model = adapted(init_r=4, target_r=2, total_step=1, **settings)
    for path, _, adapter in named_adapters(model):
        adapter.lora_E.data.copy_(torch.tensor(values[path])[:, None])
    run = Ours.start(model, lr=0.0)
    run.step(mse(model, 1))
    return run


def test_magnitude_keeps_the_largest_singular_values_of_either_sign() -> None:
    values = {"l1": [0.1, -5.0, 3.0, -0.2], "l2": [4.0, 0.3, -0.4, 0.0], "l3": [-1, 1, 1, 2.0]}
    run = by_hand(values, importance="magnitude")
    assert kept_of(run) == {"l1": [1, 2], "l2": [0], "l3": [0, 1, 3]}  # of equal ones the first
    assert {p: v.tolist() for p, v in run.values().items()} == {
        "l1": [-5.0, 3.0],
        "l2": [4.0],
        "l3": [-1.0, 1.0, 2.0],
    }
    assert run.replica.method.tensors()["scorer"] == {}


def test_sensitivity_is_that_of_the_last_step() -> None:
    run = Ours.start(adapted(importance="sensitivity", **PHASES))
    for t in range(1, 6):
        mse(run.model, t).backward()
        run.replica.reduce_gradients()
        gradients = {name: p.grad.clone() for name, p in run.replica.named.items()}
        run.optimizer.step()
        averages = run.replica.method.tensors()["scorer"]
        for name, p in run.replica.named.items():
            assert torch.equal(averages[name]["exp_avg_ipt"], (p * gradients[name]).abs())
            assert averages[name].keys() == set(importance.IMPORTANCES["sensitivity"])
        run.optimizer.zero_grad()


def test_params_are_never_overspent_and_nothing_left_out_would_fit() -> None:
    run = Ours.start(adapted(budget_unit="params", **PHASES))
    allocator, costs = run.replica.method, {"l1": 49, "l2": 57, "l3": 33}  # m + n + 1
    assert allocator.schedule.initial == 6 * sum(costs.values())
    assert allocator.schedule.final == 3 * sum(costs.values())
    for t in range(1, 31):
        run.step(mse(run.model, t))
        spent = sum(costs[path] * rank for path, rank in allocator.ranks.items())
        assert allocator.metrics()["kept_params"] == spent
        if allocator.schedule.masks(t):
            left = allocator.schedule.budget(t) - spent
            assert 0 <= left < min(costs[p] for p, rank in allocator.ranks.items() if rank < 6)


def test_wide_matrices_pay_what_they_cost() -> None:
    values = {"l1": [4.0, 4, 4, 4], "l2": [5.0, 5, 5, 5], "l3": [3.0, 3, 3, 3]}
    kept = {
        unit: by_hand(values, importance="magnitude", budget_unit=unit).replica.method.ranks
        for unit in ("triplets", "params")
    }
    assert kept["triplets"] == {"l1": 2, "l2": 4, "l3": 0}  # 326 parameters
    assert kept["params"] == {"l1": 1, "l2": 4, "l3": 0}  # 277 of 278: 50 would not fit


@pytest.mark.parametrize("deltaT", [1, 4])
def test_a_pruned_triplet_comes_back_when_it_matters(deltaT: int) -> None:
    """Its own λ brings it back: w after the step times g is not 0 though w before it was."""
    settings = {"total_step": 32, "deltaT": deltaT, "orth_reg_weight": 0.0}
    run = Ours.start(adapted(init_r=4, target_r=2, target_modules=["l1"], **settings))
    E, history = run.replica.named["l1.adapter.lora_E"], []
    for t in range(1, 33):
        weights = torch.tensor([1.0, 0.9, 0.8, 0.001 if t <= 12 else 1000.0])
        run.step((E.view(-1) * weights).sum())
        history.append(kept_of(run)["l1"])
    assert history[11] == [0, 1]
    assert 3 in history[19] and len(history[19]) == 2
    assert 3 in history[-1]


# -- the regulariser in the loop ------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_regulariser_counts_once_whatever_the_accumulation(pieces: int) -> None:
    """Losses summed over targets, `tokens` their number: the gradient is that of mean + γR."""
    settings = {"orth_reg_weight": 0.7, **PHASES}
    run = Ours.start(randomize(adapted(net(torch.float64), **settings), std=0.2))
    x, y = data(0, torch.float64)
    for rows in torch.arange(16).split([16] if pieces == 1 else [5, 1, 8, 2]):
        (run.model(x[rows]) - y[rows]).square().sum().backward()
    run.replica.reduce_gradients(tokens=16)
    found = {name: p.grad.clone() for name, p in run.replica.named.items()}
    reference = randomize(adapted(net(torch.float64), **settings), std=0.2)
    factors = [(adapter.lora_A, adapter.lora_B) for _, _, adapter in named_adapters(reference)]
    regulariser = 0.7 * orthogonality(factors)
    ((reference(x) - y).square().sum() / 16 + regulariser).backward()
    assert relative_error(run.replica.method.orth_loss, regulariser) < 1e-12
    for name, gradient in found.items():
        assert relative_error(gradient, reference.get_parameter(name).grad) < 1e-11, name
    run.optimizer.step()
    for name, averages in run.replica.method.tensors()["scorer"].items():  # and scored once
        product = (run.replica.named[name] * found[name]).abs()
        assert relative_error(averages["exp_avg_ipt"], 0.15 * product) < 1e-12


def test_orthonormal_and_empty_factors_give_no_nan() -> None:
    values = {"l1": [4.0, 4, 4, 4], "l2": [5.0, 5, 5, 5], "l3": [0.0, 0, 0, 0]}
    run = by_hand(values, importance="magnitude", orth_reg_weight=0.5)
    assert run.replica.method.ranks == {"l1": 2, "l2": 4, "l3": 0}
    with torch.no_grad():
        for _, _, adapter in named_adapters(run.model):
            nn.init.eye_(adapter.lora_A)
            nn.init.eye_(adapter.lora_B)
    run.optimizer.param_groups[0]["lr"] = 1e-2
    for t in range(3):
        run.step(mse(run.model, t))
        assert math.isfinite(run.replica.method.metrics()["orth_loss"])
        assert run.replica.values.isfinite().all()
        assert (run.replica.method.orth_loss == 0) == (t == 0)


# -- what a loop must and must not do -------------------------------------------------------------


def test_a_plain_loop_needs_no_further_call() -> None:
    """attach, shard, an optimizer: any torch optimizer, adapters attached before or after."""
    model = shard_first = net()
    replica = shard(shard_first)
    torch.manual_seed(0)
    attach(model, AdaLoraConfig(init_r=4, target_r=2, total_step=8, tfinal=2))
    optimizer = torch.optim.SGD(replica.parameter_groups(lr=0.1), momentum=0.9)
    for t in range(8):
        mse(model, t).backward()
        replica.reduce_gradients()
        replica.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert sum(adapter.r for _, _, adapter in named_adapters(model)) == 2 * len(
        list(named_adapters(model))
    )


@pytest.mark.parametrize("attached_first", [True, False])
def test_a_missing_total_step_is_one_line(attached_first: bool) -> None:
    config = AdaLoraConfig(init_r=4, target_r=2)
    model = net()
    if attached_first:
        said = refusal(shard, attach(model, config))
    else:
        shard(model)
        said = refusal(attach, model, config)
    assert said.startswith("total_step: ")


def test_an_optimizer_that_is_not_seen_is_an_error() -> None:
    """One that is no torch optimizer, say, by which nothing would ever be pruned."""
    model = adapted(**PHASES)
    replica = shard(model)
    with pytest.raises(ReplicaError, match="without an optimizer step on the adapters"):
        for t in range(3):
            mse(model, t).backward()
            replica.reduce_gradients()
            with torch.no_grad():
                for p in replica.named.values():
                    p.sub_(p.grad, alpha=1e-2)
            replica.zero_grad()


def test_steps_of_other_optimizers_do_not_count() -> None:
    run, other = Ours.start(adapted(**PHASES)), Ours.start(adapted(**PHASES))
    plain = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for t in range(1, 4):
        run.step(mse(run.model, t))
        plain(torch.ones(2)).sum().backward()
        optimizer.step()
    assert (run.replica.method.step, other.replica.method.step) == (3, 0)
    lora = net()
    attach(lora, LoraConfig(r=2))
    assert type(shard(lora).method) is MethodState


def test_optimizers_hold_no_allocator_alive() -> None:
    run = Ours.start(adapted(**PHASES))
    alive = weakref.ref(run.replica.method)
    run.step(mse(run.model, 1))
    run.replica.method = MethodState()
    gc.collect()
    assert alive() is None
    run.step(mse(run.model, 2))
