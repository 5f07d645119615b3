"""AdaLoRA step by step beside PEFT's, through all three phases, wherever PEFT is right."""

import copy
from typing import Any

import peft
import pytest
import torch
from adalora_nets import LAYERS, Ours, adapted, mse, net, peft_adalora, peft_layers, regulariser
from causal_models import causal_model, quiet_peft, relative_error, token_ids
from torch import Tensor, nn

from dlora import shard

pytestmark = quiet_peft
STEPS = 60
# PEFT's last mask falls after step T − tfinal, whatever deltaT is; dlora's too.
SCHEDULES = {
    "three phases": {"tinit": 8, "tfinal": 15, "deltaT": 1},
    "every third": {"tinit": 8, "tfinal": 15, "deltaT": 3},
    "every seventh": {"tinit": 5, "tfinal": 20, "deltaT": 7},
    "from the start": {"tinit": 0, "tfinal": 10, "deltaT": 2},
    "to the end": {"tinit": 10, "tfinal": 0, "deltaT": 1},
}


class Beside:
    """dlora and PEFT, making the same steps."""

    def __init__(self, base: nn.Module, ours: nn.Module, eps: float) -> None:
        options = {"eps": eps, "weight_decay": 0.0}
        self.ours = Ours.start(ours, **options)
        self.theirs = peft_adalora(base, ours)
        self.layers = peft_layers(self.theirs, ours)
        # Without `ranknum`, which divides the scale: see the test of that below.
        trained = [p for name, p in self.theirs.named_parameters() if ".lora_" in name]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, **options)
        self.allocator = self.ours.replica.method
        self.gamma = ours.dlora.config.orth_reg_weight
        self.kept: dict[str, Tensor] | None = None

    def step(self, t: int, losses: list[Tensor]) -> None:
        """Of this step's losses (dlora's, PEFT's) without the regulariser."""
        ours, theirs = losses
        regularised = self.gamma * regulariser(self.layers, self.kept)
        self.ours.step(ours)
        assert relative_error(self.allocator.orth_loss, regularised) < 1e-4
        (theirs + regularised).backward()
        self.optimizer.step()
        self.theirs.base_model.update_and_allocate(t)
        self.optimizer.zero_grad()
        if self.allocator.is_shrunk and self.kept is None:
            left = self.allocator.record()["kept"]
            self.kept = {path: torch.tensor(left[path], dtype=torch.int64) for path in left}

    def check(self, t: int, tolerance: float) -> None:
        """Averages, masks and weights after step t."""
        self.check_averages(tolerance)
        pattern = self.theirs.peft_config["default"].rank_pattern
        for path, layer in self.layers.items():
            if self.allocator.masks:
                mask = pattern[f"{path}.lora_E.default"]
                left = self.allocator.record()["kept"][path]
                assert [i for i, kept in enumerate(mask) if kept] == left, (t, path)
            adapter = self.ours.model.get_submodule(path).adapter
            for name, own in adapter.named_parameters():
                reference = getattr(layer, name)["default"]
                if self.kept is not None:
                    reference = reference.index_select(int(name == "lora_B"), self.kept[path])
                assert relative_error(own, reference) < tolerance, (t, path, name)

    def check_averages(self, tolerance: float) -> None:
        reference = self.theirs.base_model.rankallocator
        for name, averages in self.allocator.tensors()["scorer"].items():
            path, _, factor = name.partition(".adapter.")
            key = f"{path}.{factor}.default"
            for kind, own in averages.items():
                assert relative_error(own, getattr(reference, kind)[key]) < tolerance, (name, kind)
        # PEFT forgets its averages with the last mask, dlora with the shrinking there.
        assert bool(self.allocator.tensors()["scorer"]) == bool(reference.exp_avg_ipt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sixty_steps_equal_peft(schedule: str, dtype: torch.dtype) -> None:
    """Scores, masks and weights. In float64 the two stay within 1e-9 of each other.

    The optimizer's ε keeps the rounding noise of gradients that are 0 (those of P and Q while λ is)
    from becoming whole steps.
    """
    settings: dict[str, Any] = {"total_step": STEPS, "orth_reg_weight": 0.3, **SCHEDULES[schedule]}
    base = net(dtype)
    pair = Beside(base, adapted(copy.deepcopy(base), **settings), eps=1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for t in range(1, STEPS + 1):
        losses = [mse(model, t, dtype) for model in (pair.ours.model, pair.theirs)]
        assert relative_error(*losses) < tolerance
        pair.step(t, losses)
        pair.check(t, tolerance)
    ranks = list(pair.allocator.ranks.values())
    assert sum(ranks) == 9 and len(set(ranks)) > 1  # it does choose


def test_a_llama_equals_peft() -> None:
    """PEFT's own loss, which has the regulariser in it, until the last mask; logits at the end."""
    settings = {"total_step": 24, "tinit": 3, "tfinal": 6, "deltaT": 2, "orth_reg_weight": 0.1}
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    base = causal_model("llama", torch.float64)
    ours = adapted(copy.deepcopy(base), init_r=4, target_r=2, target_modules=targets, **settings)
    pair = Beside(base, ours, eps=1e-3)
    for t in range(1, 25):
        ids = token_ids(rows=3, tokens=12, seed=t)
        own, inner = (m(ids, labels=ids) for m in (ours, pair.theirs.base_model.model))
        assert relative_error(own.logits, inner.logits) < 1e-9
        if pair.kept is None:
            whole = pair.theirs.base_model(ids, labels=ids).loss
            expected = inner.loss + pair.gamma * regulariser(pair.layers)
            assert relative_error(whole, expected) < 1e-6
        pair.step(t, [own.loss, inner.loss])
        pair.check(t, 1e-9)
    assert sum(pair.allocator.ranks.values()) == 2 * len(pair.layers)


# -- where PEFT is wrong --------------------------------------------------------------------------


def trained_by_peft(theirs: peft.PeftModel, steps: int, first: int = 1) -> None:
    """PEFT's documented loop; without the regulariser."""
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for t in range(first, steps + 1):
        mse(theirs, t).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        optimizer.zero_grad()


def test_equal_budgets_crash_peft_and_prune_nothing_here() -> None:
    settings = {"init_r": 4, "target_r": 4, "total_step": 6, "tinit": 1, "tfinal": 2}
    model = adapted(**settings)
    theirs = peft_adalora(net(), model)
    with pytest.raises((RuntimeError, IndexError), match="kthvalue|selected"):
        trained_by_peft(theirs, 6)
    ours = Ours.start(model)
    for t in range(1, 7):
        ours.step(mse(model, t))
        assert set(ours.replica.method.ranks.values()) == {4}
    assert all(values.all() and len(values) == 4 for values in ours.values().values())


def test_ties_prune_too_much_in_peft_and_the_budget_here() -> None:
    """All scores are equal where no gradient has come by: λ = 0 and no loss."""
    settings = {"total_step": 4, "tfinal": 1, "orth_reg_weight": 0.0}
    model = adapted(**settings)
    theirs = peft_adalora(net(), model)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for t in range(1, 4):
        theirs.base_model.update_and_allocate(t)
    pattern = theirs.peft_config["default"].rank_pattern
    assert sum(sum(mask) for mask in pattern.values()) == 0  # of a budget of 9
    ours = Ours.start(model)
    for _ in range(3):
        ours.step(sum(p.sum() for p in ours.replica.named.values()) * 0)
    assert ours.replica.method.ranks == {"l1": 6, "l2": 3, "l3": 0}


def test_without_a_final_phase_peft_s_model_is_not_what_it_saves() -> None:
    """tfinal = 0 and steps from 0, as its documentation's loop has them: the end is never reached,
    and between masks λ grow again that the saved file lacks."""
    settings = {"total_step": 22, "tfinal": 0, "deltaT": 4, "orth_reg_weight": 0.0}
    model = adapted(**settings)
    theirs = peft_adalora(net(), model)
    trained_by_peft(theirs, 21, first=0)  # 22 steps: 0 … 21
    pattern = theirs.peft_config["default"].rank_pattern
    alive = sum(
        int(layer.lora_E["default"].count_nonzero())
        for layer in peft_layers(theirs, model).values()
    )
    assert alive > sum(sum(mask) for mask in pattern.values())
    ours = Ours.start(model)
    for t in range(22):
        ours.step(mse(model, t))
    values = ours.values()
    assert sum(map(len, values.values())) == 9 == sum(ours.replica.method.ranks.values())
    x = torch.randn(5, 16)
    trained = model(x)
    assert torch.equal(model.eval()(x), trained)  # nothing is left that is not counted


def test_a_layer_without_a_gradient_crashes_peft_and_keeps_its_averages_here() -> None:
    settings = {"total_step": 10, "tinit": 8, "orth_reg_weight": 0.0}
    model = adapted(**settings)
    theirs = peft_adalora(net(), model)

    def skipping(model: nn.Module, t: int) -> Tensor:
        """l1 takes no part in every other step."""
        if t % 2:
            return mse(model, t)
        inner = model.base_model.model if model is theirs else model
        generator = torch.Generator().manual_seed(t)
        return inner.l3(torch.tanh(inner.l2(torch.randn(4, 32, generator=generator)))).mean()

    skipping(theirs, 2).backward()
    with pytest.raises(TypeError):
        theirs.base_model.update_and_allocate(2)
    ours = Ours.start(model)
    before: dict[str, Tensor] = {}
    for t in range(1, 7):
        ours.step(skipping(model, t))
        found = ours.replica.method.tensors()["scorer"]["l1.adapter.lora_A"]
        now = {name: average.clone() for name, average in found.items()}
        assert (t % 2 == 0) == (t > 1 and all(torch.equal(now[n], before[n]) for n in now)), t
        before = now


def test_a_resume_forgets_the_averages_in_peft_and_goes_on_here() -> None:
    settings = {"total_step": 30, "tinit": 4, "tfinal": 5, "deltaT": 5, "orth_reg_weight": 0.2}
    model = adapted(**settings)
    state = peft.get_peft_model_state_dict(peft_adalora(net(), model))
    assert not any("exp_avg" in key or "ipt" in key for key in state)
    assert not peft_adalora(net(), model).base_model.rankallocator.exp_avg_ipt

    ours = Ours.start(model)
    for t in range(1, 13):
        ours.step(mse(model, t))
    again = Ours.start(adapted(**settings))
    allocator = again.replica.method
    allocator.load_record(12, ours.replica.method.record())
    averages = {
        f"{name}.{kind}": value.clone()
        for name, kinds in ours.replica.method.tensors()["scorer"].items()
        for kind, value in kinds.items()
    }
    allocator.load_tensors("scorer", averages.items())
    with torch.no_grad():
        for name, parameter in again.replica.named.items():
            parameter.copy_(ours.replica.named[name])
    again.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for t in range(13, 31):
        for run in (ours, again):
            run.step(mse(run.model, t))
    assert allocator.masks == {t: m for t, m in ours.replica.method.masks.items() if t > 12}
    assert sorted(allocator.masks) == [15, 20, 25]
    for name, parameter in again.replica.named.items():
        assert torch.equal(parameter, ours.replica.named[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_scale_is_trained_in_peft_and_constant_here(dtype: torch.dtype) -> None:
    """Beside a base that is not float32 PEFT's divisor `ranknum` becomes trainable."""
    model = adapted(net(dtype), total_step=10)
    theirs = peft_adalora(net(dtype), model)
    trainable = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{path}.ranknum.default" for path in LAYERS} < trainable
    names = {name.rpartition(".")[2] for name in shard(model).named}
    assert names == {"lora_A", "lora_B", "lora_E"}
    assert model.l1.adapter.scaling == 12 / 6
