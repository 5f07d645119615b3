"""The model that a run trains: its task, its base, and the skeleton with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.settings import keyed_by, lora_config, settings_today
from dlora.base.model import BaseModel, find_base
from dlora.base.model_class import owners_of
from dlora.base.quantize import Quantized
from dlora.config.load import Config
from dlora.lora.attach import attach, load_record
from dlora.lora.config import LoraConfig
from dlora.lora.targets import saved_paths
from dlora.plan.objective import made_task
from dlora.tasks import TASKS, Task
from dlora.tasks.causal import Causal
from dlora.tasks.made_as import model_class_for
from dlora.training.checks import check_adapter, check_dropout, check_experts, check_gradients
from dlora.training.find_checkpoint import ResumePoint
from dlora.training.prepare_data import check_sources, labels_in_data


def task_of(config: Config, announce: Callable[[str], None]) -> tuple[Task, BaseModel]:
    """`train.task` with its labels, and the base that is made for it.

    Raises:
        UsageError: the base cannot be read, or the records have no labels that fit.
    """
    if config.model.path.endswith(".gguf"):
        check_sources(config)  # an error in the data should not wait for the conversion
    base = find_base(
        config.model.path,
        dtype=config.model.dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        cache_dir=config.model.cache_dir,
        attn_implementation=config.model.attn_implementation,
        quantization=config.model.quantization,
        announce=announce,
    )
    kind = TASKS[config.train.task]
    task = made_task(config, _labels(config, base, announce) if kind.draws_head else ())
    if isinstance(task, Causal):
        return task, base
    ids = (base.tokenizer().pad_token_id, base.tokenizer().eos_token_id, 0)
    pad_id = next(found for found in ids if found is not None)
    return task, replace(base, made_as=model_class_for(task, pad_id))


def _labels(config: Config, base: BaseModel, announce: Callable[[str], None]) -> tuple[str, ...]:
    """The labels of a classification, by a pass over the training data."""
    own = getattr(base.config(), "id2label", None) or {}
    known = [str(own[i]) for i in sorted(own)]
    if all(label == f"LABEL_{i}" for i, label in enumerate(known)):
        known = []  # transformers' own names, where a base has none
    labels = labels_in_data(config, known)
    more = ", ..." if len(labels) > 8 else ""
    listed = ", ".join(f"{i} {label!r}" for i, label in enumerate(labels[:8]))
    announce(f"train.task: classification by {len(labels)} labels: {listed}{more}")
    return labels


@dataclass(frozen=True)
class Adapted:
    """The base on the meta device with its adapters.

    Attributes:
        skeleton: the model.
        lora: the settings, with the names that the base has today.
        quantized: what was packed.
        drawn: parameters of the head that the base lacks.
    """

    skeleton: nn.Module
    lora: LoraConfig
    quantized: Quantized | None
    drawn: tuple[str, ...]


def adapted(config: Config, task: Task, base: BaseModel, resumed: ResumePoint | None) -> Adapted:
    """The skeleton with its adapters, after all checks of names and shapes."""
    lora = lora_config(config, resumed.lora if resumed else None)
    skeleton = base.skeleton()
    if config.adapter.path is not None:
        # Of a resumed run whose adapter is gone, the checkpoint has the settings.
        here = Path(config.adapter.path).expanduser()
        found = here if resumed else adapter_directory(config.adapter.path)
        lora = settings_today(skeleton, lora, found)
    drawn = base.check_stored(skeleton)
    task.check(skeleton)
    quantized = base.pack(skeleton)
    with keyed_by("adapter"):
        if heads := list(_heads(skeleton, lora, drawn)):
            lora = replace(lora, modules_to_save=[*lora.modules_to_save, *heads])
        attach(skeleton, lora, residual=True)
    load_record(skeleton, resumed.record if resumed else None)
    check_dropout(skeleton)
    check_gradients(skeleton, task)
    if resumed is None:
        check_experts(skeleton)
    if config.adapter.path is not None and resumed is None:
        check_adapter(skeleton, adapter_directory(config.adapter.path))
    return Adapted(skeleton, lora, quantized, tuple(drawn))


def _heads(skeleton: nn.Module, lora: LoraConfig, drawn: list[str]) -> Iterator[str]:
    """Modules whose parameters were drawn, and that are not trained whole already."""
    saved = saved_paths(skeleton, lora)
    for path in owners_of(drawn):
        if not any(path == root or path.startswith(f"{root}.") for root in saved):
            yield path
