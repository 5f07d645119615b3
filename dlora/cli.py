"""Shared by the commands on adapters: where they write, and an adapter's base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dlora.adapters.recorded import Answering, BaseReference
from dlora.adapters.source import AdapterSource
from dlora.base.model import BaseModel, find_base
from dlora.base.model_class import CAUSAL, class_for
from dlora.base.native import AUTO_DTYPE, native_dtype
from dlora.data.stops import turn_ends
from dlora.data.template import set_template
from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.runtime.arguments import OneLineParser as OneLineParser  # for commands that ask here
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement


def new_target(to: str, *sources: Path, what: str = "the adapter itself") -> Path:
    """The absolute path of `--to`, which must be new or empty, and none of what is read.

    Args:
        what: the sources are, for errors.
    """
    target = path_of(to, "--to").resolve()
    if any(target == source.resolve() for source in sources):
        raise UsageError(f"--to: {to} is {what}; name a new directory")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"--to: {to} is not empty; name a new or empty directory")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--to: {to} is not a directory")
    return target


@contextmanager
def naming_base(option: str) -> Iterator[None]:
    """Inside, errors about the base name `option`; these commands have no `model.path`."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{option}: {str(error).removeprefix('model.path: ')}") from error


def chosen_base(
    override: str | None,
    source: AdapterSource | None,
    *,
    dtype: str | None,
    trust_remote_code: bool,
    announce: Callable[[str], None],
    quantization: str = "none",
) -> tuple[BaseModel, str]:
    """Find the base of `--base`, or else the one that the adapter records.

    Args:
        override: `--base`.
        source: the adapter.
        dtype: of the base; `"auto"`: bfloat16 where this machine multiplies in it natively, else
            float32; None: the one that a checkpoint records, else bfloat16.
        announce: gets a line when a `.gguf` file is converted.
        quantization: how the linear layers of its blocks are packed when it is loaded.

    Returns:
        The base, and its name in errors.

    Raises:
        UsageError: neither names a base, or it cannot be found.
    """
    recorded = source.base if source else BaseReference()
    option = "--base"
    if override is None:
        if source is None:
            raise UsageError("give --base, --adapter, or both")
        if not recorded.path:
            raise UsageError(f"{source.directory} does not record its base; add --base")
        option = f"the base of {source.directory} (--base overrides it)"
    path = override or recorded.path
    assert path is not None
    # The recorded revision belongs to the recorded base; a place for conversions serves any.
    revision = recorded.revision if path == recorded.path else None
    if trust_remote_code and path.endswith(".gguf"):
        raise UsageError("--trust-remote-code cannot act: a .gguf file contains no code")
    with naming_base(option):
        base = find_base(
            path,
            dtype=_settled(dtype or recorded.dtype or "bfloat16"),
            revision=revision,
            trust_remote_code=trust_remote_code,
            cache_dir=recorded.cache_dir or "~/.cache/dlora",
            quantization=quantization,
            made_as=class_for(source.task, source.labels) if source else CAUSAL,
            announce=announce,
        )
        base.config()
    return base, option


def loaded(base: BaseModel) -> Any:
    """The whole model, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return placed(base, "none", Topology(rank=0, world=1, ranks_per_node=1), device)


def placed(base: BaseModel, where: str, topology: Topology, device: torch.device) -> Any:
    """The model with this rank's share of the weights; collective where ranks share them.

    Args:
        where: W0 is stored, as `sharding.base`.
    """
    engine = build_engine(resolve_placement("fsdp2", where, topology), topology)
    return base.load(engine, device)


def _settled(dtype: str) -> str:
    """`auto` as this machine has it."""
    if dtype != AUTO_DTYPE:
        return dtype
    return native_dtype("cuda" if torch.cuda.is_available() else "cpu")


def answering(tokenizer: Any, source: AdapterSource | None) -> list[int]:
    """Let a base's tokenizer write chats as the adapter was trained on them.

    Args:
        tokenizer: gets the adapter's chat template; None: the base has none.

    Returns:
        The tokens that end an answer.

    Raises:
        UsageError: the adapter's template is not valid.
    """
    recorded = source.answering if source else Answering()
    if tokenizer is None:
        return list(recorded.ends)
    try:
        set_template(tokenizer, recorded.template, recorded.variables)
    except UsageError as error:
        raise UsageError(f"{source and source.directory}: {error}") from None
    return sorted({*turn_ends(tokenizer), *recorded.ends})
