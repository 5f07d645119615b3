"""States in safetensors files: nested dictionaries of tensors, numbers and text; random states.

    one file    its tensors, and all else as JSON in the header, where each tensor has its name

Nothing in them is executed when they are read.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlora import UsageError

_TENSOR = "tensor:"  # begins a tensor's name


def write_random(directory: Path, rank: int) -> None:
    """Write this rank's random states: of Python, numpy, torch and its GPU."""
    write(_random_file(directory, rank), _random_state())


def read_random(directory: Path, rank: int, world: int) -> None:
    """Put back what this rank wrote, unless there were fewer ranks then."""
    if _random_file(directory, world - 1).exists():
        _set_random_state(read(_random_file(directory, rank)))


def _random_file(directory: Path, rank: int) -> Path:
    return directory / f"random_state_{rank}.safetensors"


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(file: Path, state: Any) -> None:
    """A nested state as one safetensors file: its tensors, and the rest as JSON in the header."""
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_flat(state, tensors))
    except TypeError as error:
        raise UsageError(
            f"{file}: a state has what is neither number, text nor tensor: {error}"
        ) from None
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, beside, {"state": text})
    os.replace(beside, file)


def read(file: Path) -> Any:
    try:
        with safe_open(file, "pt") as stored:
            return _nested(json.loads((stored.metadata() or {})["state"]), stored)
    except FileNotFoundError:
        raise UsageError(f"{file}: file not found") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{file}: damaged: {error}") from None


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON of a nested state; a dictionary becomes its pairs, as its keys may be integers."""
    if isinstance(value, Tensor):
        name = f"{_TENSOR}{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return name
    if isinstance(value, Mapping):
        return {"pairs": [[key, _flat(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flat(inner, tensors) for inner in value]
    return value


def _nested(value: Any, stored: Any) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return stored.get_tensor(value)
    if isinstance(value, dict):
        return {key: _nested(inner, stored) for key, inner in value["pairs"]}
    return [_nested(inner, stored) for inner in value] if isinstance(value, list) else value
