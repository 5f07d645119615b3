"""An adapter on disk in either of its forms, read one module at a time.

    PEFT's directory    adapter_config.json, adapter_model.safetensors   keys are PEFT's
    a checkpoint        config.yaml, adapter.safetensors, manifest.json  keys are names in the model

Names, shapes and settings are checked against a model, which may be on the meta device, and values
for being finite, before anything is done with a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.layouts import in_layout_of
from dlora.adapters.peft_format import PREFIX, peft_names, peft_slots
from dlora.adapters.save_load import check_numbers, read_config
from dlora.adapters.settings import lora_config
from dlora.adapters.write import CONFIG, WEIGHTS
from dlora.checkpoint import format as checkpoint
from dlora.checkpoint.state import saved_lora
from dlora.config.load import load
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, read_object, write_atomically
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
from dlora.lora.variants import VARIANTS, LoraAdapter

LABELS = "labels.json"  # beside the adapter of a classification: their names, in order
_PEFT_TASKS = {"classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}  # of `train.task`


@dataclass(frozen=True)
class BaseReference:
    """What an adapter records of its base; `trust_remote_code` is never taken from a file."""

    path: str | None = None
    revision: str | None = None
    dtype: str | None = None
    cache_dir: str | None = None
    gguf: str | None = None  # the file that `path` was converted from, where it is known


@dataclass(frozen=True)
class Answering:
    """What an adapter records of how it was trained to answer.

    Attributes:
        template: the chat template; None: the base's own.
        variables: defaults of the template's variables.
        ends: tokens that end an answer, beside those of the base.
    """

    template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()


@dataclass
class AdapterSource:
    """An adapter directory or a checkpoint; `open_adapter` makes it."""

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
    # PEFT stores W0 of adapted embeddings too: where, by the parameter's name
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
            for path, _, _ in named_adapters(model):
                if (key := f"{PREFIX}{path}.base_layer.weight") in stored:
                    self.base_copies[f"{path}.weight"] = stored.pop(key)
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


def open_adapter(directory: str | Path) -> AdapterSource:
    """Read the settings of an adapter directory or a checkpoint.

    Raises:
        UsageError: it is neither, it is damaged, or it is no LoRA.
    """
    directory = adapter_directory(directory, "--adapter")
    if not directory.is_dir():
        raise UsageError(f"--adapter: directory {directory} does not exist")
    if (directory / CONFIG).exists():
        return _from_peft(directory)
    if (directory / "manifest.json").exists():
        return _from_checkpoint(directory)
    hint = f"; did you mean {directory / 'adapter'}?" if (directory / "adapter").is_dir() else ""
    raise UsageError(
        f"--adapter: {directory} has neither an {CONFIG} nor a checkpoint's manifest.json{hint}"
    )


def _from_peft(directory: Path) -> AdapterSource:
    config = read_config(directory)
    raw = read_object(directory / CONFIG)
    path = raw.get("base_model_name_or_path")
    run = _model_section(directory.parent / "config.yaml")
    if not path or not _is_base_of(run, path):
        run = {}
    from_gguf = run.get("path", "").endswith(".gguf")
    if path and from_gguf and Path(path).is_absolute() and not Path(path).exists():
        path = run["path"]  # what it was converted to has been deleted
    base = BaseReference(
        path,
        raw.get("revision") or run.get("revision"),
        None,
        run.get("cache_dir"),
        run["path"] if from_gguf else None,
    )
    file = inside(directory, WEIGHTS)
    answering = Answering(_template(directory), ends=_ends(directory))
    task = raw.get("task_type")
    return AdapterSource(directory, file, config, base, False, answering=answering, task=task)


def write_labels(directory: Path, labels: Sequence[str]) -> None:
    """Write the names of a classification's labels beside its adapter."""
    named = json.dumps({"labels": list(labels)}, ensure_ascii=False)
    write_atomically(directory / LABELS, named.encode())


def _template(directory: Path) -> str | None:
    """The chat template beside an adapter."""
    path = inside(directory, "chat_template.jinja")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None


def _ends(directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer, in the generation settings beside an adapter."""
    path = inside(directory, "generation_config.json")
    if not path.exists():
        return ()
    found = read_object(path).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(end) is not int or end < 0 for end in ends):
        raise UsageError(
            f"{path}: eos_token_id: {found!r} is neither a token id nor a list of them"
        )
    return tuple(ends)


def _from_checkpoint(directory: Path) -> AdapterSource:
    checkpoint.verify(directory, ("adapter.safetensors", "config.yaml", "state.json"))
    # Where W0 was divided does not matter here, and its engine need not be installed.
    elsewhere = ["--sharding.engine", "fsdp2", "--sharding.cpu_offload", "false"]
    config = load(directory / "config.yaml", elsewhere)
    lora = saved_lora(read_object(directory / "state.json"))
    settings = lora or lora_config(config)
    record = checkpoint.method_record(directory)
    try:
        names = stored_tensors(directory / checkpoint.ADAPTER)
        VARIANTS[settings.variant].check_record(record, names)
    except UsageError as error:
        raise UsageError(f"{directory / 'manifest.json'}: {error}") from None
    model = config.model
    base = BaseReference(model.path, model.revision, model.dtype, model.cache_dir)
    file = directory / "adapter.safetensors"
    return AdapterSource(
        directory,
        file,
        settings,
        base,
        is_checkpoint=True,
        record=record,
        answering=Answering(config.data.chat_template, dict(config.data.chat_template_kwargs)),
        task=_PEFT_TASKS.get(config.train.task),
    )


def _is_base_of(run: dict[str, str], path: str) -> bool:
    """Whether a run's `model.path` is the base that its adapter records."""
    named = Path(run.get("path", "")).expanduser()
    return named.suffix == ".gguf" or path in (run.get("path"), str(named.absolute()))


def _model_section(path: Path) -> dict[str, str]:
    """`model` of a run's configuration, which knows where its base was converted, or {}."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    section = found.get("model") if isinstance(found, dict) else None
    texts = section.items() if isinstance(section, dict) else ()
    return {name: value for name, value in texts if isinstance(value, str)}
