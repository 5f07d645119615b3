"""PEFT's names of an attached model's tensors, and their shapes in its file.

    LORA      base_model.model.<path>.lora_{A,B}.weight     the plain form of any adapter
              base_model.model.<path>.lora_magnitude_vector beside them in a DoRA
    ADALORA   base_model.model.<path>.lora_{A,B,E}          AdaLoRA's own form

Embeddings have `lora_embedding_A` without `.weight`, and modules trained whole have their own
names. An adapted parameter has its adapter at the path of its module; PEFT wraps the module once
for each of them, so there is a `.base_layer` in the path for every later one (`wrapped`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dlora.lora.attach import attachment_of, named_adapters, named_copies, trainable_parameters
from dlora.lora.layers import AdaptedConvolution, AdaptedLayer
from dlora.lora.variants import LoraAdapter
from dlora.lora.variants.dora import DoraAdapter

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"


def peft_names(model: nn.Module) -> dict[str, str]:
    """PEFT's key of each trainable parameter of a LoRA or DoRA, by its name in the model."""
    names: dict[str, str] = {}
    for path, layer, adapter in named_adapters(model):
        for factor, key in keys_of(model, path, layer, adapter).items():
            names[f"{adapter.place}.{factor}"] = key
    return names | copy_names(model)


def peft_slots(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model with a LoRA or DoRA by PEFT's keys; not copies."""
    parameters = trainable_parameters(model)
    slots = {key: parameters[name].detach() for name, key in peft_names(model).items()}
    for path, layer, adapter in named_adapters(model):
        for factor, key in keys_of(model, path, layer, adapter).items():
            slots[key] = shaped(layer, factor, slots[key])
    return slots


def keys_of(
    model: nn.Module, path: str, layer: AdaptedLayer, adapter: LoraAdapter
) -> dict[str, str]:
    """PEFT's keys of the factors of a LoRA and of DoRA's magnitudes, by their names here."""
    key = "lora_embedding_{}" if layer.is_embedding else "lora_{}.weight"
    place = PREFIX + wrapped(attachment_of(model).parameters, path)
    keys = {f"lora_{factor}": f"{place}.{key.format(factor)}" for factor in "AB"}
    if isinstance(adapter, DoraAdapter):
        keys[MAGNITUDE] = f"{place}.{MAGNITUDE}"
    return keys


def wrapped(parameters: Sequence[str], path: str) -> str:
    """The path of an adapter in PEFT's model, where a module is wrapped for each of its adapted
    parameters: the last of them is outermost, and what is inside the module is inside all.

    Args:
        parameters: paths of all adapted parameters, in the model's order.
        path: of an adapted module or parameter.
    """
    module = path.rpartition(".")[0] if path in parameters else path
    names, place = module.split("."), []
    for end, name in enumerate(names, start=1):
        here = ".".join(names[:end])
        own = [each for each in parameters if each.rpartition(".")[0] == here]
        inside = own.index(path) + 1 if path in own else 0
        place += [name, *["base_layer"] * (len(own) - inside)]
    return ".".join(place)


def shaped(layer: AdaptedLayer, factor: str, tensor: Tensor) -> Tensor:
    """A tensor as PEFT stores it: of a convolution A is a kernel, B one of size 1, and a magnitude
    broadcasts against the output.
    """
    if not isinstance(layer, AdaptedConvolution):
        return tensor
    if factor == "lora_A":
        return layer.as_stored(layer, tensor)
    places = [1 for _ in layer.kernel(layer)]
    if factor == MAGNITUDE:
        return tensor.reshape(1, -1, *places)
    return tensor.reshape(*tensor.shape, *places)


def copy_names(model: nn.Module) -> dict[str, str]:
    """PEFT's key of each parameter of a module that is trained whole, by its name in the model."""
    return {
        f"{copy.place}.{name}": f"{PREFIX}{path}.{name}"
        for path, _, copy in named_copies(model)
        for name, _ in copy.named_parameters()
    }
