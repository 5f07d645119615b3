"""One adapter: whether a module can have it, how it is made, and where it is put."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dlora.errors import UsageError
from dlora.lora.attachment import Attachment
from dlora.lora.config import LoraConfig
from dlora.lora.init import INITS
from dlora.lora.layers import CHILD, NAMED, layer_kind
from dlora.lora.parameters import ParameterAdapter, ParameterLayer
from dlora.lora.several import Names, adapt_, child_of, is_adapted
from dlora.lora.variants import VARIANTS
from dlora.quant.factored import is_factored
from dlora.quant.linear import is_packed


def check_free(module: nn.Module, path: str) -> None:
    """Check a module as it is without adapters of other names."""
    for child in (CHILD, NAMED):
        if hasattr(module, child):
            raise UsageError(f"attach: {path} already has an attribute named {child!r}")
    if "forward" in module.__dict__:
        raise UsageError(
            f"attach: {path} has a forward set on the instance (as accelerate's hooks do), which "
            "would bypass the adapter; remove it first"
        )


def check_beside(own: Attachment, others: Iterable[Attachment]) -> None:
    """Check that adapters fit beside those of other names, which stay as they are."""
    for other in others:
        for one, two in ((own, other), (other, own)):
            for path in one.saved:
                inside = [at for at in two.modules if f"{at}.".startswith(f"{path}.")]
                if any(at != path or at not in two.saved for at in inside):
                    raise UsageError(
                        f"attach: {one.name!r} trains {path} whole, and {two.name!r} adapts "
                        f"{inside[0]}; leave one of them out"
                    )
            layers = {*one.adapted} - {*one.parameters}
            owners = {*two.modules} - {*two.adapted} - {*two.saved}
            if odd := [path for path in one.adapted if path in layers & owners]:
                raise UsageError(
                    f"attach: {one.name!r} adapts the layer {odd[0]}, and {two.name!r} one of its "
                    "parameters (target_parameters); leave one of them out"
                )


def check_start(module: nn.Module, path: str, config: LoraConfig, residual: bool) -> None:
    """Check that the module has the weight that its adapter starts from."""
    kind, init, r = layer_kind(module), INITS[config.init_lora_weights], config.r_for(path)
    assert kind is not None  # target_paths has checked
    if VARIANTS[config.variant].linear_only and (kind.is_embedding or kind.kernel(module)):
        what = "an embedding" if kind.is_embedding else "a convolution"
        raise UsageError(
            f"target_modules: {path} is {what}, and {config.method} adapts linear layers alone"
        )
    if init.needs != "nothing" and is_packed(module) and not residual:
        raise UsageError(
            f"init_lora_weights: {init.name} needs the weight of {path}, which is packed; use a "
            "16-bit base, or init_lora_weights: true"
        )
    if init.needs != "nothing" and is_factored(module):
        raise UsageError(
            f"init_lora_weights: {init.name} needs the weight of {path}, and this base is "
            "compressed, so that it is a product; use init_lora_weights: true"
        )
    if problem := init.check_shape(*kind.shape(module), r):
        key = "r" if r == config.r else "rank_pattern"
        raise UsageError(f"{key}: {path}: {problem}")


def check_whole(module: nn.Module, path: str) -> None:
    packed = [name for name, inner in module.named_modules() if is_packed(inner)]
    if packed:
        inner = f"{path}.{packed[0]}" if packed[0] else path
        raise UsageError(
            f"modules_to_save: the weight of {inner} is packed, and packed weights cannot be "
            "trained; adapt the layer instead, or do not quantize the base"
        )


def attach_adapter(
    module: nn.Module,
    path: str,
    attachment: Attachment,
    residual: bool,
    names: Names | None,
    drawn: bool = True,
) -> None:
    """Make an adapter and put it into its layer; A and B are only `drawn` where they start so."""
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
        **config.shapes_for(path, kernel_of(module)),
    )
    if device.type != "meta" and drawn:
        adapter.reset(is_embedding=kind.is_embedding, init=init)
    adapter.train(module.training)
    adapt_(module, kind, adapter, path, attachment.name, names)


def adapt_parameter(
    model: nn.Module, path: str, attachment: Attachment, drawn: bool = True
) -> None:
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
    if device.type != "meta" and drawn:
        adapter.reset(is_embedding=False, init=attachment.init)
    adapter.train(module.training)
    adapters = child_of(module, attachment.name)
    adapter.place = f"{adapters.place}.{name}"
    adapters.add_module(name, adapter)


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
        "dtype": _master(module.parameters(recurse=False)),
    }


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    kind = layer_kind(module)
    return kind.kernel(module) if kind else ()


def master_dtype(module: nn.Module) -> torch.dtype:
    """Of a trained copy of the module, which has no adapters."""
    return _master(module.parameters())


def _master(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    is_double = any(p.dtype == torch.float64 for p in parameters)
    return torch.float64 if is_double else torch.float32


def forbid_fused_inference(model: nn.Module) -> None:
    """torch's fused encoder layer reads weights past `forward` in eval mode, so past the adapter.

    It is not used for layers with a hook, which is the documented way to switch it off. The stack
    around them still packs padded batches into nested tensors, which only the fused layer reads.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(map(is_adapted, module.modules())):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            if _no_fused_layer not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_no_fused_layer)
        else:
            module.use_nested_tensor = False


def _no_fused_layer(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""
