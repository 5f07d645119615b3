"""Adapters with their base, opened and checked by names and shapes; matrices are read one by one.

base's files ──── W0 of one matrix, float32
adapter's files ─ s·B·A of one matrix, in its plain form: AdaLoRA without what it pruned, PiSSA less
                  its start, FLoRA contracted
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.source import AdapterSource
from dlora.adapters.write import CONFIG
from dlora.base.identity import identity
from dlora.base.low_rank import low_ranks
from dlora.base.model import BaseModel
from dlora.base.reader import StoredWeights
from dlora.base.weight_files import check_files
from dlora.cli import chosen_base, naming_base
from dlora.errors import UsageError
from dlora.io.files import inside, read_object
from dlora.library.low_rank import Decomposed
from dlora.library.place import place_of
from dlora.library.same_base import Base, base_of, common_base
from dlora.library.store import Library
from dlora.lora.attach import named_adapters, weight_at
from dlora.lora.parameters import ParameterLayer

_ROWS = 1 << 20  # elements of a block that is compared


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix.

    Attributes:
        name: in what is printed and written; of one of a stack with its number.
        path: of the layer or parameter in the model.
        weight: name of W0 in the model.
        expert: of a stack [E, …], which.
        transposed: W0 is stored [n, m].
    """

    name: str
    path: str
    weight: str
    m: int
    n: int
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Update:
    """s·B·A of one matrix, decomposed.

    Attributes:
        r: of its factors.
        decomposed: None where r is 0.
    """

    r: int
    decomposed: Decomposed | None


@dataclass
class Opened:
    """An adapter, attached to a skeleton of its base.

    Args:
        option: that named it, for errors.
        source: of its files.
        base: what it records of its base.
    """

    option: str
    source: AdapterSource
    base: Base
    skeleton: Any = None

    @classmethod
    def open(cls, word: str, option: str, library: Library | None) -> Opened:
        """Read the settings.

        Raises:
            UsageError: it is no adapter, or one whose updates have no low rank.
        """
        place, known = place_of(word, library, option)
        source = open_adapter(place, option)
        if source.config.variant == "mola":
            raise UsageError(
                f"{option}: {source.directory} is of a mixture of experts (mola), whose update "
                "differs from token to token; `dlora export --mean-gates` makes a LoRA of it"
            )
        if source.config.use_dora:
            raise UsageError(
                f"{option}: {source.directory} is a DoRA (use_dora), whose update W' - W0 has no "
                "low-rank form; `dlora export --merge` and then `dlora extract` make a LoRA of it"
            )
        return cls(option, source, known or _recorded_base(source))

    def attach_to(self, skeleton: Any) -> None:
        """Check names, shapes and numbers against a skeleton of the base, which is changed."""
        self.source.attach_to(skeleton)
        self.skeleton = skeleton

    def matrices(self) -> Iterator[Matrix]:
        """All that it adapts, in the model's order; of a stack each matrix."""
        for path, layer, _ in named_adapters(self.skeleton):
            weight = weight_at(path, layer)
            if not isinstance(layer, ParameterLayer):
                m, n = layer.shape(layer)
                yield Matrix(path, path, weight, m, n, transposed=layer.transposed)
                continue
            experts, m, n = layer.sizes()
            transposed = layer.stored_transposed
            for expert in range(experts or 0):
                name = f"{path}[{expert}]"
                yield Matrix(name, path, weight, m, n, expert, transposed)
            if experts is None:
                yield Matrix(path, path, weight, m, n)

    def update(self, matrix: Matrix) -> Update:
        """ΔW of one matrix."""
        form = self.source.plain(self.skeleton, matrix.path, torch.float64)
        A, B, r = form.A, form.B, form.r
        if not r:
            return Update(0, None)
        if matrix.expert is not None:
            A = A.view(-1, r, matrix.n)[matrix.expert]
            B = B.view(matrix.m, r, -1)[:, :, matrix.expert]
        return Update(r, Decomposed.of_product(A * form.scaling, B))


