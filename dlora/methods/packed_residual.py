"""A base that is packed after what its adapters start from has been taken out of it.

    W0 from the files ── factorised, on one rank ── A₀, B₀, broadcast
    rows of W0 from the files ── less those of s·B₀·A₀ ── packed, on the rank that stores them

Packing W0 itself would round away in its largest directions what PiSSA then trains. The base of
such a run is the unpacked residual plus s·B₀·A₀: the model computes with that when its adapters are
off, and the adapter's files are an update of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.base.model import BaseModel
from dlora.base.reader import StoredWeights
from dlora.io.safetensors import StoredTensor, stored_tensors
from dlora.lora.attach import attach, frozen_tensors, named_adapters
from dlora.lora.config import LoraConfig
from dlora.lora.layers import AdaptedLayer
from dlora.methods.matrix_init import Layer, Started, start_from_matrices
from dlora.sharding.topology import Topology


class Residuals:
    """A₀ and B₀ of every adapted module, before there is a model that has them.

    Args:
        device: where they lie, and are computed.
    """

    def __init__(self, base: BaseModel, lora: LoraConfig, device: torch.device) -> None:
        skeleton: Any = base.skeleton()
        self._base, self._model, self._device = base, skeleton, device
        self._stored = StoredWeights(base, skeleton)
        attach(self._model, lora)
        self._layers = {}
        for path, module, adapter in named_adapters(self._model):
            adapter.to_empty(device=device)
            for tensor in adapter.state_dict().values():
                tensor.zero_()
            self._layers[path] = Layer(path, module, adapter)

    def factorise(self, topology: Topology) -> Started:
        """Compute them from the weights in the base's files, each on one rank. Collective."""
        return start_from_matrices(self._model, topology, self._matrix)

    def read(self, checkpoint: Path, topology: Topology) -> None:
        """Read them from a checkpoint that only rank 0 needs to have. Collective."""
        file = checkpoint / "adapter.safetensors"
        stored: Mapping[str, StoredTensor] = stored_tensors(file) if topology.rank == 0 else {}
        for name, tensor in frozen_tensors(self._model).items():
            if topology.rank == 0:
                tensor.copy_(stored[name].rows())
            if topology.world > 1:
                dist.broadcast(tensor, src=0)

    def left(self, path: str, first: int, weights: Tensor) -> Tensor:
        """What is left of the rows of a weight from `first` on, [k, n] as stored, in float32.

        Computed in float64, so that a row does not depend on the rows beside it.
        """
        if path not in self._layers:
            return weights
        module, adapter = self._layers[path].module, self._layers[path].adapter
        assert isinstance(module, AdaptedLayer)
        A0, B0 = (factor.double() for factor in adapter.offsets().values())
        one, other = (A0.t(), B0.t()) if module.transposed else (B0, A0)
        product = one[first : first + len(weights)] @ other
        return (weights.to(product) - adapter.scaling * product).float()

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Start the adapters of a model that was loaded without s·B0·A0; others stay as drawn."""
        for path, _, adapter in named_adapters(model):
            A0, B0 = self._layers[path].adapter.offsets().values()
            if bool(B0.any()):
                adapter.start_from(A0, B0)

    def _matrix(self, layer: Layer) -> Tensor:
        """W0 [m, n] of a layer, from the files."""
        assert isinstance(layer.module, AdaptedLayer)
        shape = layer.module.get_parameter("weight").shape
        weight = torch.empty(shape, dtype=self._base.dtype, device=self._device)
        self._stored.read(f"{layer.path}.weight", 0, weight.view(-1))
        return layer.module.as_product(weight)
