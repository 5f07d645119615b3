"""A mixture of experts in its own files, read one tensor at a time: see `source` and `mixture`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dlora.adapters.mixture import experts_of, places_in, read_experts, router_tensors
from dlora.adapters.peft_names import keys_of
from dlora.adapters.source import AdapterSource
from dlora.errors import UsageError
from dlora.io.safetensors import StoredTensor
from dlora.lora.attach import attach
from dlora.lora.variants.mola import MolaConfig

_DIMS = {"lora_A": 0, "lora_B": 1}  # along which experts lie side by side


@dataclass
class MixtureSource(AdapterSource):
    """The directory of a mixture; each of its tensors is one or several in the files."""

    _parts: dict[str, tuple[int, list[StoredTensor]]] = field(default_factory=dict)

    def attach_to(self, model: nn.Module) -> None:
        """As `AdapterSource.attach_to`."""
        config = self.config
        assert isinstance(config, MolaConfig)
        try:
            attach(model, config)
        except UsageError as error:
            raise UsageError(f"{self.directory} does not fit the base: {error}") from None
        routers, gates = router_tensors(model, self.directory)
        experts = read_experts(model, places_in(self.directory, config))
        for path, layer, adapter in experts_of(model):
            keys = keys_of(model, path, layer, adapter)
            for name, dim in _DIMS.items():
                self._parts[f"{adapter.place}.{name}"] = dim, [own[keys[name]] for own in experts]
            self._parts[f"{adapter.place}.lora_router"] = 0, [routers[path]]
            adapter.mean_gates = gates[path].rows().float() if path in gates else None

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `AdapterSource.read`."""
        dim, parts = self._parts[name]
        return torch.cat([part.rows().to(dtype) for part in parts], dim)

    def key_of(self, name: str) -> str:
        """As `AdapterSource.key_of`; of several, the first."""
        return self._parts[name][1][0].key
