"""Weights of a mix by how well it does on a few examples, without gradients (LoraHub).

    minimise over w in [-1.5, 1.5]ᴺ, from w = 0:   loss of the base with Σ wᵢ·ΔWᵢ + 0.05·mean|w|

LoraHub mixes A and B (A = Σ wᵢAᵢ, B = Σ wᵢBᵢ), where one adapter alone counts w²·ΔW, so that its
sign is lost. Here the updates themselves are mixed (`cat`): what is searched is linear in w, and
any ranks do. LoraHub's optimizer is Nevergrad's NGOpt; Nevergrad has had no release since April
2025 and pins a library of 2022. `cma` (CMA-ES, one of those that NGOpt chooses among) is maintained
and needs numpy alone.

Source: Huang et al. 2023, https://arxiv.org/abs/2307.13269; Hansen, https://arxiv.org/abs/1604.00772.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.source import AdapterSource
from dlora.cli import answering, chosen_base, loaded, naming_base
from dlora.data import Dealing, load_examples
from dlora.errors import UsageError
from dlora.library.composition import Composition
from dlora.library.result import write_result
from dlora.library.same_base import Base
from dlora.library.stored import StoredAdapter
from dlora.lora.attach import adapter_tensors
from dlora.tasks import CAUSAL

BOUND, PENALTY, FIRST_STEP = 1.5, 0.05, 0.5
_ROWS = 8  # examples in a pass
Objective = Callable[[Sequence[float]], float]


def search(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float | None],
    base: Base,
    file: str,
    *,
    budget: int,
    seed: int,
    format: str,
    max_length: int,
    beside: Path,
) -> list[float]:
    """Find the weights that are None; prints each mix that is better than those before.

    Args:
        weights: of each adapter; those that are numbers stay.
        file: of examples.
        budget: mixes that are tried.
        beside: what is written meanwhile goes beside this path, and is deleted.

    Returns:
        The weights of all adapters.

    Raises:
        UsageError: the examples or the base cannot be read, or `cma` is not installed.
    """
    package = _package()
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}.") as made:
        whole = Composition(adapters, [1.0] * len(adapters), "cat")
        write_result(whole, Path(made) / "cat", base, lambda _: None)
        source = open_adapter(Path(made) / "cat")
        mix = Mix(source, whole, file, format=format, max_length=max_length)
    free = [place for place, weight in enumerate(weights) if weight is None]

    def full(found: Sequence[float]) -> list[float]:
        values = [0.0 if weight is None else weight for weight in weights]
        for place, weight in zip(free, found, strict=True):
            values[place] = float(weight)
        return values

    def objective(found: Sequence[float]) -> float:
        return mix.loss(full(found)) + PENALTY * sum(map(abs, found)) / len(found)

    return full(minimum(objective, len(free), budget, seed, package))


def minimum(
    objective: Objective, count: int, budget: int, seed: int, package: Any
) -> tuple[float, ...]:
    """The best of `budget` points of [-1.5, 1.5]^count, of which the first is 0."""
    best = (0.0,) * count
    least = objective(best)
    print(f"  mix 1 of {budget}: objective {least:.4f} at 0")
    options = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9, "verb_log": 0}
    # It has no form for one dimension; a second that nothing depends on does no harm.
    strategy = package.CMAEvolutionStrategy([0.0] * max(count, 2), FIRST_STEP, options)
    tried = 1
    while tried < budget and not strategy.stop():
        points = strategy.ask()
        values = []
        for point in points[: budget - tried]:
            found = tuple(float(x) for x in point[:count])
            values.append(value := objective(found))
            tried += 1
            if value < least:
                best, least = found, value
                shown = ", ".join(f"{weight:+.3f}" for weight in found)
                print(f"  mix {tried} of {budget}: objective {value:.4f} at {shown}")
        if len(values) == len(points):
            strategy.tell(points, values)
    return best


class Mix:
    """The base with `Σ wᵢ·ΔWᵢ`, as a function of w on a few examples.

    Args:
        source: the adapters side by side, as `cat` with all weights 1.
        whole: what it was made by.
        file: of examples, in the layout `format`.
    """

    def __init__(
        self, source: AdapterSource, whole: Composition, file: str, *, format: str, max_length: int
    ) -> None:
        if source.task not in (None, "CAUSAL_LM"):
            raise UsageError(
                f"--search: the adapters are of task_type {source.task}; it takes those of causal "
                "language models"
            )
        base, option = chosen_base(
            None, source, dtype="auto", trust_remote_code=False, announce=print
        )
        self._task = CAUSAL
        with naming_base(option):
            tokenizer, skeleton = base.tokenizer(), base.skeleton()
        self._task.check(skeleton)
        answering(tokenizer, source)
        self._examples = load_examples(
            file, key="--search", format=format, tokenizer=tokenizer, max_length=max_length
        )
        print(f"--search: {self._examples.report}")
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id = next(found for found in known if found is not None)
        source.attach_to(skeleton)  # what does not fit fails before weights are read
        with naming_base(option):
            self._model = loaded(base).eval()
        source.attach_to(self._model)
        source.load_into(self._model)
        self._task.install(self._model)
        self._rows = _rows_of_adapters(source, whole, self._model)

    @torch.no_grad()
    def loss(self, weights: Sequence[float]) -> float:
        """Σ cross entropy / Σ targets of the examples."""
        for parameter, original, rows in self._rows:
            scale = torch.tensor(weights, dtype=original.dtype, device=original.device)
            parameter.copy_(original * scale[rows][:, None])
        total = targets = 0.0
        for ids in Dealing(_ROWS)(range(len(self._examples)), self._examples.lengths, 1)[0]:
            batch = self._task.collate([self._examples[i] for i in ids], self._pad_id)
            batch = batch.to(next(self._model.parameters()).device)
            total += float(self._task.evaluate(self._model, batch)[0])
            targets += batch.num_targets
        return total / targets


def _rows_of_adapters(
    source: AdapterSource, whole: Composition, model: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(A [E·R, n] in the model, a copy of it, the adapter of each row) for all that is adapted."""
    parameters = adapter_tensors(model)
    keys = {source.key_of(name): name for name in parameters}
    found = []
    for path, place in whole.places.items():
        parameter = parameters[keys[place.A.key]].data
        owners = [
            number
            for number, adapter in enumerate(whole.adapters)
            if path in adapter.places
            for _ in range(adapter.places[path].r)
        ]
        rows = torch.tensor(owners * place.experts, device=parameter.device)
        found.append((parameter, parameter.clone(), rows))
    return found


def _package() -> Any:
    try:
        import cma
    except ImportError:
        raise UsageError("--search needs cma: pip install 'dlora[search]'") from None
    return cma
