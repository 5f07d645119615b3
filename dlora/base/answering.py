"""What a base needs beside its weights to answer as an adapter was trained: its chat template, and
the tokens that end an answer.

A base that was never tuned on chats, or whose tokenizer names another token as its end, would go on
behind an answer that the adapter ends as it learned it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dlora.base.model import BaseModel
from dlora.io.files import read_object, write_atomically

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_beside_adapter(
    directory: Path, base: BaseModel, tokenizer: Any, ends: Iterable[int]
) -> None:
    """Write into an adapter's directory what its base says otherwise, and nothing else.

    Args:
        tokenizer: the base's, with the chat template of the training; None: that is the base's own.
        ends: tokens that end an answer.
    """
    settings = generation_settings(base)
    if add_ends(settings, ends):
        write_atomically(directory / GENERATION, _json(settings))
    else:  # of an earlier run in the same directory
        (directory / GENERATION).unlink(missing_ok=True)
    if tokenizer is None:
        (directory / TEMPLATE).unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for path in sorted(Path(made).iterdir()):
            if path.is_file():
                write_atomically(directory / path.name, path.read_bytes())


def write_into_model(folder: Path, base: BaseModel, tokenizer: Any, ends: Iterable[int]) -> None:
    """The same for a model's directory that has the base's own files already."""
    settings = generation_settings(base)
    if add_ends(settings, ends):
        (folder / GENERATION).write_bytes(_json(settings))
    if tokenizer is None:
        return
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for path in sorted(Path(made).rglob("*.jinja")):
            target = folder / path.relative_to(made)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if (path := folder / "tokenizer_config.json").exists():
        settings = read_object(path)
        if settings.pop("chat_template", None) is not None:  # one place has the template
            path.write_bytes(_json(settings))


def generation_settings(base: BaseModel) -> dict[str, Any]:
    """The base's generation_config.json; without one, what its config.json says of tokens."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        base.source,
        GENERATION,
        revision=base.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # the weights have been read
    )
    if path:
        return read_object(Path(path))
    config = base.config().get_text_config()
    found = {name: getattr(config, name, None) for name in _TOKENS}
    return {"_from_model_config": True} | {k: v for k, v in found.items() if v is not None}


def add_ends(settings: dict[str, Any], ends: Iterable[int]) -> bool:
    """Add tokens that end an answer to generation settings; whether any was not there."""
    own = as_list(settings.get("eos_token_id"))
    if new := [end for end in sorted(set(ends)) if end not in own]:
        settings["eos_token_id"] = [*own, *new] if own or len(new) > 1 else new[0]
    return bool(new)


def as_list(ends: Any) -> list[int]:
    """`eos_token_id` as generation settings have it: none, one or several."""
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
