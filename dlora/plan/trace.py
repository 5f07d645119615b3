"""What a micro-batch takes beside parameters: one forward and backward over fake tensors.

    skeleton (meta) ── a copy with 2 and 3 blocks ── fake tensors on the CPU ── LiveBytes
                                │
                 alive(n blocks) = alive(3) + (n − 3) · (saved(3) − saved(2))

There is no formula for any architecture here: the model's own code runs, on shapes. On the CPU it
takes the fused attention, which saves what the fused kernels on CUDA save. Blocks that are alike
each add what they save for backward; where they differ, all of them run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from dlora.base.eval_mode import keep_in_eval
from dlora.base.recomputation import recompute_blocks
from dlora.config.recompute import Recompute
from dlora.data.encode import Example
from dlora.lora.names import RECORD
from dlora.lora.segments import NotByTokenError
from dlora.objectives.router_loss import whole_loss
from dlora.objectives.sft import Sft
from dlora.plan.activations import Trace, estimate
from dlora.plan.fake_memory import LiveBytes
from dlora.sharding.engines.gather_groups import block_lists
from dlora.tasks import CAUSAL, Task

# What makes the objective of a trace, from what makes a fake copy of another model.
MakesObjective = Callable[[Callable[[nn.Module], nn.Module]], Any]
_FEW = 3  # blocks that are enough to know what one more adds


def trace(
    skeleton: nn.Module,
    rows: int,
    tokens: int,
    *,
    checkpointing: Recompute,
    targets: int | None = None,
    device: str = "cpu",
    task: Task = CAUSAL,
    lengths: Sequence[int] = (),
    objective: MakesObjective = lambda twin_of: Sft(None),
) -> Trace:
    """The figures of a micro-batch of `rows` sequences of `tokens` tokens.

    Args:
        skeleton: the model on the meta device with adapters attached; left as it is.
        checkpointing: which blocks recompute their activations.
        targets: tokens that are targets; None: all of them.
        device: the type of device that it runs on; that of the traced tensors is the CPU.
        task: what the model is trained to do.
        lengths: of sequences that share the one row.
        objective: makes what is minimised.
    """
    targets = rows * tokens if targets is None else targets
    examples = [task.example(n) for n in lengths or [tokens] * rows]
    how = (examples, bool(lengths), checkpointing, targets, device, task, objective)
    try:
        alike = _alike_blocks(skeleton)
        if alike is None:
            return _traced(copy.deepcopy(skeleton), *how)
        path, number = alike
        period = checkpointing.every or 1
        few = period + _FEW - 1 + (number - period - _FEW + 1) % period
        if few > number:
            return _traced(copy.deepcopy(skeleton), *how)
        traces = []
        for count in (few - period, few):
            with _shortened(skeleton, path, count):
                twin = copy.deepcopy(skeleton)
                traces.append(_traced(twin, *how))
        whole = _extrapolated(traces[0], traces[1], (number - few) // period)
        if not checkpointing.offload:
            return whole
        return _offloaded(whole, traces[1].saved - traces[0].saved, number)
    except NotByTokenError:  # so it would be in the run
        raise
    except Exception as error:  # a model's code may need real values
        return estimate(skeleton, rows * tokens, checkpointing, _reason(error), targets, device)


def _reason(error: Exception) -> str:
    """Why a trace failed, in one line."""
    first = (str(error).strip() or type(error).__name__).split("\n")[0]
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"the model's code depends on values of tensors ({first})"
    return first


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch does not print the traceback of an operation that it has no shapes for."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _extrapolated(fewer: Trace, few: Trace, more: int) -> Trace:
    saved, flops = few.saved - fewer.saved, few.flops - fewer.flops
    return Trace(
        saved=few.saved + more * saved,
        blocks=few.blocks + more * saved,
        loss=few.loss + more * saved,
        flops=few.flops + more * flops,
    )


def _offloaded(trace: Trace, block: int, number: int) -> Trace:
    """The same with what each of `number` blocks keeps, `block` bytes, in host memory.

    In backward one of them is on the device again.
    """
    away = number * block
    return replace(
        trace,
        saved=trace.saved - away,
        blocks=trace.blocks - away + block,
        loss=trace.loss - away,
        offloaded=away,
    )


def _traced(
    twin: Any,
    examples: Sequence[Example],
    packs: bool,
    checkpointing: Recompute,
    targets: int,
    device: str,
    task: Task,
    objective: MakesObjective,
) -> Trace:
    """Run a copy of the skeleton, which is used up."""
    _on_cpu(twin)
    recompute_blocks(twin, checkpointing.every)
    keep_in_eval(twin)
    twin.train()
    head = task.head(twin)
    task.install(twin, device)
    fake = FakeTensorMode()
    known = _make_fake(twin, fake)

    def twin_of(other: Any) -> nn.Module:
        made = copy.deepcopy(other).eval()
        _on_cpu(made)
        task.install(made, device)
        known.extend(_make_fake(made, fake))
        return made

    minimised = objective(twin_of)
    with fake:
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
    live = LiveBytes(known)
    batch = (task.packed if packs else task.collate)(examples, pad_id=0)
    _mark_loss(head, live)
    _share_head(twin, head)
    with _quiet(), fake, live:
        made = batch.mapped(fake.from_tensor)
        live.mark(made.targets, targets)
        loss = task.training_loss(twin, made, targets, minimised)
        loss, _ = whole_loss(twin, loss, targets)
        saved = live.now
        loss.backward()
    return Trace(saved, live.peaks[""], live.peaks["loss"], live.flops)


def _on_cpu(model: Any) -> None:
    """Let attention run on a CPU; it saves the same there."""
    if model.config._attn_implementation not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def _mark_loss(head: nn.Module, live: LiveBytes) -> None:
    """The output head's forward, which computes the loss as well, is a phase of its own."""
    open_phases: list[Any] = []

    def enter(*_: Any) -> None:
        open_phases.append(live.phase("loss"))
        open_phases[-1].__enter__()

    def leave(*_: Any) -> None:
        open_phases.pop().__exit__(None, None, None)

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(leave)


