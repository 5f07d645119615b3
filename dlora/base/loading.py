"""The weights of a base on their way into a model, as an engine asks for them."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from dlora.base.low_rank import stand_ins
from dlora.base.model_class import CAUSAL
from dlora.base.packed_reader import StoredPackedWeights
from dlora.base.reader import StoredWeights
from dlora.base.skeleton import AUTO, make_buffers, set_buffers, untied_config
from dlora.base.weight_files import check_files, check_loaded
from dlora.quant.factored import is_factored


class BaseWeights:
    """The weights of a base, for an engine: all of them from transformers, or range by range.

    Args:
        base: a `BaseModel`, whose file imports this one.
        left: as for `StoredPackedWeights`.
    """

    def __init__(self, base: Any, left: Any = None) -> None:
        self._base, self._left = base, left
        check_files(base)  # they are downloaded now, since they say which weights are tied
        self.skeleton: Any = base.skeleton()
        is_low_rank = any(map(is_factored, self.skeleton.modules()))
        self.element_wise = base.quantization != "none" or is_low_rank

    def from_pretrained(self, **sharding: Any) -> nn.Module:
        """Load the model with transformers.

        Args:
            sharding: arguments by which transformers reads a part only.

        Raises:
            UsageError: the files lack a parameter or have it in another shape; transformers would
                initialise it at random. Local files are checked earlier (`check_stored`).
        """
        if self._base.attn_implementation != AUTO:
            sharding["attn_implementation"] = self._base.attn_implementation
        made_as, config = self._base.made_as, self._base.config()
        untied = untied_config(config, self.skeleton)
        if untied is not None or made_as is not CAUSAL:
            sharding["config"] = untied or config
        model, found = self._base.reading(
            made_as.auto(self._base.config()).from_pretrained,
            dtype=self._base.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **sharding,
        )
        check_loaded(self._base.path, found, made_as.may_lack(self.skeleton))
        if "distributed_config" in sharding:
            set_buffers(model, self.skeleton)
        return model

    @functools.cached_property
    def makes_rows(self) -> bool:
        """Whether transformers, sharding while it reads, would give ranks other rows."""
        is_quantized = getattr(self.skeleton.config, "quantization_config", None) is not None
        return not is_quantized and self._plain.makes_rows

    def empty(self) -> nn.Module:
        """The packed model with parameters on the meta device and real buffers.

        It does what transformers' `from_pretrained` does after reading the parameters.
        """
        from transformers import GenerationConfig

        model, stored, base = self.skeleton, self._stored, self._base
        read, revision = GenerationConfig.from_pretrained, base.revision or "main"
        with suppress(OSError):  # not every base has one
            model.generation_config = read(base.source, revision=revision)
        persistent = dict(model.named_buffers())
        for name, _ in model.named_non_persistent_buffers():
            del persistent[name]
        with stand_ins(model):
            make_buffers(model)
        for name, buffer in persistent.items():
            value = torch.empty(buffer.shape, dtype=buffer.dtype)
            stored.read(name, 0, value.view(-1))
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_buffer(last, value)
        base.pack(model)
        return model.eval().requires_grad_(False)

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements [start, start + n) of the flattened tensor `name`."""
        self._stored.read(name, start, out)

    @functools.cached_property
    def _plain(self) -> StoredWeights:
        return self._base.stored(self.skeleton)

    @functools.cached_property
    def _stored(self) -> Any:
        return StoredPackedWeights(self._plain, self.skeleton, self._left)
