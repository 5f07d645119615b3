"""The files of a low-rank model, written block by block.

….weight_B [m, k], ….weight_A [k, n]     in the place of ….weight, in files that dlora reads
….weight = B·A                           with `dense`, in files that transformers reads
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dlora.base.low_rank import KEY, factor_keys
from dlora.base.model import DTYPES, find_base
from dlora.base.stored_base import StoredBase
from dlora.base.weight_files import LOW_RANK
from dlora.cli import loaded
from dlora.errors import UsageError
from dlora.io.files import new_directory
from dlora.io.safetensors import (
    BLOCK_BYTES,
    FLOATS,
    NewTensor,
    StoredTensor,
    in_shards,
    new_float_tensor,
    write_shards,
)
from dlora.library.dealt import Parts
from dlora.metrics.progress import CopyDisplay

RECORD = "compression.json"


def load_compressed(directory: str | Path, *, dtype: str = "bfloat16") -> Any:
    """The model in a directory that `dlora compress` wrote, whole, frozen, on the GPU if there is
    one; `dlora.attach` and `dlora.shard` take it as any other.

    Args:
        dtype: `"bfloat16"`, `"float16"`, `"float32"` or `"float64"`.

    Raises:
        UsageError: the directory is no model's, or is damaged.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return loaded(find_base(str(directory), dtype=dtype))


@dataclass(frozen=True)
class Layer:
    """A linear layer that may become a product.

    Attributes:
        key: of its weight in the files.
        m, n: outputs and inputs.
        transposed: the weight is stored [in, out].
    """

    path: str
    key: str
    m: int
    n: int
    transposed: bool

    @property
    def most(self) -> float:
        """The rank below which a product has fewer weights: mn/(m + n)."""
        return self.m * self.n / (self.m + self.n)

    def pays(self, k: int) -> bool:
        """Whether a product of rank k has fewer weights."""
        return k * (self.m + self.n) < self.m * self.n


@dataclass
class Compressed:
    """A low-rank model that is to be written.

    Args:
        stored: the base's files.
        records: what was made of each layer, by path: its rank, and its energy where it pays.
        left: {path: why} of layers that were not looked at.
    """

    stored: StoredBase
    layers: list[Layer]
    records: dict[str, dict[str, Any]]
    left: dict[str, str]
    parts: Parts
    dense: bool

    def __post_init__(self) -> None:
        self.products = [layer for layer in self.layers if layer.pays(self._rank(layer))]
        self._numbers = {layer.key: number for number, layer in enumerate(self.layers)}
        self.shards = in_shards(list(self._tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on the disk."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    def lines(self) -> Iterator[str]:
        """What became of each layer, a line for each, and of the model."""
        for layer in self.layers:
            k, size = self._rank(layer), layer.m * layer.n
            if layer in self.products:
                yield (
                    f"{layer.path}: rank {k} of {min(layer.m, layer.n)}, energy "
                    f"{self.records[layer.path]['energy']:.6g}, "
                    f"{k * (layer.m + layer.n):,} of {size:,} weights"
                )
            else:
                yield f"{layer.path}: not compressed: {self._why(layer)}"
        for path, why in self.left.items():
            yield f"{path}: not compressed: {why}"
        before = sum(tensor.nbytes for tensor in self.stored.tensors.values())
        yield (
            f"{len(self.products)} of {len(self.layers) + len(self.left)} linear layers are "
            f"products; {self.nbytes / 1e6:,.1f} MB, {before / 1e6:,.1f} MB before"
        )

    def check_space(self, target: Path) -> None:
        """Raise a `UsageError` unless the disk has room."""
        free = shutil.disk_usage(target.parent).free
        if self.nbytes > free:
            raise UsageError(
                f"--to: the model needs {self.nbytes / 1e6:,.0f} MB and {target.parent} has "
                f"{free / 1e6:,.0f} MB free"
            )

    def write(self, target: Path, say: Callable[[str], None]) -> None:
        """Write the directory of the model."""
        config = self.stored.config()
        if not self.dense:
            config[KEY] = {layer.path: self._rank(layer) for layer in self.products}
        stem = "model" if self.dense else LOW_RANK
        with new_directory(target) as folder, CopyDisplay(self.nbytes, say) as display:
            self.stored.copy_rest(folder)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            write_shards(folder, self.shards, display.advance, display.finish, stem)
            text = json.dumps(self._record(), indent=2, ensure_ascii=False) + "\n"
            (folder / RECORD).write_text(text, encoding="utf-8")

    def _tensors(self) -> Iterator[NewTensor]:
        by_key = {layer.key: layer for layer in self.products}
        for key, tensor in self.stored.tensors.items():
            layer = by_key.get(key)
            if layer is None:
                yield NewTensor(key, tensor.dtype, tensor.shape, tensor.nbytes, tensor.blocks)
            elif self.dense:
                yield self._product(layer, tensor)
            else:
                yield from self._factors(layer, tensor)

    def _factors(self, layer: Layer, tensor: StoredTensor) -> Iterator[NewTensor]:
        k, dtype = self._rank(layer), FLOATS[tensor.dtype]
        for key, short, shape in zip(
            factor_keys(layer.key), "BA", ((layer.m, k), (k, layer.n)), strict=True
        ):

            def rows(short: str = short) -> Iterator[Tensor]:
                factor = self.parts.tensors(self._numbers[layer.key])[short]
                for part in factor.split(_step(factor.shape[1])):
                    yield part.to(dtype)

            yield new_float_tensor(key, dtype, shape, rows)

    def _product(self, layer: Layer, tensor: StoredTensor) -> NewTensor:
        dtype = FLOATS[tensor.dtype]

        def rows() -> Iterator[Tensor]:
            made = self.parts.tensors(self._numbers[layer.key])
            B, A = made["B"], made["A"]
            left, right = (A.t(), B.t()) if layer.transposed else (B, A)
            for part in left.split(_step(right.shape[1])):
                yield (part @ right).to(dtype)

        return new_float_tensor(layer.key, dtype, tensor.shape, rows)

    def _rank(self, layer: Layer) -> int:
        k: int = self.records[layer.path]["rank"]
        return k

    def _why(self, layer: Layer) -> str:
        return (
            f"that energy takes rank {self._rank(layer)}, and a product of {layer.m} x {layer.n} "
            f"pays below {layer.most:.0f}"
        )

    def _record(self) -> dict[str, Any]:
        kept = [layer for layer in self.layers if layer not in self.products]
        return {
            "products": {layer.path: self.records[layer.path] for layer in self.products},
            "not compressed": {layer.path: self._why(layer) for layer in kept} | self.left,
        }


def _step(columns: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_BYTES // (4 * columns))
