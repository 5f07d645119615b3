"""LoRA+ groups: η for all, λη for B, weight decay for matrices."""

import pytest
import torch
from causal_models import causal_model, randomize_trainable, token_ids
from torch import nn

from dlora import LoraConfig, attach
from dlora.lora.attach import trainable_parameters
from dlora.optim.groups import parameter_groups

LR, RATIO, DECAY = 1e-3, 16.0, 0.1
# Name of a trainable parameter → (lr / η, weight decay), with λ = 16.
EXPECTED = {
    "model.embed_tokens.adapter.lora_A": (1, DECAY),
    "model.embed_tokens.adapter.lora_B": (RATIO, DECAY),
    "model.layers.0.self_attn.q_proj.adapter.lora_A": (1, DECAY),
    "model.layers.0.self_attn.q_proj.adapter.lora_B": (RATIO, DECAY),
    "model.layers.1.self_attn.q_proj.adapter.lora_A": (1, DECAY),
    "model.layers.1.self_attn.q_proj.adapter.lora_B": (RATIO, DECAY),
    "model.norm.adapter.weight": (1, 0.0),
    "lm_head.adapter.weight": (1, DECAY),
}


def model() -> nn.Module:
    made = attach(
        causal_model("llama"),
        LoraConfig(
            r=2,
            target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["model.norm", "lm_head"],
        ),
    )
    randomize_trainable(made)
    return made


def table(groups: list[dict], named: dict[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of each parameter; a parameter in two groups is an error."""
    names = {id(parameter): name for name, parameter in named.items()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        assert group["params"], "an empty group"
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group["lr"], group["weight_decay"])
            assert group["initial_lr"] == group["lr"]
    return found


@pytest.mark.parametrize("ratio", [1.0, RATIO])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_each_parameter_has_its_rate_and_decay(ratio: float, decay: float) -> None:
    named = trainable_parameters(model())
    groups = parameter_groups(named, lr=LR, loraplus_lr_ratio=ratio, weight_decay=decay)
    expected = {
        name: (LR * (ratio if factor == RATIO else 1), decay if decays else 0.0)
        for name, (factor, decays) in EXPECTED.items()
    }
    assert table(groups, named) == expected
    distinct = len(set(expected.values()))
    assert len(groups) == distinct  # no group more than there are rates


@pytest.mark.parametrize("only", ["lora_A", "lora_B", "weight"])
def test_no_group_is_empty(only: str) -> None:
    """An optimizer refuses or, worse, skips an empty group.

    promise 4.5: no group is empty.
    """
    named = {n: p for n, p in trainable_parameters(model()).items() if n.endswith(only)}
    groups = parameter_groups(named, lr=LR, loraplus_lr_ratio=RATIO, weight_decay=DECAY)
    assert table(groups, named).keys() == named.keys()


def trained_for(steps: int, optimizer: type, grouped: bool, **settings: float) -> dict:
    made = model()
    named = trainable_parameters(made)
    groups = parameter_groups(named, lr=LR, **settings) if grouped else list(named.values())
    options = {} if grouped else {"lr": LR, "weight_decay": settings.get("weight_decay", 0.0)}
    chosen = optimizer(groups, **options)
    for step in range(steps):
        ids = token_ids(seed=step)
        made(ids, labels=ids).loss.backward()
        chosen.step()
        chosen.zero_grad()
    return {name: parameter.detach() for name, parameter in named.items()}


def test_ratio_one_is_plain_adamw_bit_for_bit() -> None:
    grouped = trained_for(5, torch.optim.AdamW, grouped=True, loraplus_lr_ratio=1.0)
    plain = trained_for(5, torch.optim.AdamW, grouped=False)
    assert all(torch.equal(grouped[name], plain[name]) for name in plain)


def test_one_sgd_step_moves_b_by_the_ratio_and_a_as_before() -> None:
    """ΔB(λ) = λ·ΔB(1), ΔA and the rest equal: exactly, since λ is a power of two."""
    steps = {}
    for ratio in (1.0, RATIO):
        made = model()
        named = trainable_parameters(made)
        made(token_ids(), labels=token_ids()).loss.backward()
        with torch.no_grad():
            for parameter in named.values():
                parameter.zero_()  # what is left after the step is the step
        torch.optim.SGD(parameter_groups(named, lr=LR, loraplus_lr_ratio=ratio)).step()
        steps[ratio] = named
    for name, step in steps[1.0].items():
        factor = RATIO if name.endswith("lora_B") else 1.0
        assert step.any() and torch.equal(steps[RATIO][name], factor * step), name
