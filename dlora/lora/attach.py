"""`attach`: put adapters on a model in place, freeze the rest, and reach them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import DropoutStream
from dlora.lora.foreign import check_no_adapters
from dlora.lora.init import INITS, Initialisation
from dlora.lora.layers import (
    CHILD,
    AdaptedLayer,
    ModulesToSaveCopy,
    ModulesToSaveLayer,
    adapt_,
    layer_kind,
)
from dlora.lora.left import what_is_left
from dlora.lora.parameters import (
    AdaptedParameters,
    ParameterAdapter,
    ParameterAdapters,
    ParameterLayer,
)
from dlora.lora.states import AdapterState
from dlora.lora.step_values import StepValues
from dlora.lora.targets import module_paths, parameter_paths, saved_paths
from dlora.lora.variants import VARIANTS, LoraAdapter
from dlora.lora.whole_weights import WholeWeights, plain_weights, show_weights
from dlora.quant.linear import is_packed


@dataclass
class Attachment:
    """What `attach` did to a model; stored on the model as `model.dlora`.

    Attributes:
        adapted: paths of the modules with an adapter, then those of adapted parameters.
        parameters: the latter alone.
        saved: paths of the modules that are trained whole.
        left: lines for the user about what `all-linear` left alone.
        stream: where the adapters' dropout masks come from.
        values: what the adapters make once for all passes of a step.
    """

    config: LoraConfig
    adapted: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stream: DropoutStream = field(default_factory=DropoutStream)
    values: StepValues = field(default_factory=StepValues)

    @property
    def init(self) -> type[Initialisation]:
        """How A and B start."""
        return INITS[self.config.init_lora_weights]


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
        _check_free(model.get_submodule(path), path)
    for path in adapted:
        _check_start(model.get_submodule(path), path, config, residual)
    for path in saved:
        _check_whole(model.get_submodule(path), path)
    config.check_kernels([_kernel(model.get_submodule(path)) for path in adapted])
    if VARIANTS[config.variant].needs_weight and whole_weights is None:
        for path in adapted:
            plain_weights(f"attach: {config.variant} starts from W0")(model.get_submodule(path))
    left = what_is_left(model, config, adapted, parameters)
    attachment = Attachment(config, [*adapted, *parameters], parameters, saved, left)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in adapted:
        _attach_adapter(model.get_submodule(path), path, attachment, residual)
    for owner in owners:
        adapt_(model.get_submodule(owner), AdaptedParameters, ParameterAdapters(), owner)
    for path in parameters:
        _adapt_parameter(model, path, attachment)
    for path in saved:
        module = model.get_submodule(path)
        with (whole_weights or plain_weights("modules_to_save"))(module) as weights:
            child = ModulesToSaveCopy(weights, _master_dtype(module))
        adapt_(module, ModulesToSaveLayer, child, path)
    _forbid_fused_inference(model)
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


def _check_free(module: nn.Module, path: str) -> None:
    if hasattr(module, CHILD):
        raise UsageError(f"attach: {path} already has an attribute named {CHILD!r}")
    if "forward" in module.__dict__:
        raise UsageError(
            f"attach: {path} has a forward set on the instance (as accelerate's hooks do), which "
            "would bypass the adapter; remove it first"
        )


def _check_start(module: nn.Module, path: str, config: LoraConfig, residual: bool) -> None:
    """Check that the module has the weight that its adapter starts from."""
    kind, init, r = layer_kind(module), INITS[config.init_lora_weights], config.r_for(path)
    assert kind is not None  # target_paths has checked
    if init.needs != "nothing" and is_packed(module) and not residual:
        raise UsageError(
            f"init_lora_weights: {init.name} needs the weight of {path}, which is packed; use a "
            "16-bit base, or init_lora_weights: true"
        )
    if problem := init.check_shape(*kind.shape(module), r):
        key = "r" if r == config.r else "rank_pattern"
        raise UsageError(f"{key}: {path}: {problem}")


def _check_whole(module: nn.Module, path: str) -> None:
    packed = [name for name, inner in module.named_modules() if is_packed(inner)]
    if packed:
        inner = f"{path}.{packed[0]}" if packed[0] else path
        raise UsageError(
            f"modules_to_save: the weight of {inner} is packed, and packed weights cannot be "
            "trained; adapt the layer instead, or do not quantize the base"
        )


def _attach_adapter(module: nn.Module, path: str, attachment: Attachment, residual: bool) -> None:
    kind, config = layer_kind(module), attachment.config
    assert kind is not None  # target_paths has checked
    m, n = kind.shape(module)
    init = attachment.init
    device = next(module.parameters(recurse=False)).device
    adapter = VARIANTS[config.variant](
        m=m,
        n=n,
        **_common(attachment, path, module),
        device=device,
        offset=init.needs != "nothing",
        residual=residual and init.needs == "weight" and is_packed(module),
        **config.shapes_for(path, _kernel(module)),
    )
    if device.type != "meta":
        adapter.reset(is_embedding=kind.is_embedding, init=init)
    adapter.train(module.training)
    adapt_(module, kind, adapter, path)


def _adapt_parameter(model: nn.Module, path: str, attachment: Attachment) -> None:
    """Put A and B of one parameter among its module's `ParameterAdapters`."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    layer = ParameterLayer(module, name)
    experts, m, n = layer.sizes()
    device = module.get_parameter(name).device
    adapter = ParameterAdapter(
        m=m,
        n=n,
        experts=experts,
        transposed=layer.stored_transposed,
        **_common(attachment, path, module),
        device=device,
    )
    if device.type != "meta":
        adapter.reset(is_embedding=False, init=attachment.init)
    adapter.train(module.training)
    adapter.place = f"{owner}.{CHILD}.{name}"
    module.get_submodule(CHILD).add_module(name, adapter)


def _common(attachment: Attachment, path: str, module: nn.Module) -> dict[str, Any]:
    """What every adapter is made with."""
    config = attachment.config
    return {
        "r": config.r_for(path),
        "scaling": config.scaling_for(path),
        "dropout": config.lora_dropout,
        "path": path,
        "stream": attachment.stream,
        "values": attachment.values,
        "dtype": _master_dtype(module),
    }


def _kernel(module: nn.Module) -> tuple[int, ...]:
    kind = layer_kind(module)
    return kind.kernel(module) if kind else ()


def _master_dtype(module: nn.Module) -> torch.dtype:
    is_double = any(p.dtype == torch.float64 for p in module.parameters(recurse=True))
    return torch.float64 if is_double else torch.float32


def _forbid_fused_inference(model: nn.Module) -> None:
    """torch's fused encoder layer reads weights past `forward` in eval mode, so past the adapter.

    It is not used for layers with a hook, which is the documented way to switch it off. The stack
    around them still packs padded batches into nested tensors, which only the fused layer reads.
    """
    for module in model.modules():
        if not any(hasattr(child, CHILD) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_fused_layer)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _no_fused_layer(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""
