"""What one rank does in an optimizer step, as far as its bytes depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from dlora.config.load import Config, OptimizerConfig
from dlora.config.recompute import Recompute, ways
from dlora.data import Dataset, Dealing, Sampler
from dlora.data.collate import PAD_TO, in_eights
from dlora.data.encode import count_targets
from dlora.lora.layers import adapter_of
from dlora.objectives.objective import objective_of
from dlora.tasks import TASKS, Task

MANY = 1_000  # shapes of the micro-batches of a run that is not measured
EXACT_SEQUENCES = 50_000  # up to so many every micro-batch of a run is measured, in about a second


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        rows, tokens: of the largest micro-batch, padded.
        micro_batches: forward passes.
        optimizer: the `optimizer` section.
        checkpointing: which activations are recomputed in backward.
        targets: most target tokens of a micro-batch; None: every token may be one.
        lengths: of the sequences that share its one row; empty: each has a row of its own.
        gradient_bytes: of an element of the gradients as it is sent; None: its own.
        extra_passes: over W0 in each micro-batch, without a gradient.
        shapes: how many numbers of rows and tokens the run's micro-batches have.
        reference: how a policy is compared: "joined", each block computes for the reference as
            well; "apart", in a pass of its own; empty: with nothing.
        copied: whether that is a copy of the trained tensors as they began.
        optimizers: the `optimizer` section of each of several adapters, by name, that are trained
            together; empty: `optimizer` is that of the one there is.
    """

    rows: int
    tokens: int
    micro_batches: int
    optimizer: OptimizerConfig
    checkpointing: Recompute
    targets: int | None = None
    lengths: tuple[int, ...] = ()
    gradient_bytes: int | None = None
    shapes: int = 1
    reference: str = ""
    copied: bool = False
    extra_passes: int = 0
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=dict)

    def groups(
        self, trained: Mapping[str, nn.Parameter]
    ) -> list[tuple[OptimizerConfig, Mapping[str, nn.Parameter]]]:
        """(optimizer section, its tensors) of each adapter, of all trained ones by full names."""
        if not self.optimizers:
            return [(self.optimizer, trained)]
        own: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.optimizers}
        for path, parameter in trained.items():
            own[adapter_of(path)][path] = parameter
        return [(self.optimizers[name], named) for name, named in own.items()]

    def __str__(self) -> str:
        packed = f" ({len(self.lengths)} sequences)" if self.lengths else ""
        return f"{self.rows} x {self.tokens} tokens{packed}"


def workload_of(
    config: Config,
    world: int,
    data: Dataset | None = None,
    sampler: Sampler | None = None,
    *,
    dealing: Dealing,
    task: Task | None = None,
) -> Workload:
    """The workload of a run on `world` ranks.

    Args:
        data, sampler: what the run trains on, and in which order. Without them every sequence may
            have `data.max_length` tokens, all of them targets.
        dealing: makes micro-batches.
        task: what the model is trained to do; None: `train.task`.
    """
    kind = task or TASKS[config.train.task]()
    longest = config.data.max_length * kind.longest
    if data is not None:  # one of the longest sequences alone is likely to come
        longest = data.report.longest
    longest = kind.whole(longest)
    sequences, targets = config.train.global_batch_size, None
    micro_batches, lengths = _of_equal(longest, sequences, world, dealing)
    shapes = 1 if data is None else MANY
    few = sampler is not None and sampler.sequences(sampler.total_steps) <= EXACT_SEQUENCES
    if data is not None and sampler is not None and few:
        micro_batches, lengths, targets, shapes = _largest(
            data, sampler, world, dealing, kind.sizes(data)
        )
    shared = dealing.packs and len(lengths) > 1
    return Workload(
        rows=1 if shared else len(lengths),
        tokens=in_eights(sum(lengths) if shared else max(lengths)),
        micro_batches=micro_batches,
        optimizer=config.optimizer,
        checkpointing=next(ways(config.sharding.activation_checkpointing, "")),
        targets=targets,
        lengths=lengths if shared else (),
        gradient_bytes=2 if config.sharding.reduce_dtype == "bfloat16" else None,
        shapes=shapes,
        extra_passes=getattr(objective_of(config), "extra_passes", 0),
    )


def _of_equal(
    longest: int, sequences: int, world: int, dealing: Dealing
) -> tuple[int, tuple[int, ...]]:
    """(micro-batches of a step, lengths of the largest) of sequences of at most so many tokens."""
    [first, *_] = dealing(range(sequences), [longest] * sequences, world)
    rows = max(1, len(first[0]))
    if dealing.tokens:  # shorter ones fill it
        rows = min(-(-sequences // world), -(-in_eights(dealing.tokens) // longest))
    return len(first), (longest,) * rows


def _largest(
    data: Dataset, sampler: Sampler, world: int, dealing: Dealing, sizes: Any
) -> tuple[int, tuple[int, ...], int, int]:
    """(most micro-batches of a step, lengths of the run's largest, most targets of any, shapes)."""
    lengths, places, most, number = data.lengths, PAD_TO, 0, 1
    shapes = set[tuple[int, int]]()
    largest: tuple[int, ...] = (PAD_TO,)
    targets_of = cache(lambda i: count_targets(data[i].labels))
    for step in range(sampler.total_steps):
        for micros in dealing(sampler.step(step), lengths, world):
            number = max(number, len(micros))
            for ids in filter(None, micros):
                these = tuple(int(sizes[i]) for i in ids)
                shapes.add((1 if dealing.packs else len(ids), dealing.places(these)))
                if dealing.places(these) > places:
                    largest, places = these, dealing.places(these)
                most = max(most, sum(map(targets_of, ids)))
    return number, largest, most, len(shapes)
