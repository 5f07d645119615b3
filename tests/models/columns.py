"""The columns of the table: one function each, from a `Subject` to a `Cell`.

What a column compares with is never dlora's own: transformers' class, PEFT, or bitsandbytes.
"""

from __future__ import annotations

import math
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from transformers import TextStreamer

import dlora.generate
from dlora import LoraConfig, attach
from dlora.lora.attach import attachment_of
from dlora.quant.linear import is_packed

from .architectures import Architecture, call, first_line
from .cells import YES, Cell, alike, near, same_modules
from .runs import Figures, Refused, figures, silence, started
from .subject import (
    Subject,
    by_bitsandbytes,
    depends_on_values,
    failing_in_peft,
    loss_of,
    reached,
    read_by_parent,
    refusing,
)

PROMPT, NEW_TOKENS = "one two", 6


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
    """`all-linear` adapts the layers that PEFT's means, but, said, for those that text never gets
    to, those whose weight their parent reads itself, and those that PEFT's adapter cannot run."""
    attachment, base = attachment_of(s.run.model), s.architecture.read(s.directory)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    # Its own rule, and not its adapters: those replace what an older transformers called experts.
    meant = {*_maybe_include_all_linear_layers(config, base).target_modules}
    if attachment.left and (missing := meant - {*attachment.adapted}):
        meant -= missing - reached(base, missing, s.run)
        meant -= {path for path in missing if read_by_parent(base, path)}
        meant -= failing_in_peft(s.architecture.read(s.directory), missing & meant, s.run)
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
    if unread := sorted(s.unread_by_peft):
        return Cell("class", f"PEFT reads back less than it saves itself, not {unread[0]}")
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
    tokenizer, model = s.run.prepared.tokenizer, s.peft_model
    ids = dlora.generate.encode(tokenizer, PROMPT, None)
    try:
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
    except Exception as error:  # whatever a class raises
        return Cell("class", f"its generate fails: {first_line(error)}")
    words = ["--base", str(s.directory), "--adapter", str(s.adapter), "--dtype", "float32"]
    words += ["--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
    with silence() as ours, refusing():
        dlora.generate.main(words)
    if ours.getvalue() != theirs.getvalue():
        return Cell("✗", f"{ours.getvalue()!r} instead of {theirs.getvalue()!r}")
    return YES


def plan(s: Subject) -> Cell:
    """The plan traces the model's activations."""
    estimated = s.run.prepared.budget.memory.activations.estimated
    if estimated and depends_on_values(s):
        return Cell("class", f"estimated, and so it says: {estimated}")
    return Cell("✗", f"estimated: {estimated}") if estimated else YES


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


# Columns that compare sequences beside padding with each alone.
PADDED = {"loss", "fsdp2", "zero3", "nf4", "int8", "checkpointing", "grouping", "in PEFT"}


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
        if cell.mark == "✗" and name in PADDED and not trace and subject.sees_padding:
            cell = Cell("class", "its own logits depend on padding, with an attention mask too")
        found[name] = (cell.mark, cell.reason)
        if trace:
            print(f"{architecture.model_type}, {name}: {trace}", file=sys.stderr)
    return found
