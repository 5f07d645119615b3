"""The files of a composed adapter: PEFT's two, written one matrix at a time, and how it was made.

adapter_config.json, adapter_model.safetensors    a plain LoRA of scale 1, float32
composition.json                                  method, adapters by path and hash, weights
pytorch_lora_weights.safetensors                  diffusers' file, where the adapters have one
chat_template.jinja, …                            what all adapters have beside them, alike
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlora.adapters import diffusers_format
from dlora.adapters.peft_format import NO_TARGETS
from dlora.adapters.peft_names import PREFIX
from dlora.adapters.write import CONFIG, WEIGHTS, recorded_name
from dlora.errors import UsageError
from dlora.io.files import inside, new_directory, write_atomically
from dlora.io.safetensors import (
    FLOATS,
    NewTensor,
    StoredTensor,
    new_float_tensor,
    stored_tensors,
    write_tensors,
)
from dlora.library.composition import Composition
from dlora.library.same_base import Base
from dlora.library.stored import Place, StoredAdapter
from dlora.metrics.progress import CopyDisplay

COMPOSITION = "composition.json"
# What says how an adapter answers; see `dlora.base.answering`.
BESIDE = (
    *("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "labels.json"),
)
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def write_result(
    composition: Composition, target: Path, base: Base, announce: Callable[[str], None]
) -> None:
    """Write the composed adapter; the directory is complete, or not there.

    Args:
        target: must be new or empty.
        base: of the adapters, to be recorded.
        announce: gets a line for what is not carried over.

    Raises:
        UsageError: settings of the adapters contradict one another.
    """
    settings = settings_of(composition, base)
    tensors = [*_new_tensors(composition), *_copies(composition.adapters)]
    beside = carried(composition.adapters, announce)
    prefix = _diffusers_prefix(composition.adapters)
    header = diffusers_format.header(settings, PREFIX) if prefix else None
    with new_directory(target) as folder, CopyDisplay(sum(t.nbytes for t in tensors)) as display:
        write_tensors(folder / WEIGHTS, tensors, display.advance, header)
        if prefix:
            _write_for_diffusers(folder, settings, prefix)
        for name, content in beside.items():
            write_atomically(folder / name, content)
        write_atomically(folder / COMPOSITION, _json(composition.record()))
        write_atomically(folder / CONFIG, _json(settings))


def settings_of(composition: Composition, base: Base) -> dict[str, Any]:
    """`adapter_config.json`: the union of the targets, the rank of each, and the scale 1."""
    adapters = composition.adapters
    ranks = {path: composition.rank_of(path) for path in composition.places}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: a name alone also means what ends with it.
    pattern = {
        f"^{re.escape(name)}": ranks[path]
        for path, place in composition.places.items()
        if ranks[path] != usual
        for name in [f"{place.owner}.{last}" for last in place.parameters] or [place.owner]
    }
    parameters = sorted({n for a in adapters for n in a.config.target_parameters})
    settings = {
        "peft_type": "LORA",
        "task_type": _common(adapters, "task_type"),
        "auto_mapping": _common(adapters, "auto_mapping"),
        "base_model_name_or_path": base.path and recorded_name(base.path),
        "revision": base.revision,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(adapter.settings.get("fan_in_fan_out") for adapter in adapters),
        "modules_to_save": None,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **_targets(composition),
    }
    return settings | ({"target_parameters": parameters} if parameters else {})


def carried(adapters: Sequence[StoredAdapter], announce: Callable[[str], None]) -> dict[str, bytes]:
    """{name: content} of the files beside the adapters that all of them have alike."""
    found: dict[str, bytes] = {}
    for name in BESIDE:
        paths = [inside(adapter.directory, name) for adapter in adapters]
        contents = {path.read_bytes() if path.is_file() else b"" for path in paths}
        if len(contents) > 1:
            announce(f"{name} is not the same beside all adapters, so the result has none")
        elif content := contents.pop():
            found[name] = content
    return found


def _diffusers_prefix(adapters: Sequence[StoredAdapter]) -> str | None:
    """The prefix of the keys in diffusers' files; None: no adapter has such a file.

    Raises:
        UsageError: they are of two models.
    """
    known = {prefix: a for a in adapters if (prefix := diffusers_format.prefix_in(a.directory))}
    if len(known) > 1:
        (one, first), (other, second), *_ = known.items()
        raise UsageError(
            f"{second.directory}: is an adapter of a pipeline's {other[:-1]}, and "
            f"{first.directory} of its {one[:-1]}: they do not belong together"
        )
    return next(iter(known), None)


def _write_for_diffusers(folder: Path, settings: dict[str, Any], prefix: str) -> None:
    """Write diffusers' file: the tensors of PEFT's under other keys."""
    renamed = [
        NewTensor(prefix + key.removeprefix(PREFIX), t.dtype, t.shape, t.nbytes, t.blocks)
        for key, t in stored_tensors(folder / WEIGHTS).items()
    ]
    header = diffusers_format.header(settings, prefix)
    write_tensors(folder / diffusers_format.LORA_WEIGHTS, renamed, lambda _: None, header)


def _targets(composition: Composition) -> dict[str, Any]:
    """Settings that select exactly the union of what the adapters adapt."""
    adapters = composition.adapters
    chosen: list[Any] = [{key: a.settings.get(key) for key in _SELECTION} for a in adapters]
    if all(one == chosen[0] for one in chosen):
        return {key: value for key, value in chosen[0].items() if value is not None}
    names = [one["target_modules"] for one in chosen]
    if all(isinstance(n, list) for n in names) and not any(
        one[key] for one in chosen for key in _SELECTION[1:]
    ):
        return {"target_modules": sorted({name for some in names for name in some})}
    layers = [path for path, place in composition.places.items() if not place.parameters]
    return {"target_modules": "|".join(re.escape(path) for path in layers) or NO_TARGETS}


def _common(adapters: Sequence[StoredAdapter], key: str) -> Any:
    """The one value that the adapters have for a setting, beside those that have none."""
    found = {json.dumps(a.settings[key]): a for a in adapters if a.settings.get(key) is not None}
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise UsageError(
            f"{second.directory}: {key} is {other}, but {one} in {first.directory}: they do not "
            "belong together"
        )
    return json.loads(next(iter(found))) if found else None


def _new_tensors(composition: Composition) -> list[NewTensor]:
    """A and B of every place, made when they are written; B directly behind its A."""
    made = []
    for path, place in composition.places.items():
        experts, m, n = place.shape
        k = composition.rank_of(path)
        A, B = place.as_stored(
            torch.empty(experts, k, n, device="meta"), torch.empty(experts, m, k, device="meta")
        )
        for number, (key, shape) in enumerate(((place.A.key, A.shape), (place.B.key, B.shape))):
            parts = partial(_stored_factor, composition, place, number)
            made.append(new_float_tensor(key, torch.float32, shape, parts))
    return made


def _stored_factor(composition: Composition, place: Place, number: int) -> Any:
    found: Tensor = place.as_stored(*composition.factors(place.path))[number]
    yield found


def _copies(adapters: Sequence[StoredAdapter]) -> list[NewTensor]:
    """Frozen tensors of the base in PEFT's files, as they are; equal in all adapters with them.

    Raises:
        UsageError: they differ, so the bases do.
    """
    found: dict[str, StoredTensor] = {}
    for adapter in adapters:
        for key, tensor in adapter.copies.items():
            first = found.setdefault(key, tensor)
            if not _equal(first, tensor):
                raise UsageError(
                    f"{tensor.file}: {key.removeprefix(PREFIX)}, a copy of the base's, differs "
                    f"from that in {first.file}: they are adapters of two bases"
                )
    return [NewTensor(t.key, t.dtype, t.shape, t.nbytes, t.blocks) for t in found.values()]


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Equal but for a cast."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    if one.dtype == other.dtype:
        return all(a == b for a, b in zip(one.blocks(), other.blocks(), strict=True))
    narrow = min((FLOATS[one.dtype], FLOATS[other.dtype]), key=lambda dtype: dtype.itemsize)
    return all(
        torch.equal(one.rows(i, i + 1).to(narrow), other.rows(i, i + 1).to(narrow))
        for i in range(one.shape[0])
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
