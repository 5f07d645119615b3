"""A model in PEFT and the same one in dlora: equal tensors by name, equal numbers."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from causal_models import randomize_trainable, relative_error
from peft_models import batch, model_of, output_of
from torch import Tensor, nn

from dlora import load_adapter
from dlora.adapters.peft_names import peft_names
from dlora.lora.attach import trainable_parameters
from dlora.lora.layers import CHILD

EXACT = 1e-11  # relative, in float64


def name_in_peft(key: str, inner: str = "") -> str:
    """A parameter's name in PEFT's model, by its key in PEFT's file.

    Args:
        inner: its name in the module that is trained whole, if it is in one; default: the last.
    """
    for factor in ("lora_A", "lora_B"):
        if key.endswith(f".{factor}.weight"):
            return f"{key.removesuffix('weight')}default.weight"
    if key.endswith(("lora_embedding_A", "lora_embedding_B")):
        return f"{key}.default"
    if key.endswith("lora_magnitude_vector"):
        return f"{key}.default.weight"
    path, name = key[: len(key) - len(inner) - 1], inner
    if not inner:
        path, _, name = key.rpartition(".")
    return f"{path}.modules_to_save.default.{name}"


def in_peft(name: str, settings: dict[str, Any]) -> Any:
    """A model of the table in PEFT, whose adapter starts as PEFT starts it and is then moved."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model_of(name), peft.LoraConfig(**copy.deepcopy(settings)))
    randomize_trainable(theirs)
    return theirs


def twins(
    name: str, settings: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Any]:
    """(dlora's model, PEFT's) with one adapter: PEFT saved it, and dlora loaded it.

    The base has the dtype; the adapters have it where it is float64, and float32 elsewhere.
    """
    theirs = in_peft(name, settings)
    theirs.save_pretrained(directory)
    if dtype != torch.float64:
        theirs = peft.PeftModel.from_pretrained(
            model_of(name).to(dtype), directory, is_trainable=True
        )
    ours = load_adapter(model_of(name).to(dtype), directory)
    return ours, theirs.to(dtype) if dtype == torch.float64 else theirs


def pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(ours, PEFT's) of all trained parameters, by dlora's names; PEFT trains no other."""
    keys, reference = peft_names(ours), dict(theirs.named_parameters())
    named = {n: name_in_peft(key, n.partition(f".{CHILD}.")[2]) for n, key in keys.items()}
    assert {n for n, p in reference.items() if p.requires_grad} == set(named.values())
    trained = trainable_parameters(ours)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained.keys()
    return {name: (p, reference[named[name]]) for name, p in trained.items()}


def check_same(one: Tensor | None, other: Tensor | None, tolerance: float, what: str) -> None:
    """Close in the norm of the second; where that has no gradient, the first has none or zeros."""
    if other is None or one is None:
        assert one is other or not (one if other is None else other).any(), what
        return
    assert relative_error(one, other.view_as(one)) < tolerance, what


def check_pass(ours: nn.Module, theirs: nn.Module, tolerance: float = EXACT) -> Tensor:
    """One forward and backward of both: output, gradients of what is trained and of the input."""
    dtype = next(ours.parameters()).dtype
    inputs = [batch(ours, dtype) for _ in "ab"]
    outputs = [output_of(model, x) for model, x in zip((ours, theirs), inputs, strict=True)]
    check_same(outputs[0], outputs[1], tolerance, "output")
    for y in outputs:
        y.to(torch.float64).sin().sum().backward()
    for name, (own, other) in pairs(ours, theirs).items():
        check_same(own.grad, other.grad, tolerance, name)
    check_same(inputs[0].grad, inputs[1].grad, tolerance, "gradient of the input")
    return outputs[0].detach()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all frozen parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def check_statistics(ours: nn.Module, theirs: nn.Module) -> None:
    """The same buffers of the base, such as running statistics."""
    reference = dict(theirs.named_buffers())
    for name, tensor in ours.named_buffers():
        if not f".{name}".count(f".{CHILD}."):
            check_same(tensor.double(), reference[f"base_model.model.{name}"].double(), EXACT, name)
