"""Merging on disk: a base's files in, W0 + ΔW out, one block of rows at a time.

    base's files ──tensor by tensor──> no adapter: its bytes, under its key
                                       adapter:    cast(float32(W0) + ΔW), in blocks of rows
                                       (for DoRA's magnitudes W0 is read twice)
                                       trained:    the trained copy in place of W0
                 ──> model-0000i-of-N.safetensors, index, config.json, tokenizer

In memory at any time: one ΔW or one trained copy in float32, and a few blocks.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlora.adapters.source import AdapterSource
from dlora.base.skeleton import untied_config
from dlora.base.stored_base import StoredBase
from dlora.errors import UsageError, dtype_name
from dlora.io.safetensors import (
    FLOATS,
    NewTensor,
    StoredTensor,
    in_shards,
    new_float_tensor,
    row_blocks,
    write_shards,
)
from dlora.lora.attach import named_adapters, named_copies, weight_at
from dlora.lora.layers import CHILD
from dlora.lora.merge import change_of, merged_weight
from dlora.lora.tasks import HEADS
from dlora.metrics.progress import CopyDisplay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Reads W0 as it is stored, yields the new value in a dtype, in blocks of rows.
Edit = Callable[[StoredTensor, torch.dtype], Iterator[Tensor]]


@dataclass
class MergedModel:
    """A planned merge; `write` does it.

    Args:
        skeleton: the base on the meta device, with the adapter attached by `source`.
        stored: the base's files, opened before anything was attached.
        dtype: of floating-point tensors, as the base is loaded in it: the class may pin some to
            float32; None: as each is stored in the base.
        new: parameters of a head that the base lacks, and the adapter has.

    Raises:
        UsageError: an adapted parameter is not stored by itself, as floats of its shape.
    """

    skeleton: PreTrainedModel
    source: AdapterSource
    stored: StoredBase
    dtype: torch.dtype | None
    new: Collection[str] = ()
    losses: dict[str, float] = field(default_factory=dict)  # filled by `write`, by module
    # of parameters that are stored in parts, one or more for each expert, by key
    parts: dict[str, Edit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edits: dict[str, Edit] = {}
        for path, layer, _ in named_adapters(self.skeleton):
            name = weight_at(path, layer)
            experts = self.stored.stacked(name)
            if not experts:
                self.edits[name] = self._add_delta(path)
            for expert, keys in experts.items():
                for key in keys:
                    self.parts[key] = self._add_part(path, name, expert, key)
        for path, _, copy in named_copies(self.skeleton):
            for name in names_in(path, copy):
                own = name.removeprefix(f"{path}.")
                self.edits[name] = self._replace(f"{path}.{CHILD}.{own}")
        self.untied = self._untied()
        self.config = self._config()
        self.shards = in_shards(list(self._tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on the disk."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    def write(self, folder: Path, display: CopyDisplay) -> None:
        """Write the model directory into `folder`."""
        self.check(folder)
        self.stored.copy_rest(folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        write_shards(folder, self.shards, display.advance, display.finish)

    def _tensors(self) -> Iterator[NewTensor]:
        """Every tensor of the new model: those of the files in their order, then those untied."""
        edits = {self._key_for(name): name for name in self.edits}
        for key, tensor in self.stored.tensors.items():
            yield self._tensor(tensor, self.parts.get(key) or self.edits.get(edits.get(key, "")))
        for name, holder in self.untied.items():
            if not self.stored.has(name):
                origin = self.stored.tensors[self.stored.key_of(holder)]
                yield self._tensor(replace(origin, key=name), self.edits.get(name))
        for name in self.new:
            yield self._drawn(name)

    def _drawn(self, name: str) -> NewTensor:
        """A tensor that the files do not have."""
        original = self.skeleton.get_parameter(name)
        found = (FLOATS.get(tensor.dtype) for tensor in self.stored.tensors.values())
        dtype = self.dtype or next(filter(None, found))  # as the base is stored
        path = next(p for p, _, copy in named_copies(self.skeleton) if name in names_in(p, copy))
        own = f"{path}.{CHILD}.{name.removeprefix(f'{path}.')}"
        shape = tuple(original.shape)
        return new_float_tensor(name, dtype, shape, lambda: iter([self.source.read(own, dtype)]))

    def _key_for(self, name: str) -> str:
        """The key of an edited parameter, which may be one that the files do not have yet."""
        if name in self.new or (name in self.untied and not self.stored.has(name)):
            return name
        return self.stored.key_of(name)

    def _tensor(self, tensor: StoredTensor, edit: Edit | None) -> NewTensor:
        stored = FLOATS.get(tensor.dtype)
        dtype = stored and (self.stored.dtype_of(tensor.key) if self.dtype else stored)
        if dtype is None or (edit is None and dtype == stored):
            shape, nbytes = tensor.shape, tensor.nbytes
            return NewTensor(tensor.key, tensor.dtype, shape, nbytes, tensor.blocks)
        make = edit or _cast
        return new_float_tensor(tensor.key, dtype, tensor.shape, lambda: make(tensor, dtype))

    def _add_delta(self, path: str) -> Edit:
        def edit(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
            wide = torch.promote_types(FLOATS[tensor.dtype], torch.float32)
            blocks = ((*b, tensor.rows(*b)) for b in row_blocks(tensor))
            delta, scale = self.source.update(self.skeleton, path, wide, blocks)
            lost = total = 0.0
            for first, last in row_blocks(tensor):
                rows = tensor.rows(first, last)
                part = change_of(
                    rows, delta[first:last], scale if scale is None else scale[first:last]
                )
                merged = merged_weight(rows, part, dtype)
                square = float(part.norm()) ** 2
                lost, total = lost + merged.loss**2 * square, total + square
                yield merged.weight
            self.losses[path] = math.sqrt(lost / total) if total else 0.0

        return edit

    def _add_part(self, path: str, name: str, expert: int, key: str) -> Edit:
        def edit(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
            wide = torch.promote_types(FLOATS[tensor.dtype], torch.float32)
            delta = self.source.update_of_expert(self.skeleton, path, wide, expert)
            part = self.stored.unstacked(name, expert, delta)[key]
            merged = merged_weight(tensor.rows(), part, dtype)
            self.losses[key] = merged.loss
            yield merged.weight

        return edit

    def _replace(self, name: str) -> Edit:
        def edit(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
            yield self.source.read(name, dtype)

        return edit

    def _untied(self) -> dict[str, str]:
        """{parameter: the one whose value in the files it has} for all that stop sharing a weight.

        Adapters and trained copies belong to one module, but a tied weight is several modules':
        where one of them changes, each gets a tensor of its own. So do those that change in none,
        but that `tie_word_embeddings: false` unties with them.
        """
        groups: dict[str, list[str]] = {}
        for name, original in self.skeleton.all_tied_weights_keys.items():
            groups.setdefault(original, [original]).append(name)
        if not any(self.edits.keys() & set(members) for members in groups.values()):
            return {}
        tied, cut = self._tied_nevertheless(), dict[str, str]()
        for members in groups.values():
            if still := [name for name in members if name in tied]:
                if self.edits.keys() & set(members):
                    raise UsageError(
                        f"{still[0]} is adapted and shares its weight with others, which "
                        "tie_word_embeddings: false does not untie, so it cannot be merged"
                    )
                continue
            holders = [name for name in members if self.stored.has(name)]
            for name in members:
                cut[name] = name if name in holders else (holders or members)[0]
        return cut

    def _tied_nevertheless(self) -> set[str]:
        """The parameters that share a weight with `tie_word_embeddings: false` too."""
        config = self.stored.config()
        _set_untied(config)
        with torch.device("meta"):
            still = type(self.skeleton)(self._parsed(config)).all_tied_weights_keys
        return {*still, *still.values()}

    def _config(self) -> dict[str, Any]:
        """The new `config.json`."""
        config = self.stored.config()
        if self.dtype is not None:
            _set_dtype(config, dtype_name(self.dtype))
        read = self._parsed(config)
        if self.untied or untied_config(read, self.skeleton) is not None:
            _set_untied(config)
        if self.source.task in HEADS:
            own = self.skeleton.config
            config |= {"architectures": [type(self.skeleton).__name__], "id2label": own.id2label}
            config |= {"label2id": own.label2id, "pad_token_id": own.pad_token_id}
        return config

    def _parsed(self, config: dict[str, Any]) -> Any:
        """A `config.json` as transformers reads it; it writes an infinite number as an object."""
        kind = type(self.skeleton.config)
        return kind.from_dict(kind._decode_special_floats(dict(config)))

    def check(self, folder: Path) -> None:
        """Check that `folder` has room, and that the adapter's copies of W0 are the base's."""
        free = shutil.disk_usage(folder).free
        if self.nbytes > free:
            raise UsageError(
                f"--to: the merged model needs {self.nbytes / 1e6:,.0f} MB and "
                f"{folder.parent} has {free / 1e6:,.0f} MB free"
            )
        for name, copy in self.source.base_copies.items():
            original = self.stored.tensors[self.stored.key_of(self.untied.get(name, name))]
            blocks = row_blocks(original)
            same_shape = original.shape == copy.shape
            pairs = ((copy.rows(*b), original.rows(*b)) for b in (blocks if same_shape else ()))
            self.source.check_base_copy(name, pairs)


def names_in(path: str, copy: nn.Module) -> list[str]:
    """The names in the model of the parameters that the trained copy of the module `path` has."""
    return [f"{path}.{name}" for name, _ in copy.named_parameters()]


def _cast(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for first, last in row_blocks(tensor):
        yield tensor.rows(first, last).to(dtype)


def _set_untied(config: dict[str, Any]) -> None:
    """Record, wherever a configuration ties the embedding and the head, that they are two."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Record a dtype at the top and wherever a part of the model has one of its own."""
    config.pop("torch_dtype", None)  # its name in older files
    config["dtype"] = dtype
    for part in config.values():
        if isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"}:
            _set_dtype(part, dtype)
