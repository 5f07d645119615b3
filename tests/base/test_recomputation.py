"""Recomputed blocks give the class's own loss and gradients, whatever the class does beside."""

from inspect import signature
from typing import Any

import pytest
import torch
import transformers
from models.architectures import Architecture

from dlora.base.recomputation import recompute_blocks

CLASSES = {
    "git": "adds to its embeddings in place",
    "blt": "likewise, of bytes",
    "xlm": "names its cache otherwise",
}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(60, 84)[None]
    without = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    model(input_ids=ids, **without).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CLASSES)
def test_recomputation_changes_no_gradient(kind: str) -> None:
    made = Architecture(kind, "", "AutoModelForCausalLM")
    found = []
    for every in (0, 1):
        model = made._made(transformers.CONFIG_MAPPING[kind])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name, parameter in model.named_parameters():  # as with a frozen base
            parameter.requires_grad_("q_" in name or "query" in name)
        recompute_blocks(model, every)
        found.append(gradients(model.train()))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
