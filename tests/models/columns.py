"""The columns of the table: one function each, from a `Subject` to a `Cell`.

What a column compares with is never dlora's own: transformers' class, PEFT, or bitsandbytes.
"""

from __future__ import annotations

import functools
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import Tensor
from transformers import TextStreamer

import dlora.export.command
import dlora.generate
from dlora import LoraConfig, attach, save_adapter
from dlora.data.encode import NO_TARGET
from dlora.errors import UsageError
from dlora.lora.attach import attachment_of
from dlora.quant.linear import is_packed
from dlora.train import Run

from .architectures import Architecture, call, first_line
from .runs import Figures, Refused, figures, silence, started

CLOSE = 2e-5  # relative, of float32 losses and norms that are summed in another order
PROMPT, NEW_TOKENS = "one two", 6


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        mark: `✓`; `refused`: by the command, before a weight is read; `class`: transformers' class
            or PEFT cannot; `✗`: it is wrong.
        reason: in words, where the mark is not `✓`.
    """

    mark: str
    reason: str = ""


YES = Cell("✓")


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


# -- the columns ---------------------------------------------------------------------------------


def loads(s: Subject) -> Cell:
    """dlora's loader with the default `attn_implementation` gives from_pretrained's logits."""
    model = s.run.model.eval()
    with torch.no_grad():
        return alike(call(model, s.ids).logits, call(s.reference, s.ids).logits, "logits")


def loss(s: Subject) -> Cell:
    """The run's loss on one rank, padded, is the class's own of each sequence alone."""
    return near(s.figures.base, s.own_loss)


def fsdp2(s: Subject) -> Cell:
    """Two ranks with W0 divided by FSDP2: the class's loss, and one rank's gradient."""
    return divided(s, "fsdp2")


def zero3(s: Subject) -> Cell:
    """The same with ZeRO-3."""
    return divided(s, "zero3")


def nf4(s: Subject) -> Cell:
    """Packed: the class's own loss with bitsandbytes' values in place of W0."""
    return packed(s, "nf4")


def int8(s: Subject) -> Cell:
    """The same in int8."""
    return packed(s, "int8")


def checkpointing(s: Subject) -> Cell:
    """Activation checkpointing changes neither loss nor gradient."""
    again = s.of_run(sharding__activation_checkpointing=True)
    return near(
        again.trained_loss, s.figures.trained_loss, again.trained_norm, s.figures.trained_norm
    )


def grouping(s: Subject) -> Cell:
    """One sequence a micro-batch, or all padded in one: the same loss and gradient in training."""
    alone = s.of_run(train__micro_batch_size=1)
    return near(
        alone.trained_loss, s.figures.trained_loss, alone.trained_norm, s.figures.trained_norm
    )


def all_linear(s: Subject) -> Cell:
    """`all-linear` adapts the layers that PEFT's means, but for those that text never gets to."""
    attachment, base = attachment_of(s.run.model), s.architecture.read(s.directory)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    # Its own rule, and not its adapters: those replace what an older transformers called experts.
    meant = {*_maybe_include_all_linear_layers(config, base).target_modules}
    if attachment.left and (missing := meant - {*attachment.adapted}):  # said, and so checked
        meant -= missing - reached(base, missing, s.run)
    return same_modules(attachment.adapted, sorted(meant))


def defaults(s: Subject) -> Cell:
    """PEFT's default targets of the model type, by name, adapt the modules that PEFT adapts."""
    names = DEFAULTS.get(s.reference.config.model_type)
    if names is None:
        return Cell("–", "PEFT has no default targets for it")
    try:
        model = peft.get_peft_model(
            s.architecture.read(s.directory), peft.LoraConfig(task_type="CAUSAL_LM")
        )
    except ValueError as error:
        return Cell("class", f"PEFT: {first_line(error)}")
    theirs = list(model.base_model.targeted_module_names)
    skeleton = s.run.prepared.base.skeleton()
    with refusing():
        attach(
            skeleton, LoraConfig(r=4, target_modules=names if isinstance(names, str) else [*names])
        )
    return same_modules(attachment_of(skeleton).adapted, theirs)


def in_peft(s: Subject) -> Cell:
    """The saved adapter loads in PEFT: equal logits, loss and gradient."""
    model, ours = s.peft_model, s.run.model.eval()
    with torch.no_grad():
        cell = alike(call(ours, s.ids).logits, call(model, s.ids).logits, "logits")
    if cell is not YES:
        return cell
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = loss_of(model, s.run, backward=True)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained if p.grad is not None))
    return near(s.figures.loss, theirs, s.figures.norm, norm)


def merging(s: Subject) -> Cell:
    """The merged model loads in transformers: PEFT's logits."""
    merged, model = s.architecture.read(s.merged), s.peft_model
    with torch.no_grad():
        return alike(call(merged, s.ids).logits, call(model, s.ids).logits, "logits")