@dataclass(frozen=True)
class OpenedBase:
    """W0 in its files."""

    base: BaseModel
    option: str
    weights: StoredWeights
    identity: str | None

    def read(self, matrix: Matrix) -> Tensor:
        """W0 of one matrix, [m, n] in float32.

        Raises:
            UsageError: it has NaN or infinite values.
        """
        numel = matrix.m * matrix.n
        out = torch.empty(numel)
        self.weights.read(matrix.weight, (matrix.expert or 0) * numel, out)
        for block in out.split(_ROWS):
            if not bool(block.isfinite().all()):
                raise UsageError(f"{self.option}: {matrix.weight} contains NaN or infinite values")
        if matrix.transposed:
            return out.view(matrix.n, matrix.m).t()
        return out.view(matrix.m, matrix.n)

    def check_is_base_of(self, opened: Opened) -> None:
        """Raise a `UsageError` if the run of an adapter recorded another identity of its base."""
        if opened.base.identity and self.identity and opened.base.identity != self.identity:
            raise UsageError(
                f"{self.option}: {self.base.path} (identity {self.identity[:12]}) is another base "
                f"than {opened.base}, which {opened.source.directory} was trained on"
            )

    def check_copies(self, opened: Opened) -> None:
        """Check that W0 that is stored beside an adapter, as of an embedding, is the base's."""
        for name, copy in opened.source.base_copies.items():
            count, *row = copy.shape
            step = max(1, _ROWS // math.prod(row))
            pairs = (
                (copy.rows(first, last), self._rows(name, first, last, row))
                for first in range(0, count, step)
                for last in [min(first + step, count)]
            )
            opened.source.check_base_copy(name, pairs)

    def _rows(self, name: str, first: int, last: int, row: list[int]) -> Tensor:
        out = torch.empty((last - first) * math.prod(row))
        self.weights.read(name, first * math.prod(row), out)
        return out.view(last - first, *row)


def open_all(
    adapter: str,
    against: str | None,
    base: str | None,
    library: Library | None,
    *,
    trust_remote_code: bool,
    announce: Callable[[str], None],
) -> tuple[Opened, Opened | None, OpenedBase]:
    """Open one or two adapters and their base.

    Args:
        base: that the user named; None: the one that the adapter records.

    Raises:
        UsageError: one of them cannot be read, or they do not belong together.
    """
    first = Opened.open(adapter, "--adapter", library)
    second = None if against is None else Opened.open(against, "--against", library)
    both = [first, *([second] if second else [])]
    if second and first.source.directory.resolve() == second.source.directory.resolve():
        raise UsageError(f"--against: {against} is the adapter of --adapter")
    _check_common(both, base)
    found, option = chosen_base(
        base,
        first.source,
        dtype=None,
        trust_remote_code=trust_remote_code,
        announce=announce,
    )
    opened = _opened_base(found, option)
    for each in both:
        opened.check_is_base_of(each)
        with naming_base(option):
            skeleton = found.skeleton()
        each.attach_to(skeleton)
        opened.check_copies(each)
    return first, second, opened


def _check_common(both: list[Opened], base: str | None) -> None:
    """Raise a `UsageError` if two adapters are known to have two bases, or may."""
    bases = {str(each.source.directory): each.base for each in both}
    if base is not None:
        bases = {name: Base(base, None, one.identity) for name, one in bases.items()}
    common_base(bases)


def _opened_base(base: BaseModel, option: str) -> OpenedBase:
    with naming_base(option):
        config = base.config()
        if getattr(config, "quantization_config", None) is not None:
            raise UsageError(f"{base.path} is quantized; floating-point weights are needed")
        if low_ranks(config) is not None:
            raise UsageError(f"{base.path} is compressed (dlora compress); it has no whole W0")
        check_files(base)
        skeleton: Any = base.skeleton()
        weights = base.stored(skeleton)
        return OpenedBase(base, option, weights, identity(base, skeleton))


def _recorded_base(source: AdapterSource) -> Base:
    directory = source.directory
    if not source.is_checkpoint:
        return base_of(directory, read_object(inside(directory, CONFIG)))
    known = read_object(inside(directory, "state.json")).get("base")
    return Base(source.base.path, source.base.revision, known if isinstance(known, str) else None)
