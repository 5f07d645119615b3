"""Masters of A and B in float32 beside a base of any dtype, and a base that nothing touches."""

import pytest
import torch
from causal_models import causal_model, token_ids

from dlora import LoraConfig, attach
from dlora.lora.attach import trainable_parameters

NAMES = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "wte", "lm_head"],
}
MASTERS = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize(("base", "master"), MASTERS.items(), ids=str)
def test_a_and_b_are_float32_or_the_base_s_float64(base: torch.dtype, master: torch.dtype) -> None:
    model = causal_model("llama", base)
    attach(model, LoraConfig(r=2, target_modules=NAMES["llama"], modules_to_save=["model.norm"]))
    assert {p.dtype for p in trainable_parameters(model).values()} == {master}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}
    assert model(token_ids()).logits.dtype == base


@pytest.mark.parametrize("kind", NAMES)
def test_small_steps_beside_a_bfloat16_base_move_every_tensor(kind: str) -> None:
    """At lr 2.5e-5 an A in bfloat16 would stay where it is: its values are 1,000 times the step."""
    model = causal_model(kind, torch.bfloat16)
    attach(model, LoraConfig(r=4, target_modules=NAMES[kind]))
    trained = trainable_parameters(model)
    start = {name: p.detach().clone() for name, p in trained.items()}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=2.5e-5, weight_decay=0.0, fused=True)
    for step in range(4):
        ids = token_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert len(trained) == 2 * len(model.dlora.adapted) > 0
    assert [name for name, p in trained.items() if torch.equal(p, start[name])] == []
    # In every A the elements move, not a few of them (of a table, the rows that occurred).
    projections = [n for n in trained if n.endswith("proj.adapter.lora_A")]
    moved = [(trained[n] != start[n]).float().mean() for n in projections]
    assert min(moved) > 0.9
    for name, p in model.named_parameters():
        if name in base:
            assert p.dtype == torch.bfloat16 and p.grad is None
            assert torch.equal(p, base[name]), name


def test_attaching_keeps_the_base_s_names_storage_and_bits() -> None:
    model = causal_model("tied", torch.bfloat16)
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    attach(model, LoraConfig(r=2, target_modules=NAMES["llama"], modules_to_save=["model.norm"]))
    after = {n: p for n, p in model.named_parameters() if n not in trainable_parameters(model)}
    assert after.keys() == before.keys()
    for name, (parameter, address, value) in before.items():
        assert after[name] is parameter and parameter.data_ptr() == address
        assert torch.equal(parameter, value) and not parameter.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
