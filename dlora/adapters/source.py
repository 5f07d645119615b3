"""An adapter on disk in either of its forms, read one module at a time.

    PEFT's directory    adapter_config.json, adapter_model.safetensors   keys are PEFT's
    a checkpoint        config.yaml, adapter.safetensors, manifest.json  keys are names in the model

Names, shapes and settings are checked against a model, which may be on the meta device, and values
for being finite, before anything is done with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlora.adapters.base_copies import base_names
from dlora.adapters.layouts import in_layout_of
from dlora.adapters.peft_names import peft_names, peft_slots
from dlora.adapters.recorded import LABELS, Answering, BaseReference
from dlora.adapters.save_load import check_numbers
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, read_object
from dlora.io.safetensors import FLOATS, StoredTensor, stored_tensors
from dlora.lora.attach import (
    adapted_at,
    adapter_tensors,
    attach,
    load_record,
    named_adapters,
    named_copies,
)
from dlora.lora.config import LoraConfig
from dlora.lora.merge import scale_of_rows
from dlora.lora.states import Stateful
from dlora.lora.tasks import HEADS
from dlora.lora.variants import LoraAdapter, PlainLora


@dataclass
class AdapterSource:
    """An adapter directory or a checkpoint; `open_adapter.py` makes it."""

    directory: Path
    file: Path
    config: LoraConfig
    base: BaseReference
    is_checkpoint: bool
    record: dict[str, Any] | None = None  # of a checkpoint: what its method records
    answering: Answering = field(default_factory=Answering)
    task: str | None = None  # PEFT's word for what it was trained for
    _tensors: dict[str, StoredTensor] = field(default_factory=dict)  # by name in the model
    _shapes: dict[str, torch.Size] = field(default_factory=dict)  # that the model has them in
    # PEFT stores W0 of embeddings and heads too: where, by the parameter's name
    base_copies: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The labels of a classification, in order: those that its run had, or `LABEL_i`.

        Raises:
            UsageError: the file of their names has none.
        """
        file, key = ("state.json" if self.is_checkpoint else LABELS), "labels"
        path = inside(self.directory, file)
        found = read_object(path).get(key) if path.exists() else None
        if found is None:
            return [f"LABEL_{i}" for i in range(self._outputs())]
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise UsageError(f"{path}: {key}: is no list of names")
        return found

    def _outputs(self) -> int:
        """How many outputs the head in the file has, the last of its layers; 0: there is none."""
        heads, stored = HEADS.get(self.task or "", ()), stored_tensors(self.file)
        named = [t for key, t in stored.items() if any(f".{head}." in f".{key}" for head in heads)]
        return named[-1].shape[0] if named else 0

    def attach_to(self, model: nn.Module) -> None:
        """Attach adapters of the right form to `model`, and check that their tensors are here.

        Raises:
            UsageError: the adapter does not fit the model, or has NaN or infinite values.
        """
        config, stored = self.config, stored_tensors(self.file)
        if not self.is_checkpoint:
            config, stored = in_layout_of(model, config, stored)
        try:
            attach(model, config)
        except UsageError as error:
            raise UsageError(f"{self.directory} does not fit the base: {error}") from None
        load_record(model, self.record)
        parameters = adapter_tensors(model)
        keys = {name: name for name in parameters} if self.is_checkpoint else peft_names(model)
        slots = parameters if self.is_checkpoint else peft_slots(model)
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._tensors = {name: stored.pop(key) for name, key in keys.items() if key in stored}
        if not self.is_checkpoint:
            parameters_of_base = dict(model.named_parameters(remove_duplicate=False))
            for key, name in base_names(model, stored).items():
                if name in parameters_of_base:
                    self.base_copies[name] = stored.pop(key)
        missing = [key for name, key in keys.items() if name not in self._tensors]
        if missing or stored:
            what, some = ("lacks", missing) if missing else ("has the unexpected", list(stored))
            raise UsageError(f"{self.file} does not fit the base: it {what} {and_more(some, 1)}")
        for name, tensor in self._tensors.items():
            expected = tuple(slots[keys[name]].shape)
            if tensor.shape != expected or tensor.dtype not in FLOATS:
                raise UsageError(
                    f"{self.file} does not fit the base: {tensor.key} is {tensor.dtype} "
                    f"{list(tensor.shape)}, but the base needs floats {list(expected)}"
                )
        check_numbers({tensor.key: tensor for tensor in self._tensors.values()})

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the adapters by its name in the model."""
        return self._tensors[name].rows().to(dtype).view(self._shapes[name])

    def key_of(self, name: str) -> str:
        """The key in the file of a tensor of the adapters by its name in the model."""
        return self._tensors[name].key

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Fill the adapters of a model after `attach_to`.

        Raises:
            UsageError: the adapter was trained on other embeddings than the model's.
        """
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(self.read(name, tensor.dtype))
        for name, copy in self.base_copies.items():
            self.check_base_copy(name, [(copy.rows(), model.get_parameter(name).detach().cpu())])

    def materialize(self, model: nn.Module) -> None:
        """Give the adapters of a model on the meta device their tensors, in float32."""
        for _, _, child in (*named_adapters(model), *named_copies(model)):
            self._fill(child, torch.float32)

    def plain(self, model: nn.Module, path: str, dtype: torch.dtype) -> PlainLora:
        """The plain LoRA of one module of a model on the meta device, whatever the adapter's form.

        Only this adapter's tensors are in memory meanwhile.
        """
        _, adapter = adapted_at(model, path)
        self._fill(adapter, dtype)
        try:
            form: PlainLora = adapter.as_lora()
            return form
        finally:
            adapter.to("meta")

    def update(
        self,
        model: nn.Module,
        path: str,
        dtype: torch.dtype,
        slices: Iterable[tuple[int, int, Tensor]],
    ) -> tuple[Tensor, Tensor | None]:
        """Compute ΔW of one module of a model on the meta device.

        Only this adapter's tensors are in memory meanwhile.

        Args:
            slices: of W0, as for `dlora.lora.merge.scale_of_rows`.

        Returns:
            ΔW in the layout of the module's weight, and the scale of its rows (None for ones).
        """
        layer, adapter = adapted_at(model, path)
        self._fill(adapter, dtype)
        try:
            delta = layer.as_stored(layer, adapter.delta())
            return delta, scale_of_rows(layer, adapter, delta, slices)
        finally:
            adapter.to("meta")

    def update_of_expert(
        self, model: nn.Module, path: str, dtype: torch.dtype, expert: int
    ) -> Tensor:
        """ΔW of one matrix of a stack, [1, …] in the layout of the stack; see `update`."""
        layer, adapter = adapted_at(model, path)
        self._fill(adapter, dtype)
        try:
            return layer.as_stored(layer, adapter.delta(slice(expert, expert + 1)))
        finally:
            adapter.to("meta")

    def check_base_copy(self, name: str, pairs: list[tuple[Tensor, Tensor]] | Iterator) -> None:
        """Raise a `UsageError` unless PEFT's copy of W0 is the base's, but for a cast of one."""
        for ours, base in pairs:
            same = ours.shape == base.shape and (
                torch.equal(base.to(ours.dtype), ours) or torch.equal(ours.to(base.dtype), base)
            )
            if not same:
                raise UsageError(
                    f"{self.file} was trained on another {name} than the base's; "
                    "--base must be the model that it was trained on"
                )

    def _fill(self, child: Stateful, dtype: torch.dtype) -> None:
        offsets = child.offsets() if isinstance(child, LoraAdapter) else {}
        names = [*offsets, *(name for name, _ in child.named_parameters())]
        tensors = {name: self.read(f"{child.place}.{name}", dtype) for name in names}
        child.load_state_dict(tensors, assign=True)
