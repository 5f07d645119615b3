"""Several adapters, a method and weights: the factors of each matrix, made when they are asked for.

A weight that an adapter does not adapt counts as ΔW = 0 there, so the result adapts the union.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.library.mixtures import (
    METHODS,
    ON_FACTORS,
    RANDOM,
    TRUNCATING,
    WITH_DENSITY,
    How,
    Mixture,
    Part,
    Product,
)
from dlora.library.same_base import check_shapes
from dlora.library.stored import Place, StoredAdapter

DENSITY = 0.5  # without --density
_LARGEST = torch.finfo(torch.float32).max


@dataclass
class Composition:
    """A mix.

    Args:
        adapters: of one base.
        weights: of each, finite.
        method: a name in `METHODS`.
        rank: k of the truncating methods; None: of each matrix the largest r of the adapters.
        density: of TIES and DARE, in (0, 1].
        seed: of DARE's masks. A mask belongs to the seed, the adapter's content and the matrix, so
            the order of the adapters does not matter.

    Attributes:
        places: {path: one adapter's place}, of all that any of them adapts.
        energies: {path: (what truncation lost of it, Σ σ²)}, of what has been made.

    Raises:
        UsageError: the adapters do not fit one another, or the method.
    """

    adapters: Sequence[StoredAdapter]
    weights: Sequence[float]
    method: str
    rank: int | None = None
    density: float = DENSITY
    seed: int = 0
    places: dict[str, Place] = field(default_factory=dict)
    energies: dict[str, tuple[float, float]] = field(default_factory=dict)
    _last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        for number, adapter in enumerate(self.adapters):
            for other in self.adapters[:number]:
                named = (str(other.directory), other.shapes, str(adapter.directory), adapter.shapes)
                check_shapes(*named)
            for path, place in adapter.places.items():
                _check_alike(self.places.setdefault(path, place), place)
        self._check_wrapping()
        if self.method in ON_FACTORS:
            for path in self.places:
                self._check_ranks(path)

    def _check_wrapping(self) -> None:
        """Layers inside a module whose parameters are adapted have another path in PEFT's file."""
        owners = {p.owner for p in self.places.values() if p.parameters}
        for adapter in self.adapters:
            own = {p.owner for p in adapter.places.values() if p.parameters}
            for place in adapter.places.values():
                for owner in owners - own:
                    if f"{place.owner}.".startswith(f"{owner}."):
                        raise UsageError(
                            f"{adapter.directory}: adapts {place.owner} inside {owner}, whose "
                            "parameters another adapter adapts; PEFT's files name it differently "
                            "then, so they cannot be composed"
                        )

    def _check_ranks(self, path: str) -> None:
        ranks = {place.r: adapter for _, adapter, place in self._at(path)}
        if len(ranks) > 1:
            (r, first), (other, second), *_ = ranks.items()
            raise UsageError(
                f"--method: {self.method} adds A to A and B to B, which needs equal r, but {path} "
                f"has r {r} in {first.directory} and {other} in {second.directory}; svd and cat "
                "take any"
            )

    def _at(self, path: str) -> list[tuple[float, StoredAdapter, Place]]:
        pairs = zip(self.weights, self.adapters, strict=True)
        return [(w, a, a.places[path]) for w, a in pairs if path in a.places]

    def rank_of(self, path: str) -> int:
        """The rank of the result at `path`."""
        ranks = [place.r for _, _, place in self._at(path)]
        if self.method == "cat":
            return sum(ranks)
        if self.method in ON_FACTORS:
            return ranks[0]
        _, m, n = self.places[path].shape
        most = min(m, n, sum(ranks)) if self.method == "svd" else min(m, n)
        return min(self.rank or max(ranks), most)

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """A [E, k, n] and B [E, m, k] of the result at `path`, of scale 1, float32."""
        if self._last is None or self._last[0] != path:
            self._last = None  # one matrix at a time
            self._last = path, self._made(path)
        return self._last[1]

    def _made(self, path: str) -> tuple[Tensor, Tensor]:
        found = [(w, a, place.scaling, *place.factors()) for w, a, place in self._at(path)]
        for w, adapter, s, A, _ in found:
            if not float(A.abs().max()) * abs(w * s) <= _LARGEST:
                raise UsageError(
                    f"--adapters: {adapter.directory}: {path} times {w:g} is beyond float32"
                )
        how = How(self.rank_of(path), self.density)
        made = []
        for expert in range(self.places[path].experts):
            parts = [
                Part(w, s, A[expert], B[expert], self._seed(adapter, path, expert))
                for w, adapter, s, A, B in found
            ]
            made.append(_finite(METHODS[self.method], parts, how, path))
        self.energies[path] = sum(p.lost for p in made), sum(p.energy for p in made)
        return torch.stack([p.A for p in made]), torch.stack([p.B for p in made])

    def lost(self) -> dict[str, float]:
        """{path: the share of the energy that truncation lost}; of no energy, none is lost."""
        return {
            path: lost / energy if energy else 0.0 for path, (lost, energy) in self.energies.items()
        }

    def _seed(self, adapter: StoredAdapter, path: str, expert: int) -> str:
        if self.method not in RANDOM:
            return ""
        return f"{self.seed} {adapter.digest} {path} {expert}"

    def record(self) -> dict[str, Any]:
        """How the result was made, as JSON."""
        said: dict[str, Any] = {"method": self.method}
        if self.method in TRUNCATING:
            said["rank"] = self.rank
        if self.method in WITH_DENSITY:
            said["density"] = self.density
        if self.method in RANDOM:
            said["seed"] = self.seed
        pairs = zip(self.adapters, self.weights, strict=True)
        said["adapters"] = [
            {"path": str(a.directory.absolute()), "sha256": a.digest, "weight": w} for a, w in pairs
        ]
        return said | ({"lost": self.lost()} if self.method in TRUNCATING else {})


def check_weights(named: Sequence[tuple[str, float]]) -> None:
    """Raise a `UsageError` unless the weights are finite and not all 0."""
    for name, weight in named:
        if not math.isfinite(weight):
            raise UsageError(f"--adapters: {name}={weight}: a weight is a finite number")
    if not any(weight for _, weight in named):
        raise UsageError("--adapters: all weights are 0, so the mix is empty")


def _finite(method: Mixture, parts: Sequence[Part], how: How, path: str) -> Product:
    """What the method makes.

    Raises:
        UsageError: not all of it is finite.
    """
    with suppress(UsageError):  # of a matrix that is to be decomposed
        made = method(parts, how)
        if all(bool(tensor.isfinite().all()) for tensor in (made.A, made.B)):
            return made
    raise UsageError(f"--adapters: {path}: the mix is beyond float32; are the weights too large?")


def _check_alike(one: Place, other: Place) -> None:
    """Raise a `UsageError` unless two adapters mean the same weight, in one layout, by a path."""
    if one.parameters != other.parameters:
        raise UsageError(
            f"{other.B.file}: adapts {', '.join(other.parameters) or 'the layer'} of {other.path}, "
            f"but {one.B.file} {', '.join(one.parameters) or 'the layer'}; which of them is which "
            "cannot be read from the files"
        )
    if one.A.key != other.A.key or one.A.shape[1:] != other.A.shape[1:]:
        raise UsageError(
            f"{other.A.file}: {other.A.key} {list(other.A.shape)} is another kind of layer than "
            f"{one.A.key} {list(one.A.shape)} in {one.A.file}"
        )