def generate(s: Subject) -> Cell:
    """`dlora.generate` writes what PEFT's model writes."""
    words = ["--base", str(s.directory), "--adapter", str(s.adapter), "--dtype", "float32"]
    words += ["--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
    with silence() as ours, refusing():
        dlora.generate.main(words)
    tokenizer = s.run.prepared.tokenizer
    ids = dlora.generate.encode(tokenizer, PROMPT, None)
    model = s.peft_model
    with silence() as theirs, torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    if ours.getvalue() != theirs.getvalue():
        return Cell("✗", f"{ours.getvalue()!r} instead of {theirs.getvalue()!r}")
    return YES


def plan(s: Subject) -> Cell:
    """The plan traces the model's activations."""
    estimated = s.run.prepared.budget.memory.activations.estimated
    return Cell("✗", f"estimated: {estimated}") if estimated else YES


COLUMNS: dict[str, Callable[[Subject], Cell]] = {
    "loads": loads,
    "loss": loss,
    "fsdp2": fsdp2,
    "zero3": zero3,
    "nf4": nf4,
    "int8": int8,
    "checkpointing": checkpointing,
    "grouping": grouping,
    "all-linear": all_linear,
    "PEFT's targets": defaults,
    "in PEFT": in_peft,
    "merged": merging,
    "generate": generate,
    "plan": plan,
}


def cells(
    architecture: Architecture, directory: Path, two: dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """(mark, reason) of every column, on a worker, whose log has the tracebacks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject, found = Subject(architecture, directory, two), {}
    for name, column in COLUMNS.items():
        trace = ""
        try:
            cell = column(subject)
        except Refused as error:
            cell = Cell("refused", str(error))
        except Exception as error:  # whatever is wrong is the table's subject
            cell, trace = Cell("✗", first_line(error)), traceback.format_exc()
        found[name] = (cell.mark, cell.reason)
        if trace:
            print(f"{architecture.model_type}, {name}: {trace}", file=sys.stderr)
    return found


# -- comparisons ---------------------------------------------------------------------------------


def alike(ours: Tensor, wanted: Tensor, what: str) -> Cell:
    """Whether two tensors are equal but for the order of sums."""
    if ours.shape != wanted.shape:
        return Cell("✗", f"{what} {list(ours.shape)} instead of {list(wanted.shape)}")
    error = float((ours - wanted).norm() / wanted.norm())
    return YES if error < 10 * CLOSE else Cell("✗", f"{what} differ by {error:.1g}")


def near(loss: float, wanted: float, norm: float = 0.0, wanted_norm: float = 0.0) -> Cell:
    """Whether loss, and gradient norm, are the reference's."""
    for what, one, other in (("loss", loss, wanted), ("gradient norm", norm, wanted_norm)):
        if not math.isclose(one, other, rel_tol=CLOSE if what == "loss" else 20 * CLOSE):
            return Cell("✗", f"{what} {one:.5f} instead of {other:.5f}")
    return YES


def same_modules(ours: list[str], theirs: list[str]) -> Cell:
    """Whether the same modules are adapted."""
    more, fewer = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
    if not more and not fewer:
        return YES
    parts = [f"{len(fewer)} of PEFT's are missing, as {fewer[0]}"] if fewer else []
    parts += [f"{len(more)} are not PEFT's, as {more[0]}"] if more else []
    return Cell("✗", "; ".join(parts))


def divided(s: Subject, engine: str) -> Cell:
    """Two ranks: the class's loss, one rank's loss and gradient with random adapters."""
    two = s.two[engine]
    if not isinstance(two, Figures):
        return Cell(*two)
    cell = near(two.base, s.own_loss)
    return cell if cell is not YES else near(two.loss, s.figures.loss, two.norm, s.figures.norm)


def packed(s: Subject, setting: str) -> Cell:
    """The packed run's loss is the class's with bitsandbytes' values in place of W0."""
    run = started(s.directory, model__quantization=setting)
    reference = s.architecture.read(s.directory)
    count = 0
    for path, module in run.model.named_modules():
        if is_packed(module):
            weight = reference.get_submodule(path).weight.detach()
            rows = weight.t() if module.packing.transposed else weight
            values = by_bitsandbytes(rows.contiguous(), setting)
            weight.copy_(values.t() if module.packing.transposed else values)
            count += 1
    return (
        near(figures(run).base, loss_of(reference, s.run))
        if count
        else Cell("✗", "nothing is packed")
    )


def by_bitsandbytes(rows: Tensor, setting: str) -> Tensor:
    """What bitsandbytes makes of a matrix; of NF4 with scales in bfloat16, as dlora stores them."""
    if setting == "int8":
        codes, largest, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(rows.clone())
        return codes.float() * (largest.float()[:, None] / 127)
    codes, largest = torch.ops.bitsandbytes.quantize_4bit(rows, 64, "nf4", torch.uint8)
    scales = largest.bfloat16().float()
    shape = [*rows.shape]
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", shape, torch.float32)


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
