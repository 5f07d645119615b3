"""`attach`: put adapters on a model in place, freeze the rest, and reach them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.attachment import Attachment
from dlora.lora.config import LoraConfig
from dlora.lora.foreign import check_no_adapters
from dlora.lora.layers import (
    CHILD,
    AdaptedLayer,
    ModulesToSaveCopy,
    ModulesToSaveLayer,
    adapt_,
)
from dlora.lora.left import what_is_left
from dlora.lora.make_adapters import (
    adapt_parameter,
    attach_adapter,
    check_free,
    check_start,
    check_whole,
    forbid_fused_inference,
    kernel_of,
    master_dtype,
)
from dlora.lora.parameters import (
    AdaptedParameters,
    ParameterAdapters,
    ParameterLayer,
)
from dlora.lora.states import AdapterState
from dlora.lora.targets import module_paths, parameter_paths, saved_paths
from dlora.lora.variants import VARIANTS, LoraAdapter
from dlora.lora.whole_weights import WholeWeights, plain_weights, show_weights


def attach(
    model: nn.Module,
    config: LoraConfig,
    *,
    whole_weights: WholeWeights | None = None,
    residual: bool = False,
) -> Attachment:
    """Give every target module of `model` an adapter, in place, and freeze all that was there.

    W0 keeps its parameter names and its storage; A and B appear as `….adapter.lora_A` and
    `….adapter.lora_B`, float32 (float64 beside a float64 base), drawn from torch's own generator.

    Args:
        model: any `nn.Module`, sharded or not.
        whole_weights: context that yields the whole parameters of a module by path; needed on a
            sharded base, for `modules_to_save` and for adapters that are made of W0.
        residual: packed weights are (or will be) the residual W0 − s·B0·A0.

    Raises:
        UsageError: nothing matches, a match cannot carry an adapter, or the model has adapters.
    """
    check_no_adapters(model)
    adapted, saved = module_paths(model, config), saved_paths(model, config)
    parameters = parameter_paths(model, config)
    owners = dict.fromkeys(path.rpartition(".")[0] for path in parameters)
    for path in (*adapted, *saved, *owners):
        check_free(model.get_submodule(path), path)
    for path in adapted:
        check_start(model.get_submodule(path), path, config, residual)
    for path in saved:
        check_whole(model.get_submodule(path), path)
    config.check_kernels([kernel_of(model.get_submodule(path)) for path in adapted])
    if VARIANTS[config.variant].needs_weight and whole_weights is None:
        for path in adapted:
            plain_weights(f"attach: {config.variant} starts from W0")(model.get_submodule(path))
    left = what_is_left(model, config, adapted, parameters)
    attachment = Attachment(config, [*adapted, *parameters], parameters, saved, left)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in adapted:
        attach_adapter(model.get_submodule(path), path, attachment, residual)
    for owner in owners:
        adapt_(model.get_submodule(owner), AdaptedParameters, ParameterAdapters(), owner)
    for path in parameters:
        adapt_parameter(model, path, attachment)
    for path in saved:
        module = model.get_submodule(path)
        with (whole_weights or plain_weights("modules_to_save"))(module) as weights:
            child = ModulesToSaveCopy(weights, master_dtype(module))
        adapt_(module, ModulesToSaveLayer, child, path)
    forbid_fused_inference(model)
    model.dlora = attachment  # type: ignore[assignment]
    show_weights(named_adapters(model), whole_weights)
    return attachment


def attachment_of(model: nn.Module) -> Attachment:
    """The record that `attach` left on the model; a `UsageError` if there is none."""
    attachment = getattr(model, "dlora", None)
    if not isinstance(attachment, Attachment):
        raise UsageError("this model has no dlora adapters; call dlora.attach first")
    return attachment


def named_adapters(model: nn.Module) -> Iterator[tuple[str, Any, LoraAdapter]]:
    """(path, layer, adapter) of every module with A and B, in the model's order.

    An adapted parameter has a layer of its own (`ParameterLayer`), and comes after the modules.
    """
    attachment = attachment_of(model)
    for path in attachment.adapted:
        yield path, *adapted_at(model, path)


def adapted_at(model: nn.Module, path: str) -> tuple[Any, Any]:
    """Layer and adapter at one of the paths of `Attachment.adapted`."""
    if path not in attachment_of(model).parameters:
        layer = model.get_submodule(path)
        return layer, layer.get_submodule(CHILD)
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return ParameterLayer(module, name), module.get_submodule(f"{CHILD}.{name}")


def owner_of(path: str, layer: AdaptedLayer) -> str:
    """The path of the module that has the weight of the layer at `path`."""
    return path.rpartition(".")[0] if isinstance(layer, ParameterLayer) else path


def weight_at(path: str, layer: AdaptedLayer) -> str:
    """The name in the model of the weight of the layer at `path`, which is not packed."""
    return f"{owner_of(path, layer)}.{layer.weight_names[0]}"


def named_copies(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModulesToSaveCopy]]:
    """(path, layer, trained copy) of every one of `modules_to_save`."""
    for path in attachment_of(model).saved:
        layer = model.get_submodule(path)
        yield path, layer, layer.get_submodule(CHILD)  # type: ignore[misc]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A, B and trained copies by their full names, in the model's order, the same on every rank."""
    children = [*named_adapters(model), *named_copies(model)]
    return {
        f"{child.place}.{name}": parameter
        for _, _, child in children
        for name, parameter in child.named_parameters()
    }


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of the adapters by full names: the factors of their offsets."""
    return {
        f"{adapter.place}.{name}": tensor
        for _, _, adapter in named_adapters(model)
        for name, tensor in adapter.offsets().items()
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the adapters by full names: the trained ones, then the frozen ones."""
    return {**trainable_parameters(model), **frozen_tensors(model)}


def await_start(model: nn.Module) -> None:
    """Mark all adapters as waiting for `dlora.start_from_gradients`."""
    for _, _, adapter in named_adapters(model):
        adapter.state = AdapterState.UNSTARTED


def end_start(model: nn.Module) -> None:
    """Mark all adapters as started, from the present A and B."""
    for _, _, adapter in named_adapters(model):
        if adapter.state is AdapterState.UNSTARTED:
            adapter.become(AdapterState.ON)


def is_unstarted(model: nn.Module) -> bool:
    """Whether adapters wait for `dlora.start_from_gradients`."""
    return any(a.state is AdapterState.UNSTARTED for _, _, a in named_adapters(model))


def children_of(model: nn.Module) -> list[LoraAdapter | ModulesToSaveCopy]:
    """All adapters and trained copies."""
    return [child for _, _, child in named_adapters(model)] + [
        child for _, _, child in named_copies(model)
    ]


def load_record(model: nn.Module, record: Any) -> None:
    """Resize adapters, before a replica owns them, to the shapes of a checkpoint.

    Args:
        record: of the method, in the checkpoint; None: the shapes are those of `attach`.
    """
    if record is not None:
        for _, _, adapter in named_adapters(model):
            adapter.load_record(record)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: every layer computes as if nothing had been attached.

    Raises:
        UsageError: the model is merged, so without adapters it is not its base.
    """
    if "dlora_originals" in model.__dict__:
        raise UsageError("disabled: this model is merged; call dlora.unmerge first")
    idle = (AdapterState.OFF, AdapterState.EMPTY)
    before = [(c, c.state) for c in children_of(model) if c.state not in idle]
    for child, _ in before:
        child.become(AdapterState.OFF)
    try:
        yield
    finally:
        for child, state in before:
            if child.state is AdapterState.OFF:
                child.become(state)
