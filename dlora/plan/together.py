"""Several adapters that one run trains together, as a plan sees them: one skeleton, one workload.

micro-batches of each      a: 2 x 512     b: 4 x 256 tokens
of the run, packed         1 x 2,048 tokens in 2 segments; padded: 6 x 512
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from dlora.adapters.settings import keyed_by, lora_config
from dlora.config.adapters import configs_of
from dlora.config.load import Config
from dlora.config.members import ADAPTERS
from dlora.data import Dataset, Dealing
from dlora.data.collate import in_eights
from dlora.data.stream import Stream
from dlora.errors import UsageError, and_more
from dlora.lora.attach import attach, trainable_parameters
from dlora.lora.config import LoraConfig
from dlora.lora.names import names_of
from dlora.lora.segments import Segment, Segments
from dlora.objectives.router_loss import find_router_loss
from dlora.plan.micro_batches import settle_micro_batches
from dlora.plan.workload import Workload, workload_of
from dlora.registry import room

NO_GRAPHS = "none: blocks that several adapters share run without graphs"


class Several:
    """The adapters of a configuration that trains several, on a skeleton.

    Raises:
        UsageError: they cannot be trained together on this base.
    """

    def __init__(self, config: Config, skeleton: nn.Module) -> None:
        self._configs, self._skeleton = configs_of(config), skeleton
        adapters = {}
        for name, own in self._configs.items():
            with of_adapter(name):
                adapters[name] = lora_config(own)
                check_apart(skeleton, adapters[name], own.train.objective)
        attach_each(skeleton, adapters)

    def __str__(self) -> str:
        return f"{len(self._configs)} adapters in one run: {and_more(list(self._configs), 8)}"

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Their tensors, by full names."""
        return trained_of(self._skeleton, list(self._configs))

    def workload(self, world: int, *, packs: bool) -> Workload:
        """That of a step of all; every sequence may be the longest."""
        each = {
            name: workload_of(own, world, dealing=dealing_of(own, None, world, packs=packs))
            for name, own in self._configs.items()
        }
        return joined(each, self._skeleton, packs=packs)


def dealing_of(
    config: Config, data: Dataset | Stream | None, world: int, *, packs: bool
) -> Dealing:
    """How one adapter's micro-batches are made: by sequences, or by a number of tokens."""
    undecided: Any = lambda dealing: None  # noqa: E731 - the plan is for all of them, later
    return settle_micro_batches(config, data, world, packs, undecided)[0]


@contextmanager
def of_adapter(name: str) -> Iterator[None]:
    """Inside, a `UsageError` begins with whose it is."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{ADAPTERS}[{name}]: {error}") from None


def attach_each(skeleton: nn.Module, adapters: Mapping[str, LoraConfig]) -> None:
    """Attach all adapters, by name, to a base on the meta device.

    Raises:
        UsageError: the settings of one do not fit the model, or several cannot act on it.
    """
    for name, lora in adapters.items():
        with of_adapter(name), keyed_by("adapter"):
            attach(skeleton, lora, name=name)


def trained_of(skeleton: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """The trained tensors of the adapters of these names, by their full names."""
    return {n: p for name in names for n, p in trainable_parameters(skeleton, name).items()}


def check_apart(skeleton: nn.Module, lora: LoraConfig, objective: str) -> None:
    """Raise a `UsageError` for what acts on all tokens of a batch alike, or counts them as one."""
    if lora.modules_to_save:
        raise UsageError(
            f"adapter.modules_to_save: {', '.join(lora.modules_to_save)}: a module that is "
            "trained whole acts on all tokens alike; train one adapter at a time"
        )
    if lora.target_parameters:
        raise UsageError(
            f"adapter.target_parameters: {', '.join(lora.target_parameters)}: a whole parameter "
            "acts on all tokens alike; train one adapter at a time"
        )
    if find_router_loss(skeleton) is not None:
        raise UsageError(
            "model.path: output_router_logits asks for a loss over all tokens of a micro-batch; "
            "set it to false in the base's config.json, or train one adapter at a time"
        )
    if not hasattr(room("objectives")[objective].load(), "loss_of_parts"):
        raise UsageError(
            f"train.objective: {objective} has no loss_of_parts, so it trains one adapter at a time"
        )


def joined(each: Mapping[str, Workload], skeleton: nn.Module, *, packs: bool) -> Workload:
    """The largest passes of all adapters as one, whose segments the skeleton gets for its trace.

    Args:
        each: the workload of a run of each alone, by name.
        packs: whether sequences share rows.
    """
    lengths = {n: w.lengths or (w.tokens,) * w.rows for n, w in each.items()}
    rows = 1 if packs else sum(w.rows for w in each.values())
    total = sum(map(sum, lengths.values()))
    tokens = in_eights(total) if packs else max(w.tokens for w in each.values())
    sizes = {n: sum(lengths[n]) if packs else w.rows * tokens for n, w in each.items()}
    segments, start = [], 0
    for name, size in sizes.items():
        segments.append(Segment(name, start, start + size))
        start += size
    names_of(skeleton).segments = Segments(tuple(segments), rows, tokens)
    first = next(iter(each.values()))
    return replace(
        first,
        rows=rows,
        tokens=tokens,
        micro_batches=max(w.micro_batches for w in each.values()),
        targets=sum(w.rows * w.tokens if w.targets is None else w.targets for w in each.values()),
        lengths=tuple(n for own in lengths.values() for n in own) if packs else (),
        shapes=sum(w.shapes for w in each.values()),
        optimizers={name: w.optimizer for name, w in each.items()},
    )
