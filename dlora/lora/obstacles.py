"""Why modules that look adaptable, or trainable whole, are not: reasons, in words for errors."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def obstacle(module: nn.Module, name: str = "") -> str | None:
    """Why an embedding, a convolution or an attention of torch's cannot carry an adapter.

    Args:
        name: of the module in its owner.

    Returns:
        None where it can, and of other modules.
    """
    if isinstance(module, nn.Embedding):
        return _of_embedding(module)
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, name)
    kind = next((k for k in CONVOLUTIONS if isinstance(module, k)), None)
    if not isinstance(module, CONVOLUTIONS) or kind is None:
        return None
    if type(module).forward is not kind.forward:
        return "it has a forward of its own"
    if module.groups != 1:
        return f"groups={module.groups}: W0 connects channels of one group, B·A all channels"
    if set(module.dilation) != {1}:
        return f"dilation={module.dilation}: in PEFT's form A is not dilated, but W0 is"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: in PEFT's form A sees zeros there"
    return None


def statistics_in(module: nn.Module) -> str | None:
    """The path in `module` of a normalisation that has running statistics, or None.

    A trained copy has parameters alone: statistics would change those of the frozen base, differ
    from rank to rank, and be missing in the adapter's files.
    """
    for path, inner in module.named_modules():
        if isinstance(inner, _NormBase) and inner.running_mean is not None:
            return path
    return None


def _of_embedding(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites its weight at every look-up"
    if module.scale_grad_by_freq:
        return (
            "scale_grad_by_freq divides gradients by how often a row is looked up in a batch, so "
            "they would depend on how batches are divided"
        )
    return None


def _of_attention(module: nn.MultiheadAttention, name: str) -> str:
    """It projects inputs by parameters, and outputs by a layer that it never calls."""
    own = [n for n, _ in module.named_parameters(recurse=False) if n.endswith("proj_weight")]
    named = ", ".join(f"{name}.{each}" if name else each for each in own)
    return f"it computes with parameters, and calls no layer: use target_parameters: [{named}]"
