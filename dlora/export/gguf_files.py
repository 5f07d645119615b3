"""`dlora export --format gguf`: `adapter.gguf` or `model.gguf`, and a `Modelfile` beside it."""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

from dlora.adapters.save_load import save_adapter
from dlora.adapters.source import AdapterSource
from dlora.base.model import DTYPES, BaseModel
from dlora.base.weight_files import StoredBase
from dlora.cli import answering
from dlora.errors import UsageError
from dlora.export.gguf_adapter import ADAPTER_FILE, write_adapter
from dlora.export.gguf_model import MODEL_FILE, write_model
from dlora.export.merged_model import MergedModel
from dlora.export.modelfile import write_modelfile
from dlora.io.files import new_directory
from dlora.lora.merge import rounding_line
from dlora.metrics.progress import CopyDisplay


def write_gguf(
    source: AdapterSource, base: BaseModel, skeleton: Any, target: Path, args: argparse.Namespace
) -> None:
    """Write the adapter, or with `--merge` the model, for llama.cpp.

    Raises:
        UsageError: llama.cpp has no place for something in it; nothing is written then.
    """
    if args.merge:
        _write_model(source, base, skeleton, target, args.dtype)
    else:
        _write_adapter(source, base, skeleton, target)


def _write_adapter(source: AdapterSource, base: BaseModel, skeleton: Any, target: Path) -> None:
    source.attach_to(skeleton)
    source.materialize(skeleton)
    tokenizer, ends = _tokenizer(base, source)
    origin = _origin(base, source)
    with new_directory(target) as folder, tempfile.TemporaryDirectory(dir=folder) as plain:
        # By way of PEFT's files, which any form of adapter becomes.
        save_adapter(skeleton, plain, base_model_name_or_path=base.source)
        write_adapter(Path(plain), folder / ADAPTER_FILE, base.config(), source.directory.name)
        below = str(origin or base.source)
        write_modelfile(folder, below, f"./{ADAPTER_FILE}", tokenizer, ends)


def _write_model(
    source: AdapterSource, base: BaseModel, skeleton: Any, target: Path, dtype: str | None
) -> None:
    stored = StoredBase(base, skeleton)
    source.attach_to(skeleton)
    merged = MergedModel(skeleton, source, stored, DTYPES[dtype] if dtype else None)
    config = copy.deepcopy(skeleton.config)
    config.tie_word_embeddings = bool(skeleton.all_tied_weights_keys) and not merged.untied
    tokenizer, ends = _tokenizer(base, source)
    origin = _origin(base, source)
    if tokenizer is None and origin is None:
        raise UsageError("--format: gguf needs the base's tokenizer")
    with new_directory(target) as folder, CopyDisplay(merged.nbytes) as display:
        merged.check(folder)
        write_model(
            merged,
            config,
            folder / MODEL_FILE,
            tokenizer=tokenizer,
            origin=origin,
            name=target.name,
            display=display,
        )
        write_modelfile(folder, f"./{MODEL_FILE}", None, tokenizer, ends)
    if line := rounding_line(merged.losses, dtype or "the base's dtype"):
        print(f"warning: {line}", file=sys.stderr)


def _origin(base: BaseModel, source: AdapterSource) -> Path | None:
    """The `.gguf` that the base was converted from, if it is there."""
    named = base.path if base.path.endswith(".gguf") else None
    if named is None and base.path == source.base.path:
        named = source.base.gguf
    path = Path(named).expanduser().absolute() if named else None
    return path if path is not None and path.is_file() else None


def _tokenizer(base: BaseModel, source: AdapterSource) -> tuple[Any, list[int]]:
    """The tokenizer with the chat template of the training, and what ends an answer."""
    try:
        tokenizer = base.tokenizer()
    except UsageError:  # weights alone can be exported as well
        tokenizer = None
    return tokenizer, answering(tokenizer, source)
