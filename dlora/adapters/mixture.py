"""A mixture of experts (mola) on disk: every expert is a plain LoRA of its own.

    experts/0/adapter_config.json, adapter_model.safetensors   expert 0, PEFT's files
    experts/1/…
    router.safetensors                                         of every layer, by its path:
        <path>.router.weight  R [E, n]
        <path>.mean_gates     ḡ [E], mean of the gates over tokens at the end of training, if known

The metadata of `router.safetensors` say how many experts there are and how many a token uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.peft_config import check_numbers, read_config
from dlora.adapters.peft_format import lora_files
from dlora.adapters.peft_names import keys_of
from dlora.adapters.write import CONFIG, ROUTER, WEIGHTS, write_files
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, write_atomically
from dlora.io.safetensors import FLOATS, StoredTensor, stored_tensors
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.config import LoraConfig
from dlora.lora.variants import PlainLora
from dlora.lora.variants.mola import SIZES, MolaAdapter, MolaConfig

EXPERTS = "experts"
_KINDS = {"experts": int, "top_k": int, "balance_coef": float, "router_init_std": float}
# Which modules have adapters; of frozen experts their files say it.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def is_mixture(model: nn.Module) -> bool:
    """Whether the adapters that are meant are a mixture of experts."""
    return isinstance(attachment_of(model).config, MolaConfig)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any, MolaAdapter]]:
    """(path, layer, adapter) of every layer of a model with a mixture."""
    for path, layer, adapter in named_adapters(model):
        assert isinstance(adapter, MolaAdapter)
        yield path, layer, adapter


def has_mixture(directory: str | Path) -> bool:
    """Whether a directory has a mixture of experts."""
    return inside(Path(directory).expanduser(), ROUTER).exists()


# -- writing --------------------------------------------------------------------------------------


def write_mixture(model: nn.Module, directory: str | Path, base: str | None) -> None:
    """Write the files above, those of the router last; see `save_adapter`.

    Args:
        base: name or path of the base, to be recorded with every expert.
    """
    config = attachment_of(model).config
    assert isinstance(config, MolaConfig)
    directory = Path(directory).expanduser()
    for expert in range(config.experts):
        forms = {path: _form(adapter, expert) for path, _, adapter in experts_of(model)}
        write_files(directory / EXPERTS / str(expert), *lora_files(model, base, forms))
    tensors: dict[str, Tensor] = {}
    for path, _, adapter in experts_of(model):
        found = {"router.weight": adapter.lora_router.detach()}
        if adapter.mean_gates is not None:
            found["mean_gates"] = adapter.mean_gates
        for name, tensor in found.items():
            tensors[f"{path}.{name}"] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    # In one entry: the library writes several in any order, and equal files are equal.
    said = json.dumps({name: getattr(config, name) for name in _KINDS})
    content = save(tensors, metadata={config.method: said})
    write_atomically(directory / ROUTER, content)
    for name in (CONFIG, WEIGHTS):  # of a plain LoRA that was here before
        (directory / name).unlink(missing_ok=True)


def _form(adapter: MolaAdapter, expert: int) -> PlainLora:
    A, B = adapter.of_each()[expert]
    return PlainLora(A, B, adapter.experts.scalings[expert])


# -- reading --------------------------------------------------------------------------------------


def mixture_of(directory: Path) -> MolaConfig:
    """The settings of the mixture in a directory.

    Raises:
        UsageError: a file is missing or damaged, or experts do not fit each other.
    """
    file = inside(directory, ROUTER)
    stored_tensors(file)  # checks the header
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    try:
        said = json.loads(metadata[MolaConfig.method])
        own: dict[str, Any] = {name: kind(said[name]) for name, kind in _KINDS.items()}
        if not 1 <= own["experts"] <= 1024:
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UsageError(f"{file}: does not say how many experts there are, and how used") from None
    places = [inside(directory, EXPERTS) / str(expert) for expert in range(own["experts"])]
    try:
        return MolaConfig(**own, **_of_experts(places, "experts"), strict_names=False)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def with_experts(config: LoraConfig, earlier: LoraConfig | None = None) -> LoraConfig:
    """Settings with the sizes and targets of the experts at `experts_from`; others as they are.

    Args:
        earlier: of the run that is resumed: they count where a directory has been deleted since.
    """
    if not isinstance(config, MolaConfig) or not config.experts_from:
        return config
    there = all(Path(place).expanduser().is_dir() for place in config.experts_from)
    if not there and isinstance(earlier, MolaConfig) and earlier.experts_from:
        names = {"expert_settings", *SIZES, *_TARGETS, "strict_names"}
        found: dict[str, Any] = {name: getattr(earlier, name) for name in names}
    else:
        places = [adapter_directory(p, "adapter.experts_from") for p in config.experts_from]
        found = {**_of_experts(places, "experts_from"), "strict_names": False}
    return replace(config, **found)


def _of_experts(places: Sequence[Path], what: str) -> dict[str, Any]:
    """Fields of the settings that plain LoRAs mean together, which adapt the same modules."""
    configs, adapted = [], []
    for place in places:
        config = read_config(place)
        for name in ("use_dora", "modules_to_save", "target_parameters"):
            if getattr(config, name):
                raise UsageError(
                    f"{what}: {place} has {name}, and an expert is a plain LoRA of linear layers"
                )
        configs.append(config)
        adapted.append({*stored_tensors(inside(place, WEIGHTS))})
    for place, keys in zip(places, adapted, strict=True):
        if odd := sorted(keys ^ adapted[0]):
            raise UsageError(
                f"{what}: {place} and {places[0]} adapt different modules: {odd[0]} is in one alone"
            )
    sizes = [{name: getattr(config, name) for name in SIZES} for config in configs]
    first = {f.name: getattr(configs[0], f.name) for f in fields(LoraConfig) if f.name in _TARGETS}
    return {"expert_settings": sizes, **first}


def expert_slots(model: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors of each expert of a model, views, by their keys in PEFT's file."""
    slots: list[dict[str, Tensor]] = []
    for path, layer, adapter in experts_of(model):
        pairs = adapter.of_each()
        slots += [{} for _ in pairs[len(slots) :]]
        keys = keys_of(model, path, layer, adapter)
        for own, pair in zip(slots, pairs, strict=True):
            own |= zip((keys["lora_A"], keys["lora_B"]), pair, strict=True)
    return slots


