"""AdaLoRA's averages and scores of the elements of a replica's adapters.

Every rank follows the elements of its share: all of them, or its part of them where the optimizer
state is divided. One sum over ranks completes the scores, bit-identical on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.lora.adalora import importance
from dlora.lora.variants.adalora import TRIPLET_DIM, AdaLoraAdapter, AdaLoraConfig
from dlora.sharding.replica.optimizer_state import LocalSlice, States
from dlora.sharding.replica.replica import Replica


@dataclass(frozen=True)
class Triplets:
    """The triplets of one module among all: `place` in the flat vector of scores."""

    path: str
    adapter: AdaLoraAdapter
    place: slice

    @property
    def prefix(self) -> str:
        """Of the names of its parameters."""
        return f"{self.adapter.place}."

    @property
    def size(self) -> int:
        """Parameters of one triplet: m + n + 1."""
        return self.adapter.lora_A.shape[1] + self.adapter.lora_B.shape[0] + 1


class TripletScores:
    """The averages of a rank's elements, all 0 at first, and the scores made of them."""

    def __init__(
        self, modules: Sequence[Triplets], replica: Replica, config: AdaLoraConfig
    ) -> None:
        self._modules, self._replica, self._config = modules, replica, config
        held = replica.strategy.local_slices()
        names = [module.prefix + name for module in modules for name in TRIPLET_DIM]
        self._held = {name: held[name] for name in names}
        numel = sum(here.stop - here.start for here in self._held.values())
        kinds = importance.IMPORTANCES[config.importance]
        self._averages = {kind: replica.strategy.values.new_zeros(numel) for kind in kinds}

    def follow(self) -> None:
        """Update the averages of modules that had a gradient in this step."""
        share, averages = self._replica.strategy, self._flat()
        for here in self._runs() if averages else ():
            importance.follow(
                share.values[here],
                share.gradients[here],
                *(average[here] for average in averages),
                beta1=self._config.beta1,
                beta2=self._config.beta2,
            )

    def all(self) -> Tensor:
        """S of all triplets: [triplets]. Collective."""
        values, averages = self._replica.strategy.values, self._flat()
        elements = importance.element_scores(*averages) if averages else values.abs()
        counted = TRIPLET_DIM if averages else {"lora_E": TRIPLET_DIM["lora_E"]}
        scores = values.new_zeros(sum(module.adapter.r for module in self._modules))
        for module in self._modules:
            for name, dim in counted.items():
                here, shape = (
                    self._held[module.prefix + name],
                    module.adapter.get_parameter(name).shape,
                )
                mine = _whole(elements[here.place], here, shape)
                scores[module.place] += importance.triplet_means(mine, dim)
        return self._replica.strategy.combine(scores)

    def states(self) -> States:
        """This rank's share of the averages, by parameter and name."""
        optimized, averages = self._replica.optimized, self._averages
        return {
            name: {
                kind: flat[here.place].view(optimized[name].shape)
                for kind, flat in averages.items()
            }
            for name, here in self._held.items()
            if averages
        }

    @torch.no_grad()
    def load(self, averages: Iterable[tuple[str, Tensor]]) -> None:
        """Take over averages, (`<parameter>.<name>`, whole tensor), of a checkpoint."""
        for key, whole in averages:
            name, _, kind = key.rpartition(".")
            mine = self._replica.strategy.local_part(name, whole)
            if mine is not None:
                self._averages[kind][self._held[name].place].copy_(mine.reshape(-1))

    def _flat(self) -> list[Tensor]:
        """The averages, beside the adapters also where `model.to(device)` has moved these."""
        device = self._replica.strategy.values.device
        for kind, flat in self._averages.items():
            self._averages[kind] = flat.to(device)
        return list(self._averages.values())

    def _runs(self) -> Iterator[slice]:
        """The elements of modules that had a gradient, in runs as long as can be."""
        first = last = 0
        for module in self._modules:
            places = [self._held[module.prefix + name].place for name in TRIPLET_DIM]
            begin, end = min(p.start for p in places), max(p.stop for p in places)
            if not self._replica.present[f"{module.prefix}lora_E"]:
                if last > first:
                    yield slice(first, last)
                first = last = end
                continue
            first, last = (first, end) if last == begin else (begin, end)
        if last > first:
            yield slice(first, last)


def _whole(part: Tensor, here: LocalSlice, shape: torch.Size) -> Tensor:
    """A tensor of the shape with the part at its place, and zeros elsewhere."""
    if here.stop - here.start == shape.numel():
        return part.view(shape)
    whole = part.new_zeros(shape.numel())
    whole[here.start : here.stop] = part
    return whole.view(shape)
