"""Reads ranges of a base's parameters from its files, without the rest.

    file keys ── renamed ──────────────────────────── parameter: its bytes are in the file
              └─ converted (stacked, fused, split) ── parameter: made by transformers' operations

A parameter that is converted is whole in memory while it is read, one at a time; of stacked
experts only those in the range are read.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlora.base.source import BaseSource
from dlora.base.stored_base import Origin, origins_of_parameters, stacks_alone
from dlora.base.weight_files import weight_files
from dlora.errors import UsageError, and_more
from dlora.io.safetensors import FLOATS, INTEGERS, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_NUMEL = 1 << 22  # elements read at a time


class StoredWeights:
    """Reads ranges of the flattened parameters of a model.

    The constructor reads the files' headers and checks that they have what the model needs.

    Args:
        base: the files.
        skeleton: the model on the meta device, unpacked and without adapters.
        may_lack: parameters that are zero where the files do not contain them.

    Attributes:
        lacking: those of them that the files do not contain.

    Raises:
        UsageError: the base is quantized; there are no weights, or they are damaged; or the files
            lack a parameter or have it in another shape than the configuration.
    """

    def __init__(
        self, base: BaseSource, skeleton: PreTrainedModel, may_lack: Collection[str] = ()
    ) -> None:
        if getattr(skeleton.config, "quantization_config", None) is not None:
            raise UsageError(
                f"model.path: {base.path} is quantized; engine zero3 and model.quantization need a "
                "floating-point base"
            )
        self._skeleton = skeleton
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for file in weight_files(base):
                self._tensors |= stored_tensors(file)
        except UsageError as error:
            raise UsageError(f"model.path: {error}") from error
        expected = skeleton.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in expected.items()}
        self._origins: dict[str, tuple[str, Origin]] = {}
        for name, origin in origins_of_parameters(skeleton, self._tensors, expected).items():
            for target, shape in self._made_shapes(name, origin).items():
                self._origins[target] = (name, origin)
                self._check_shape(target, shape, origin)
        self._alias = _aliases(skeleton)
        missing = [name for name in expected if self._stored_name(name) is None]
        missing = [name for name in missing if not _may_be_missing(skeleton, name)]
        self.lacking = [name for name in missing if name in may_lack]
        if missing := [name for name in missing if name not in may_lack]:
            names = and_more(missing, 1)
            raise UsageError(f"model.path: the files of {base.path} do not contain {names}")

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements [start, start + n) of the parameter `name`, cast."""
        if name in self.lacking:
            out.zero_()
            return
        stored_name = self._stored_name(name)
        assert stored_name is not None  # the constructor has checked
        self._read(stored_name, start, out)

    def unequal_ties(self) -> list[str]:
        """The tied parameters whose files have another value than for the one they are tied to.

        transformers does not tie these; it compares them in the dtype in which they are loaded.
        """
        tied: dict[str, str] = self._skeleton.all_tied_weights_keys
        both = [(name, twin) for name, twin in tied.items() if {name, twin} <= self._origins.keys()]
        return [name for name, twin in both if not self._are_equal(name, twin)]

    def _are_equal(self, name: str, twin: str) -> bool:
        origins = [self._origins[tensor][1] for tensor in (name, twin)]
        numel = math.prod(self._shapes[name])
        if all(origin.converter is None for origin in origins):
            one, other = (self._tensors[origin.keys[-1]] for origin in origins)
            return _have_equal_elements(one, other, self._dtypes[name])
        values = [torch.empty(numel, dtype=self._dtypes[name]) for _ in origins]
        self._read(name, 0, values[0])
        self._read(twin, 0, values[1])
        return torch.equal(*values)

    def _read(self, stored_name: str, start: int, out: Tensor) -> None:
        """`read` of a parameter that has this name in the files."""
        first, origin = self._origins[stored_name]
        if origin.converter is not None:
            out.copy_(self._made(stored_name, first, origin, start, start + out.numel()))
            return
        stored = self._tensors[origin.keys[-1]]
        for offset in range(0, out.numel(), BLOCK_NUMEL):
            piece = out[offset : offset + BLOCK_NUMEL]
            piece.copy_(stored.elements(start + offset, start + offset + piece.numel()))

    @property
    def stored_dtypes(self) -> set[str]:
        """The dtypes of the files' floating-point tensors, as safetensors names them."""
        return {tensor.dtype for tensor in self._tensors.values()} & FLOATS.keys()

    @property
    def unused(self) -> list[str]:
        """The names that keys of the files have in the model, which has no such tensors."""
        return [name for name in self._origins if name not in self._shapes]

    @property
    def makes_rows(self) -> bool:
        """Whether rows of some parameter are made of several keys, or of parts of one.

        Where transformers shards while it reads, it does that with the shards: other rows.
        """
        origins = [origin for _, origin in self._origins.values() if origin.converter is not None]
        return not all(map(stacks_alone, origins))

    def has(self, name: str) -> bool:
        """Whether the files have a (tied) parameter or buffer."""
        return self._stored_name(name) is not None

    def is_plain(self, name: str) -> bool:
        """Whether a parameter is only renamed; one that is converted is converted at every read."""
        stored_name = self._stored_name(name)
        return stored_name is not None and self._origins[stored_name][1].converter is None

    def _stored_name(self, name: str) -> str | None:
        """The name that a (tied) parameter has in the files."""
        return next((n for n in self._alias.get(name, [name]) if n in self._origins), None)

    def _check_shape(self, name: str, shape: tuple[int, ...], origin: Origin) -> None:
        if name not in self._shapes:
            return
        wanted, is_float = self._shapes[name], self._dtypes[name].is_floating_point
        stored = [self._tensors[key] for key in origin.keys]
        strange = [t for t in stored if t.dtype not in (FLOATS if is_float else INTEGERS)]
        if shape == wanted and not strange:
            return
        stored_dtype = f"{strange[0].dtype} " if strange else ""
        needed = f"{'floats' if is_float else 'integers'} {list(wanted)}"
        raise UsageError(
            f"model.path: {stored[0].file} contains {name} as {stored_dtype}{list(shape)}, but the "
            f"model needs {needed}; config.json and the weights do not belong together"
        )

    def _made_shapes(self, name: str, origin: Origin) -> dict[str, tuple[int, ...]]:
        """{parameter: shape} of what the keys become; a conversion is tried on the meta device."""
        if origin.converter is None:
            return {name: self._tensors[origin.keys[-1]].shape}
        try:
            made = self._convert(name, origin, range(len(origin.keys)), self._without_data)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            if name not in self._shapes:  # of layers that the model does not have
                return {}
            first = self._tensors[origin.keys[0]]
            raise UsageError(
                f"model.path: {name} cannot be built from {first.key} and the other "
                f"{len(origin.keys) - 1} keys in {first.file}: {str(error).splitlines()[0]}"
            ) from error
        return {target: tuple(tensor.shape) for target, tensor in made.items()}

    def _made(self, target: str, name: str, origin: Origin, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of a converted parameter."""
        wanted: Sequence[int] = range(len(origin.keys))
        before = 0
        if stacks_alone(origin):
            row = math.prod(self._shapes[target][1:])
            first, last = start // row, -(-stop // row)
            wanted, before = _of_rows(origin.patterns, first, last), first * row
        made = self._convert(name, origin, wanted, self._with_data)[target]
        return made.reshape(-1)[start - before : stop - before]

    def _convert(
        self, name: str, origin: Origin, wanted: Iterable[int], load: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        converter: Any = copy.deepcopy(origin.converter)
        for index in wanted:
            key = origin.keys[index]
            converter.add_tensor(name, key, origin.patterns[index], functools.partial(load, key))
        made = converter.convert(name, model=self._skeleton, config=self._skeleton.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    def _with_data(self, key: str) -> Tensor:
        return self._tensors[key].rows()

    def _without_data(self, key: str) -> Tensor:
        stored = self._tensors[key]
        return torch.empty(stored.shape, dtype=FLOATS.get(stored.dtype), device="meta")


@functools.lru_cache(maxsize=64)  # a run asks several times, and equal ones are read to the end
def _have_equal_elements(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    numel = math.prod(one.shape)
    for start in range(0, numel, BLOCK_NUMEL):
        stop = min(start + BLOCK_NUMEL, numel)
        if not torch.equal(*(t.elements(start, stop).to(dtype) for t in (one, other))):
            return False
    return True


def _of_rows(patterns: Sequence[str], first: int, last: int) -> list[int]:
    """Indices of the first-th to last-th of each pattern: what rows [first, last) are made of."""
    seen: Counter[str] = Counter()
    wanted = []
    for index, pattern in enumerate(patterns):
        if first <= seen[pattern] < last:
            wanted.append(index)
        seen[pattern] += 1
    return wanted


def _may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """transformers' own exceptions: what a model computes anew, although it has a name."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """{name: all names of the same, possibly tied, parameter}."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}