def read_experts(model: nn.Module, places: Sequence[Path]) -> list[dict[str, StoredTensor]]:
    """The tensors of each expert in the directories, checked to fit a model and to be finite.

    Raises:
        UsageError: they do not.
    """
    found = []
    for place, slots in zip(places, expert_slots(model), strict=True):
        file = inside(place, WEIGHTS)
        stored = stored_tensors(file)
        _check_fits(file, stored, slots)
        check_numbers(stored)
        found.append(stored)
    return found


def frozen_experts(model: nn.Module) -> list[Path]:
    """The directories of `experts_from`, of a model whose experts are frozen; else none."""
    config = attachment_of(model).config
    named = config.experts_from if isinstance(config, MolaConfig) else []
    return [adapter_directory(place, "adapter.experts_from") for place in named]


@torch.no_grad()
def fill_experts(model: nn.Module, places: Sequence[Path]) -> None:
    """Read the experts of a model from directories of plain LoRAs; see `read_experts`."""
    every = zip(read_experts(model, places), expert_slots(model), strict=True)
    for stored, slots in every:
        for key, slot in slots.items():
            slot.copy_(stored[key].rows().view(slot.shape))
    for _, _, adapter in experts_of(model):
        adapter.filled = adapter.frozen


def fill_mixture(model: nn.Module, directory: Path, config: MolaConfig) -> None:
    """Read a mixture into a model that has one of the same sizes.

    Raises:
        UsageError: it has not, or a file is damaged.
    """
    own = attachment_of(model).config
    named = list(experts_of(model)) if isinstance(own, MolaConfig) else []
    if not named or any(a.experts != config.experts_at(path) for path, _, a in named):
        raise UsageError(
            f"load_adapter: {directory} is a mixture of {config.experts} experts (mola) that does "
            "not fit the adapters of this model; load it into a model without adapters"
        )
    routers, gates = router_tensors(model, directory)
    fill_experts(model, places_in(directory, config))
    for path, _, adapter in named:
        with torch.no_grad():
            adapter.lora_router.copy_(routers[path].rows())
        adapter.mean_gates = gates[path].rows().float() if path in gates else None


def places_in(directory: Path, config: MolaConfig) -> list[Path]:
    """The directories of a mixture's experts."""
    return [inside(directory, EXPERTS) / str(expert) for expert in range(config.experts)]


def router_tensors(
    model: nn.Module, directory: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """(R, mean gates) of every adapted layer by its path, checked to fit and to be finite."""
    file = inside(directory, ROUTER)
    stored = stored_tensors(file)
    shapes: dict[str, Tensor] = {}
    for path, _, adapter in experts_of(model):
        R = adapter.lora_router
        shapes[f"{path}.router.weight"] = R
        if f"{path}.mean_gates" in stored:
            shapes[f"{path}.mean_gates"] = R[:, 0]
    _check_fits(file, stored, shapes)
    check_numbers(stored)
    paths = [path for path, _, _ in experts_of(model)]
    return (
        dict(_by_path(stored, paths, "router.weight")),
        dict(_by_path(stored, paths, "mean_gates")),
    )


def _by_path(
    stored: Mapping[str, StoredTensor], paths: Sequence[str], name: str
) -> Iterator[tuple[str, StoredTensor]]:
    return ((path, stored[k]) for path in paths if (k := f"{path}.{name}") in stored)


def _check_fits(
    file: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]
) -> None:
    if odd := sorted(stored.keys() ^ expected.keys()):
        what = "has the unexpected" if odd[0] in stored else "lacks"
        raise UsageError(f"{file}: does not fit the base: it {what} {and_more(odd, 1)}")
    for key, tensor in stored.items():
        shape = tuple(expected[key].shape)
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise UsageError(
                f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}, the model expects floats "
                f"{list(shape)}"
            )
