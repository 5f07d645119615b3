"""An adapter's directory as matrices: A and B of each adapted weight, read when they are asked for.

    linear, embedding      A [r, n]          B [m, r]            ΔW = s·B·A
    convolution            A [r, c, *k]      B [m, r, 1, …]      n = c·∏k
    stack of E matrices    A [E·r, n]        B [m, r·E]          ΔW_e = s·B_e·A_e

All of them are seen as stacks: A [E, r, n] and B [E, m, r], E = 1 for one matrix. The base is not
needed for it: PEFT's file has the shapes, and its settings r and the scale.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlora.adapters.hub import adapter_directory
from dlora.adapters.peft_config import check_no_mixture, read_config
from dlora.adapters.peft_names import PREFIX
from dlora.adapters.write import CONFIG, WEIGHTS
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, read_object
from dlora.io.safetensors import StoredTensor, stored_tensors
from dlora.lora.config import LoraConfig
from dlora.lora.tasks import HEADS

_WRAPPED = ".base_layer"  # in the path of a parameter's adapter, for each one outside it


@dataclass(frozen=True)
class Place:
    """One adapted weight of an adapter, or the matrices of one stack.

    Attributes:
        path: as PEFT's file has it, without its prefix.
        parameters: the names that `path`'s adapted parameters may have; () for a layer.
        experts: E.
    """

    path: str
    A: StoredTensor
    B: StoredTensor
    r: int
    scaling: float
    experts: int = 1
    parameters: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The path of the layer, or of the module that has the parameters."""
        return self.path.replace(_WRAPPED, "")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, m, n)."""
        return self.experts, self.B.shape[0], math.prod(self.A.shape[1:])

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(A [E, r, n], B [E, m, r]) without the scale."""
        A, B = (tensor.rows().to(dtype).flatten(1) for tensor in (self.A, self.B))
        return A.view(self.experts, self.r, -1), B.view(len(B), self.r, -1).permute(2, 0, 1)

    def as_stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A [E, k, n] and B [E, m, k] as PEFT stores them, with this place's further dims."""
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        if len(self.A.shape) == 2:
            return A, B
        return A.view(len(A), *self.A.shape[1:]), B.view(*B.shape, *self.B.shape[2:])


