"""The part of a model with several inputs that text alone reaches.

Gemma3ForConditionalGeneration      model.vision_tower, model.multi_modal_projector
                                    model.language_model                              ← text
"""

from __future__ import annotations

from typing import Any

from torch import nn


def text_part(model: Any) -> str | None:
    """The path of the text model inside a generating model that takes images or audio as well.

    None for a model that takes text alone, that has an encoder for its text, or whose text part
    cannot be told from the rest.
    """
    config, find = getattr(model, "config", None), getattr(model, "get_decoder", None)
    if config is None or not callable(find) or not hasattr(config, "get_text_config"):
        return None
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        return None
    if config.get_text_config() is config:
        return None
    decoder = find()
    paths = [path for path, module in model.named_modules() if module is decoder]
    return paths[0] if paths and paths[0] else None


def takes_other_input(module: nn.Module) -> bool:
    """Whether a block of the text part attends to images, and is left out where there are none."""
    return "crossattention" in type(module).__name__.lower().replace("_", "")


def reached_by_text(model: nn.Module, path: str, part: str | None) -> bool:
    """Whether text alone gets to the module at `path`.

    Args:
        part: `text_part(model)`.
    """
    if part is None:
        return True
    if not f"{path}.".startswith(f"{part}."):
        return False
    names = path.removeprefix(part).strip(".").split(".")
    for end in range(1, len(names) + 1):
        inner = ".".join([part, *names[:end]])
        if takes_other_input(model.get_submodule(inner)):
            return False
    return True
