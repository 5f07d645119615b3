"""A base with an adapter, opened on all ranks: checked by names and shapes, then loaded.

open_model   the tokenizer, the skeleton and the task: what can be wrong, no weights
load         this rank's share of W0, and the adapter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.source import AdapterSource
from dlora.base.identity import identity
from dlora.base.model import BaseModel
from dlora.cli import answering, chosen_base, naming_base, placed
from dlora.data import Example
from dlora.data.collate import Batch
from dlora.data.stops import stop_tokens
from dlora.errors import UsageError
from dlora.evaluation.settings import Settings, base_of_run, settled
from dlora.lora.tasks import HEADS
from dlora.sharding.topology import Topology
from dlora.tasks import TASKS, Task
from dlora.tasks.limits import Limits, limits_of, pad_token
from dlora.tasks.made_as import model_class_for
from dlora.tasks.packing import settle_packing

_TASKS = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}  # of PEFT's words
Announce = Callable[[str], None]


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be loaded.

    Attributes:
        option: that names the base in errors.
        ends: tokens that end an answer.
        packs: whether sequences share rows.
        known: the identity of the base, where it is known.
    """

    base: BaseModel
    option: str
    source: AdapterSource | None
    settings: Settings
    task: Task
    tokenizer: Any
    limits: Limits
    pad_id: int
    ends: Sequence[int]
    packs: bool
    known: str | None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch, on the CPU."""
        collate = self.task.packed if self.packs else self.task.collate
        return collate(examples, self.pad_id)

    def stops(self, of_model: Any) -> list[int]:
        """All tokens that end an answer.

        Args:
            of_model: `eos_token_id` of its generation settings.
        """
        return stop_tokens(self.tokenizer, of_model, self.ends)

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as a user reads them."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def load(self, where: str, topology: Topology, device: torch.device) -> nn.Module:
        """The model with its adapter; collective where W0 is sharded."""
        with naming_base(self.option):
            model: nn.Module = placed(self.base, where, topology, device)
        if self.source is not None:
            self.source.attach_to(model)
            self.source.load_into(model)
        self.task.install(model)
        return model


def open_model(args: Any, announce: Announce) -> OpenedModel:
    """Open the base and the adapter that a command line names.

    Args:
        args: with `base`, `adapter`, `trust_remote_code`, and the fields of `Settings`.

    Raises:
        UsageError: one of them cannot be read, they do not fit, or the adapter's task is none that
            is evaluated.
    """
    source = open_adapter(args.adapter) if args.adapter else None
    settings = settled(vars(args), source.directory if source else None, announce)
    base, option = chosen_base(
        args.base,
        source,
        dtype=settings.dtype,
        trust_remote_code=args.trust_remote_code,
        announce=announce,
        quantization=settings.quantization,
    )
    with naming_base(option):
        tokenizer = base.tokenizer()
        encodes = getattr(base.config(), "is_encoder_decoder", False)
    task = _task_of(source, encodes)
    if task.format:
        settings = replace(settings, format=task.format)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(token for token in candidates if token is not None)
    if task.name != "causal":
        base = replace(base, made_as=model_class_for(task, pad_id))
    with naming_base(option):
        skeleton = base.skeleton()
        base.check_stored(skeleton)
        task.check(skeleton)
        packed = base.pack(skeleton)
    if packed is not None:
        announce(f"quantization: {packed}")
    known = identity(base, skeleton)
    before = base_of_run(source.directory) if source else None
    if before and known and before != known:
        announce(f"warning: {args.adapter} was trained on another base than {base.path}")
    packs = settle_packing(settings.packing, task, skeleton)
    limits, pad_id = limits_of(tokenizer, skeleton), pad_token(tokenizer, skeleton)
    ends = answering(tokenizer, source)
    if source is not None:
        source.attach_to(skeleton)  # an adapter that does not fit fails before weights are read
    return OpenedModel(
        base, option, source, settings, task, tokenizer, limits, pad_id, ends, packs, known
    )


def _task_of(source: AdapterSource | None, encodes: bool) -> Task:
    """What the model was trained to do.

    Raises:
        UsageError: something else than dlora trains.
    """
    word = source.task if source else None
    if source is not None and word in HEADS and word not in _TASKS:
        raise UsageError(
            f"--adapter: {source.directory} is of task_type {word}, which dlora does not evaluate"
        )
    name = _TASKS.get(word or "", "seq2seq" if encodes else "causal")
    kind = TASKS[name]
    return kind(source.labels if source and kind.draws_head else ())
