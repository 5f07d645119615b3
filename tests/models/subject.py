"""What is measured of one base, once, and its references: transformers, PEFT, bitsandbytes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

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
        # Keys that PEFT's model of the adapter lacks, and its model of its own file of it as well.
        self.unread_by_peft: set[str] = set()

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
        """PEFT's model with that adapter, trainable: as PEFT reads it, or where it does not even
        read what it saves itself, with the tensors put into their places."""
        model = self.in_peft(self.adapter)
        self.unread_by_peft = self.not_read_back(model, self.adapter)
        if self.unread_by_peft:
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in _tensors(self.adapter).items():
                    own[re.sub(r"\.(lora_\w+)", r".\1.default", name)].copy_(value)
            model.save_pretrained(again := self.directory / "saved_by_peft")
            self.unread_by_peft &= self.not_read_back(self.in_peft(again), again)
        return model

    def in_peft(self, adapter: Path) -> Any:
        """PEFT's model with the adapter at that path."""
        base = self.architecture.read(self.directory)
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()

    def not_read_back(self, model: Any, adapter: Path) -> set[str]:
        """The keys of an adapter's file whose values PEFT's model of it does not have."""
        read = peft.get_peft_model_state_dict(model)
        return {
            name
            for name, value in _tensors(adapter).items()
            if name not in read or not torch.equal(read[name], value)
        }

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
        with torch.set_grad_enabled(backward), without_cache(model, backward):
            mean = _own_loss(model, ids, labels)
        total += float(mean.detach()) * _targets(example)
        if backward:
            (mean * (_targets(example) / targets)).backward()
    return total / targets


def _own_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The class's mean loss of the next tokens.

    Some classes (Bart's decoder) do not shift labels themselves; they get shifted ones. One (Git)
    takes the first tokens for an image's, and cannot compute a loss of text: that of its logits.
    """
    try:
        out = call(model, ids, labels=labels)
    except ValueError:
        return F.cross_entropy(call(model, ids).logits[0, :-1].float(), labels[0, 1:])
    with torch.no_grad():
        logits, found = out.logits[0].float(), float(out.loss)
        in_place = float(F.cross_entropy(logits, labels[0]))
        shifted = float(F.cross_entropy(logits[:-1], labels[0, 1:]))
    # The two may be close by chance, so being close is not enough.
    is_in_place = math.isclose(found, in_place, rel_tol=1e-5)
    if not is_in_place or abs(found - shifted) < abs(found - in_place):
        return out.loss
    return call(model, ids, labels=F.pad(labels[:, 1:], (0, 1), value=NO_TARGET)).loss


@contextlib.contextmanager
def without_cache(model: Any, yes: bool = True) -> Iterator[None]:
    """Inside, the class makes no cache, as in training: some write into it, past autograd."""
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}
    before = {id(p): p.use_cache for p in parts.values() if yes and hasattr(p, "use_cache")}
    for key in before:
        parts[key].use_cache = False
    try:
        yield
    finally:
        for key, value in before.items():
            parts[key].use_cache = value


def _tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


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


def depends_on_values(s: Subject) -> bool:
    """Whether the class itself, without dlora, cannot run on shapes alone, as torch finds."""
    model, ids = s.reference, s.ids
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        try:
            call(model, fake.from_tensor(ids))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
    return False


def failing_in_peft(model: Any, paths: Collection[str], run: Run) -> set[str]:
    """Those of the layers at `paths` that are of a class with which PEFT's adapter fails.

    One layer of each class has an adapter at a time, and the model sees the text of a run.
    """
    failing: set[str] = set()
    kinds: dict[type, list[str]] = {}
    for path in sorted(paths):
        kinds.setdefault(type(model.get_submodule(path)), []).append(path)
    for alike_ones in kinds.values():
        with_one = peft.get_peft_model(model, peft.LoraConfig(target_modules=alike_ones[:1]))
        try:
            loss_of(with_one, run)
        except Exception:  # whatever PEFT raises for it
            failing.update(alike_ones)
        model = with_one.unload()
    return failing


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