def _share_head(model: nn.Module, head: nn.Module) -> None:
    """Let all adapters of a batch that several share act on all rows of the head.

    A run computes the head for the rows of each apart, which its input no longer tells.
    """
    names = model.__dict__.get(RECORD)
    if names is None or names.segments is None:
        return
    before = names.active, names.segments

    def enter(*_: Any) -> None:
        names.active, names.segments = names.segments.names, None

    def leave(*_: Any) -> None:
        names.active, names.segments = before

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(leave)


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> list[Tensor]:
    """Put fake CPU tensors in the place of all parameters and buffers; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def twin_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
            )
        return made[id(tensor)]

    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    slots[name] = twin_of(tensor)  # type: ignore[assignment]
    return list(made.values())


# -- blocks that are alike -----------------------------------------------------------------------


def _alike_blocks(skeleton: nn.Module) -> tuple[str, int] | None:
    """Path and length of the one list of more than a few blocks, if they are all alike."""
    lists = [
        (path, list(skeleton.get_submodule(path).children())) for path in block_lists(skeleton)
    ]
    long = [(path, blocks) for path, blocks in lists if len(blocks) > _FEW]
    if len(long) != 1:
        return None
    [(path, blocks)] = long
    first = _signature(blocks[0])
    return (path, len(blocks)) if all(_signature(b) == first for b in blocks[1:]) else None


def _signature(block: nn.Module) -> list[Any]:
    """Classes, settings and shapes of a block, without its place among the others."""
    return [
        (
            path,
            type(module).__name__,
            sorted(
                (name, value)
                for name, value in vars(module).items()
                if isinstance(value, bool | int | float | str)
                and name not in ("path", "place", "_key")  # an adapter's own
                and "idx" not in name
            ),
            [(name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)],
        )
        for path, module in block.named_modules()
    ]


@contextmanager
def _shortened(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """Inside, the list at `path` has its first blocks only."""
    owner, _, name = path.rpartition(".")
    parent, blocks = model.get_submodule(owner), model.get_submodule(path)
    setattr(parent, name, blocks[:count])  # type: ignore[index]
    try:
        yield
    finally:
        setattr(parent, name, blocks)
