"""`attach`: put adapters on a model in place, freeze the rest, and reach them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dlora.errors import UsageError, and_more
from dlora.lora.attachment import Attachment
from dlora.lora.config import LoraConfig
from dlora.lora.foreign import check_none_of_peft
from dlora.lora.layers import AdaptedLayer
from dlora.lora.left import what_is_left
from dlora.lora.make_adapters import (
    adapt_parameter,
    attach_adapter,
    check_beside,
    check_free,
    check_start,
    check_whole,
    forbid_fused_inference,
    kernel_of,
    master_dtype,
)
from dlora.lora.names import attached, bare, by_name, check_name, names_with, record
from dlora.lora.parameters import (
    AdaptedParameters,
    ParameterAdapters,
    ParameterLayer,
)
from dlora.lora.saved_modules import ModulesToSaveCopy, ModulesToSaveLayer
from dlora.lora.several import DEFAULT, adapt_, child_of, module_at
from dlora.lora.states import AdapterState, switched_off
from dlora.lora.targets import module_paths, parameter_paths, saved_paths
from dlora.lora.variants import VARIANTS, LoraAdapter
from dlora.lora.whole_weights import WholeWeights, plain_weights, show_weights


def attach(
    model: nn.Module,
    config: LoraConfig,
    *,
    whole_weights: WholeWeights | None = None,
    residual: bool = False,
    name: str = DEFAULT,
    trained: bool = True,
    started: bool = True,
) -> Attachment:
    """Give every target module of `model` an adapter, in place, and freeze all that was there.

    W0 keeps its parameter names and its storage; A and B appear as `….adapter.lora_A` and
    `….adapter.lora_B`, float32 (float64 beside a float64 base), drawn from torch's own generator.
    Those with a name appear as `….adapters.NAME.lora_A`, and see the base as if they were alone.

    Args:
        model: any `nn.Module`, sharded or not.
        whole_weights: context that yields the whole parameters of a module by path; needed on a
            sharded base, for `modules_to_save` and for adapters that are made of W0.
        residual: packed weights are (or will be) the residual W0 − s·B0·A0.
        name: of these adapters among others; the first ones are active.
        trained: whether they have gradients.
        started: False: the caller reads A and B, and shows the weights, see `show_weights`.

    Raises:
        UsageError: nothing matches, a match cannot carry an adapter, or the name is taken.
    """
    check_none_of_peft(model)
    check_name(model, name)
    if name != DEFAULT and VARIANTS[config.variant].alone:
        raise UsageError(f"attach: a {config.method} adapter cannot have a name, such as {name!r}")
    with bare(model):
        attachment = _prepared(model, config, whole_weights, residual)
        attachment.name, attachment.trained = name, trained
        copies = {path: _copied(model, path, whole_weights) for path in attachment.saved}
        check_beside(attachment, attached(model).values())
        model.requires_grad_(False)

    names = names_with(model, name)
    owners = {path.rpartition(".")[0]: None for path in attachment.parameters}
    for path in attachment.adapted:
        if path not in attachment.parameters:
            attach_adapter(module_at(model, path), path, attachment, residual, names, started)
    for owner in owners:
        module = module_at(model, owner)
        adapt_(module, AdaptedParameters, ParameterAdapters(), owner, name, names)
    for path in attachment.parameters:
        adapt_parameter(model, path, attachment, started)
    for path, child in copies.items():
        adapt_(module_at(model, path), ModulesToSaveLayer, child, path, name, names)
    forbid_fused_inference(model)
    record(model, attachment)
    with by_name(model, name):
        for inner in children_of(model):
            inner.requires_grad_(trained)
        if started:
            show_weights(named_adapters(model), whole_weights)
    return attachment


def _prepared(
    model: nn.Module, config: LoraConfig, whole_weights: WholeWeights | None, residual: bool
) -> Attachment:
    """What is to be attached to a model, which is checked and not changed."""
    adapted, saved = module_paths(model, config), saved_paths(model, config)
    parameters = parameter_paths(model, config)
    for path in (*adapted, *saved, *{path.rpartition(".")[0]: None for path in parameters}):
        check_free(module_at(model, path), path)
    for path in adapted:
        check_start(module_at(model, path), path, config, residual)
    for path in saved:
        check_whole(module_at(model, path), path)
    config.check_kernels([kernel_of(module_at(model, path)) for path in adapted])
    if VARIANTS[config.variant].needs_weight and whole_weights is None:
        for path in adapted:
            plain_weights(f"attach: {config.variant} starts from W0")(module_at(model, path))
    left = what_is_left(model, config, adapted, parameters)
    return Attachment(config, [*adapted, *parameters], parameters, saved, left)


def _copied(model: nn.Module, path: str, whole_weights: WholeWeights | None) -> ModulesToSaveCopy:
    module = module_at(model, path)
    with (whole_weights or plain_weights("modules_to_save"))(module) as weights:
        return ModulesToSaveCopy(weights, master_dtype(module))


def attachment_of(model: nn.Module) -> Attachment:
    """The record that `attach` left on the model; a `UsageError` if there is none."""
    attachment = getattr(model, "dlora", None)
    if not isinstance(attachment, Attachment):
        if names := attached(model):
            raise UsageError(
                f"all adapters of this model have names ({and_more(list(names))}); say which is "
                "meant: name=…"
            )
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
    attachment = attachment_of(model)
    if path not in attachment.parameters:
        layer = module_at(model, path)
        return layer, child_of(layer, attachment.name)
    owner, _, parameter = path.rpartition(".")
    module = module_at(model, owner)
    adapters = child_of(module, attachment.name)
    return ParameterLayer(module, parameter), adapters.get_submodule(parameter)


def owner_of(path: str, layer: AdaptedLayer) -> str:
    """The path of the module that has the weight of the layer at `path`."""
    return path.rpartition(".")[0] if isinstance(layer, ParameterLayer) else path


def weight_at(path: str, layer: AdaptedLayer) -> str:
    """The name in the model of the weight of the layer at `path`, which is not packed."""
    return f"{owner_of(path, layer)}.{layer.weight_names[0]}"


def named_copies(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModulesToSaveCopy]]:
    """(path, layer, trained copy) of every one of `modules_to_save`."""
    attachment = attachment_of(model)
    for path in attachment.saved:
        layer = module_at(model, path)
        yield path, layer, child_of(layer, attachment.name)


def trainable_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """A, B and trained copies by their full names, in the model's order, the same on every rank.

    Args:
        name: of the adapters, where those that are meant anyway are not.
    """
    if name is not None:
        with by_name(model, name):
            return trainable_parameters(model)
    children = [*named_adapters(model), *named_copies(model)]
    return {
        f"{child.place}.{parameter_name}": parameter
        for _, _, child in children
        for parameter_name, parameter in child.named_parameters()
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


def every_child(model: nn.Module) -> list[LoraAdapter | ModulesToSaveCopy]:
    """The adapters and trained copies of all names."""
    found: list[LoraAdapter | ModulesToSaveCopy] = []
    for name in attached(model):
        with by_name(model, name):
            found += children_of(model)
    return found


def every_parameter(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapters of all names, trained or not, by their full names."""
    every = [trainable_parameters(model, name) for name in attached(model)]
    return {name: parameter for named in every for name, parameter in named.items()}


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
        UsageError: nothing is attached, or the model is merged, so without adapters it is not its
            base.
    """
    if "dlora_originals" in model.__dict__:
        raise UsageError("disabled: this model is merged; call dlora.unmerge first")
    if not attached(model):
        attachment_of(model)
    with switched_off(every_child(model)):
        yield
