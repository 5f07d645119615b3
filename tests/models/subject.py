"""What is measured of one base, once, and its references: transformers, PEFT, bitsandbytes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor

import dlora.export.command
from dlora import save_adapter
from dlora.data.encode import NO_TARGET
from dlora.errors import UsageError
from dlora.train import Run

from .architectures import Architecture, call
from .cells import YES, alike
from .runs import Figures, Refused, figures, silence, started


class Subject:
    """One base in files, what is measured of it once, and the references."""

    def __init__(self, architecture: Architecture, directory: Path, two: dict[str, Any]) -> None:
        self.architecture, self.directory, self.two = architecture, directory, two

    @functools.cached_property
    def reference(self) -> Any:
        """The base as transformers reads it."""
        return self.architecture.read(self.directory)

    @functools.cached_property
    def run(self) -> Run:
        """dlora's run on one rank, all sequences in one micro-batch."""
        return started(self.directory, traced=True)

    @functools.cached_property
    def figures(self) -> Figures:
        """Of that run; its adapters are random afterwards."""
        return figures(self.run)

    @functools.cached_property
    def own_loss(self) -> float:
        """Mean loss over all targets by the class itself, a sequence at a time."""
        return loss_of(self.reference, self.run)

    @functools.cached_property
    def adapter(self) -> Path:
        """The run's random adapter, saved."""
        assert self.figures
        save_adapter(self.run.model, path := self.directory / "adapter")
        return path

    @functools.cached_property
    def peft_model(self) -> Any:
        """PEFT's model with that adapter, trainable."""
        base = self.architecture.read(self.directory)
        return peft.PeftModel.from_pretrained(base, self.adapter, is_trainable=True).eval()

    @functools.cached_property
    def ids(self) -> Tensor:
        """The longest sequence [1, T]."""
        sequences = [example.input_ids for example in self.run.prepared.train]
        return torch.tensor(max(sequences, key=len), dtype=torch.int64)[None]

    @functools.cached_property
    def merged(self) -> Path:
        """The merged model of base and adapter."""
        target = self.directory / "merged"
        words = ["--adapter", str(self.adapter), "--base", str(self.directory), "--merge"]
        with silence(), refusing():
            dlora.export.command.main([*words, "--to", str(target)])
        return target

    @functools.cached_property
    def sees_padding(self) -> bool:
        """Whether the class's own logits depend on padding, although a mask says where it is."""
        for example in self.run.prepared.train:
            ids = torch.tensor(example.input_ids, dtype=torch.int64)[None]
            padded = F.pad(ids, (0, 40), value=self.run.prepared.pad_id)
            mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
            with torch.no_grad():
                alone = call(self.reference, ids).logits
                beside = call(self.reference, padded, attention_mask=mask).logits
            if alike(beside[:, : ids.shape[1]], alone, "logits") is not YES:
                return True
        return False

    def of_run(self, **settings: Any) -> Figures:
        """The figures of a run on one rank with other settings."""
        return figures(started(self.directory, **settings))


class refusing:  # noqa: N801
    """Inside, a `UsageError` of a command is a refusal."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, UsageError):
            raise Refused(str(error)) from error


def loss_of(model: Any, run: Run, *, backward: bool = False) -> float:
    """Σ of the class's own loss over the sequences of a run, one at a time, / their targets."""
    total, targets = 0.0, sum(_targets(e) for e in run.prepared.train)
    for example in run.prepared.train:
        ids, labels = (
            torch.tensor(values, dtype=torch.int64)[None]
            for values in (example.input_ids, example.labels)
        )
        with torch.set_grad_enabled(backward):
            mean = _own_loss(model, ids, labels)
        total += float(mean.detach()) * _targets(example)
        if backward:
            (mean * (_targets(example) / targets)).backward()
    return total / targets


def _own_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The class's mean loss of the next tokens.

    Some classes (Bart's decoder) do not shift labels themselves; they get shifted ones.
    """
    out = call(model, ids, labels=labels)
    with torch.no_grad():
        in_place = F.cross_entropy(out.logits[0].float(), labels[0])
        if not torch.isclose(out.loss, in_place, rtol=1e-5):
            return out.loss
    return call(model, ids, labels=F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)).loss


def _targets(example: Any) -> int:
    return int((example.labels[1:] != NO_TARGET).sum())


def reached(model: Any, paths: Collection[str], run: Run) -> set[str]:
    """Those of the layers at `paths` that are called when a model sees the text of a run."""
    called: set[str] = set()
    for path in paths:
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    loss_of(model, run)
    return called


def read_by_parent(model: Any, path: str) -> bool:
    """Whether the class around a layer computes with the layer's weight itself."""
    parent, _, name = path.rpartition(".")
    source = inspect.getsource(type(model.get_submodule(parent)))
    return re.search(rf"\b{re.escape(name)}\.weight\b", source) is not None


def by_bitsandbytes(rows: Tensor, setting: str) -> Tensor:
    """What bitsandbytes makes of a matrix; of NF4 with scales in bfloat16, as dlora stores them."""
    if setting == "int8":
        codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows.clone())
        return codes.float() * (largest.float()[:, None] / 127)
    codes, largest = torch.ops.bitsandbytes.quantize_4bit(rows, 64, "nf4", torch.uint8)
    scales = largest.bfloat16().float()
    shape = [*rows.shape]
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", shape, torch.float32)
