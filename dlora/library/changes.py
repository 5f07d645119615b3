"""What a fine-tune changed of its base: D = W_tuned − W_base, one parameter at a time.

    base's files  ──┐  blocks in float64, in which the difference of stored 16-bit values is exact
    tuned files   ──┴─ D in float32

Both are read by transformers' own rules for names and layouts, so they may be sharded and named
differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from dlora.base.low_rank import low_ranks
from dlora.base.model import BaseModel, find_base
from dlora.base.model_class import class_for
from dlora.base.reader import StoredWeights
from dlora.base.weight_files import check_files
from dlora.cli import naming_base
from dlora.errors import UsageError, and_more

_BLOCK = 1 << 20  # elements of a block
# What of a configuration has no part in the result of the weights.
_NO_PART = {"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype"}
_NO_PART |= {"architectures", "use_cache", "tie_word_embeddings"}
_NO_PART |= {"bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class Stored:
    """A model in its files: where they are, its skeleton, and its weights."""

    base: BaseModel
    skeleton: Any
    weights: StoredWeights

    @classmethod
    def open(cls, path: str, option: str, *, trust_remote_code: bool) -> Stored:
        """Open a model by a hub id, a directory or a `.gguf` file; the files' headers are read.

        Raises:
            UsageError: it cannot be read, or its weights are packed or products; the message names
                `option`.
        """
        if trust_remote_code and path.endswith(".gguf"):
            raise UsageError("--trust-remote-code cannot act: a .gguf file contains no code")
        with naming_base(option):
            base = find_base(path, dtype="float32", trust_remote_code=trust_remote_code)
            config = base.config()
            if getattr(config, "quantization_config", None) is not None:
                raise UsageError(f"{path} is quantized; floating-point weights are needed")
            if low_ranks(config) is not None:
                raise UsageError(f"{path} is compressed already; whole weights are needed")
            if getattr(config, "is_encoder_decoder", False):
                base = replace(base, made_as=class_for("SEQ_2_SEQ_LM", ()))
            check_files(base)
            skeleton: Any = base.skeleton()
            return cls(base, skeleton, base.stored(skeleton))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of what the files have of the parameters and persistent buffers; tied ones
        under every name."""
        state = self.skeleton.state_dict().items()
        return {name: tuple(tensor.shape) for name, tensor in state if self.weights.has(name)}


@dataclass(frozen=True)
class Change:
    """How far tensors moved: ‖D‖² and ‖W_base‖²."""

    squares: float = 0.0
    of: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(self.squares + other.squares, self.of + other.of)

    def __bool__(self) -> bool:
        return self.squares > 0

    def record(self) -> dict[str, float]:
        """Both norms, for a file."""
        return {"change": math.sqrt(self.squares), "base": math.sqrt(self.of)}


def told(record: dict[str, Any]) -> str:
    """What `Change.record` says, in words."""
    if not record["base"]:
        return "changed from zero"
    return f"changed by {record['change'] / record['base']:.2%}"


@dataclass(frozen=True)
class Pair:
    """A base and a model that was tuned from it.

    Raises:
        UsageError: they are not of one architecture, or not of the same tensors.
    """

    base: Stored
    tuned: Stored

    def __post_init__(self) -> None:
        ours, theirs = self.base, self.tuned
        kinds = [type(model.skeleton).__name__ for model in (ours, theirs)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"--tuned: {theirs.base.path} is a {kinds[1]}, and the base is a {kinds[0]}"
            )
        shapes, others = ours.shapes, theirs.shapes
        for name in [*shapes, *others]:
            found, wanted = others.get(name), shapes.get(name)
            if found == wanted:
                continue
            if found and wanted:
                raise UsageError(
                    f"--tuned: {name} is {list(found)}, and {list(wanted)} in the base: a tensor "
                    "of another shape (as of a resized vocabulary) is no update of the base's"
                )
            who, lacks = (theirs, ours) if found else (ours, theirs)
            raise UsageError(f"--tuned: {name} is in {who.base.path} and not in {lacks.base.path}")
        strange = set(ours.weights.unused) ^ set(theirs.weights.unused)
        if strange:
            first = and_more(sorted(strange), 1)
            who = theirs if strange & set(theirs.weights.unused) else ours
            raise UsageError(f"--tuned: {first} is in {who.base.path} alone")

    def remarks(self) -> Iterator[str]:
        """What differs beside the weights, or was not compared, a line each."""
        if unused := self.base.weights.unused:
            yield f"not compared, as {type(self.base.skeleton).__name__} has no use for them: " + (
                and_more(unused)
            )
        kinds = [sorted(m.weights.stored_dtypes) for m in (self.base, self.tuned)]
        if kinds[0] != kinds[1]:
            yield (
                f"the base is stored in {', '.join(kinds[0])} and the tuned model in "
                f"{', '.join(kinds[1])}: what one of them rounded counts as a change"
            )
        ours, theirs = (model.base.config().to_dict() for model in (self.base, self.tuned))
        names = sorted({*ours, *theirs} - _NO_PART)
        if other := [n for n in names if ours.get(n) != theirs.get(n)]:
            yield f"config.json differs in {and_more(other)}; an adapter has the base's values"

    def change(self, names: Iterable[str]) -> Change:
        """How far tensors moved."""
        blocks = (blocks for name in names for blocks in self._blocks(name))
        return sum(starmap(_change, blocks), Change())

    def difference(self, name: str, index: int | None = None) -> tuple[Tensor, Change]:
        """D of a tensor, in float32, or of one of the matrices of a stack."""
        shape = self.base.shapes[name]
        shape = shape if index is None else shape[1:]
        out, at, change = torch.empty(math.prod(shape)), 0, Change()
        for block, base in self._blocks(name, index):
            out[at : at + block.numel()] = block
            change += _change(block, base)
            at += block.numel()
        return out.view(shape), change

    def value(self, name: str) -> Tensor:
        """A tensor of the tuned model, in float32."""
        out = torch.empty(self.base.shapes[name])
        self.tuned.weights.read(name, 0, out.view(-1))
        return out

    def _blocks(self, name: str, index: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(D, W_base) of consecutive elements, in float64.

        Raises:
            UsageError: the tuned tensor or the base's has NaN or infinite values.
        """
        shape = self.base.shapes[name]
        numel = math.prod(shape if index is None else shape[1:])
        first = 0 if index is None else index * numel
        plain = self.base.weights.is_plain(name) and self.tuned.weights.is_plain(name)
        step = _BLOCK if plain else numel  # what is converted is converted at every read
        for start in range(first, first + numel, max(step, 1)):
            count = min(step, first + numel - start)
            values = [torch.empty(count, dtype=torch.float64) for _ in range(2)]
            for model, option, value in zip(
                (self.base, self.tuned), ("--base", "--tuned"), values, strict=True
            ):
                model.weights.read(name, start, value)
                if not value.isfinite().all():
                    raise UsageError(f"{option}: {name} contains NaN or infinite values")
            yield values[1] - values[0], values[0]


def _change(block: Tensor, base: Tensor) -> Change:
    return Change(float(block.square().sum()), float(base.square().sum()))