@dataclass(frozen=True)
class StoredAdapter:
    """A directory of PEFT's files.

    Attributes:
        settings: `adapter_config.json`.
        places: by path, in the order of the file.
        copies: of frozen tensors of the base, by key.
    """

    directory: Path
    settings: dict[str, Any]
    config: LoraConfig
    places: dict[str, Place]
    copies: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """{path: [m, n]}, as `shapes_in` has them."""
        return {path: [place.B.shape[0], *place.A.shape[1:]] for path, place in self.places.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the tensors' file."""
        return sha256_of(inside(self.directory, WEIGHTS))


def read_adapter(directory: str | Path, option: str = "--adapters") -> StoredAdapter:
    """Read an adapter's settings and the header of its tensors, and check that these are finite.

    Raises:
        UsageError: it is no adapter, is damaged, or has a part that is no low-rank update.
    """
    directory = adapter_directory(directory, option)
    check_directory(directory, option)
    config, settings = read_config(directory), read_object(inside(directory, CONFIG))
    file = inside(directory, WEIGHTS)
    factors, others = factors_in(file)
    if config.use_dora or any("magnitude_vector" in names for names in factors.values()):
        raise UsageError(
            f"{directory}: is a DoRA (use_dora), whose update of W0 has no low-rank form, so it "
            "can be neither composed nor compared"
        )
    _check_none_whole(directory, config, others)
    places = {path: _place(file, config, path, names) for path, names in factors.items()}
    if not places:
        raise UsageError(f"{file}: has no A and B")
    for place in places.values():
        place.A.check_numbers()
        place.B.check_numbers()
    return StoredAdapter(directory, settings, config, places, others)


def check_stored(directory: Path) -> None:
    """Check an adapter that is stored and not composed, so that it may be a DoRA, or train modules
    whole: its settings, that all tensors are finite, and that A and B have their r.

    Raises:
        UsageError: it is damaged, or has nothing that PEFT would load.
    """
    config, file = read_config(directory), inside(directory, WEIGHTS)
    for tensor in stored_tensors(file).values():
        tensor.check_numbers()
    factors, others = factors_in(file)
    if not factors and not (others and config.modules_to_save):
        raise UsageError(f"{file}: has no A and B")
    if config.target_parameters:  # whose names and r the file alone does not always tell
        return
    for path, names in factors.items():
        pair = {n: tensor for n, tensor in names.items() if not n.startswith("magnitude_vector")}
        _place(file, config, path, pair)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def factors_in(
    file: Path,
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """({path: {A, B or another name: tensor}}, {key: any other tensor}) of a file's header."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for key, tensor in stored_tensors(file).items():
        path, found, name = key.removeprefix(PREFIX).partition(".lora_")
        if found and key.startswith(PREFIX):
            factors.setdefault(path, {})[name.removesuffix(".weight")] = tensor
        else:
            others[key] = tensor
    return factors, others


def shapes_in(file: Path) -> dict[str, list[int]]:
    """{path: [m, n]} of what an adapter's file adapts; of a convolution n is several sizes."""
    shapes = {}
    for path, names in factors_in(file)[0].items():
        A, B = (next((t for n, t in names.items() if n.endswith(x)), None) for x in ("A", "B"))
        if A is not None and B is not None:
            shapes[path] = [*B.shape[:1], *A.shape[1:]]
    return shapes


def check_directory(directory: Path, option: str) -> None:
    if not directory.is_dir():
        raise UsageError(f"{option}: directory {directory} does not exist")
    check_no_mixture(directory)
    if (directory / CONFIG).exists():
        return
    if (directory / "manifest.json").exists():
        raise UsageError(
            f"{option}: {directory} is a checkpoint; `dlora export --adapter {directory} --to …` "
            "writes its adapter"
        )
    hint = f"; did you mean {directory / 'adapter'}?" if (directory / "adapter").is_dir() else ""
    raise UsageError(f"{option}: {directory} has no {CONFIG}{hint}")


def _check_none_whole(directory: Path, config: LoraConfig, others: dict[str, StoredTensor]) -> None:
    """Check that what is neither A nor B are copies of the frozen base."""
    heads = (*config.modules_to_save, *HEADS.get(config.task_type or "", ()))
    for key in others:
        path = key.removeprefix(PREFIX).rpartition(".")[0]
        if any(f"{name}." in f"{path}." for name in heads):
            raise UsageError(
                f"{directory}: trains {path} whole (modules_to_save), which has no low-rank form, "
                "so it can be neither composed nor compared; adapt that module instead"
            )
    if strange := [key for key in others if not key.endswith(".weight")]:
        raise UsageError(f"{directory / WEIGHTS}: has the unexpected {and_more(strange, 1)}")


def _place(file: Path, config: LoraConfig, path: str, names: dict[str, StoredTensor]) -> Place:
    embedding = "embedding_" if "embedding_A" in names else ""
    if names.keys() != {f"{embedding}A", f"{embedding}B"}:
        raise UsageError(f"{file}: {path} has {and_more(sorted(names))}; it needs one A and one B")
    A, B = names[f"{embedding}A"], names[f"{embedding}B"]
    owner = path.replace(_WRAPPED, "")
    parameters = () if embedding else _parameters(file, config, owner)
    meant = [f"{owner}.{name}" for name in parameters] or [owner]
    sizes = {(config.r_for(each), config.scaling_for(each)) for each in meant}
    if len(sizes) > 1:
        raise UsageError(
            f"{file}: r and lora_alpha differ between the parameters {', '.join(meant)}, and the "
            "file does not say which of them is which, so it cannot be composed"
        )
    r, scaling = next(iter(sizes))
    experts = A.shape[0] // r if parameters and A.shape else 1
    rows, columns = A.shape[:1], B.shape[1:2]
    if not rows == columns == (experts * r,) or len(A.shape) != len(B.shape):
        raise UsageError(
            f"{file}: {path} has A {list(A.shape)} and B {list(B.shape)}, but r is {r} in {CONFIG}"
        )
    if any(size != 1 for size in B.shape[2:]) or 0 in (*A.shape, *B.shape):
        raise UsageError(f"{file}: {path} has A {list(A.shape)} and B {list(B.shape)}: no update")
    return Place(path, A, B, r, scaling, experts, parameters)


def _parameters(file: Path, config: LoraConfig, owner: str) -> tuple[str, ...]:
    """The last names of the target parameters that belong to the module `owner`."""
    found = set()
    for name in config.target_parameters:
        module, _, last = name.rpartition(".")
        if not module:
            raise UsageError(
                f"{file}: target_parameters: {name} names no module, so what it means cannot be "
                "read from the file alone"
            )
        if f".{owner}".endswith(f".{module}"):
            found.add(last)
    return tuple(sorted(found))
