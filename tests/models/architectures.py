"""The architectures of the table, and a tiny random base of each, in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import save_chats, tokenizer
from transformers.models.auto import modeling_auto

from .tiny_configs import tiny

CHATS = 5
CAUSAL, COMPOSITE = "AutoModelForCausalLM", "AutoModelForImageTextToText"


class ClassFails(Exception):  # noqa: N818
    """transformers' own class cannot be built or run in this size; says why."""


@dataclass(frozen=True)
class Architecture:
    """A model class, and how transformers finds it.

    Attributes:
        model_type: of its configuration.
        name: of the class.
        auto: transformers' auto class, by name.
    """

    model_type: str
    name: str
    auto: str

    @property
    def auto_class(self) -> Any:
        """transformers' auto class."""
        return getattr(transformers, self.auto)

    def make(self, directory: Path) -> None:
        """Write a base, its tokenizer and chats to train on into `directory`.

        Raises:
            ClassFails: the class cannot be built, saved, read or called.
        """
        transformers.logging.set_verbosity_error()
        config_class = transformers.CONFIG_MAPPING[self.model_type]
        try:
            model = self._made(config_class)
            model.save_pretrained(directory)
            tokenizer().save_pretrained(directory)
            save_chats(directory / "chats.jsonl", CHATS)
            _check(self.read(directory), model)
        except ClassFails:
            raise
        except Exception as error:  # whatever a class raises
            raise ClassFails(first_line(error)) from error

    def _made(self, config_class: Any) -> Any:
        torch.manual_seed(0)
        model = self.auto_class.from_config(tiny(config_class), dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # no zeros and ones: each value has to be in its place
            for tensor in dict.fromkeys(model.parameters()):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        return model

    def read(self, directory: Path) -> Any:
        """The base in `directory` as transformers reads it, in float32, for evaluation."""
        return self.auto_class.from_pretrained(directory, dtype=torch.float32).eval()


def architectures() -> list[Architecture]:
    """Every causal language model, then every composite one that is not among them."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    composite = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found = [Architecture(kind, _first(name), CAUSAL) for kind, name in causal.items()]
    known = {*causal}
    return found + [
        Architecture(kind, _first(name), COMPOSITE)
        for kind, name in composite.items()
        if kind not in known
    ]


def first_line(error: BaseException | str, most: int = 160) -> str:
    """An error in a cell of the table."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (kind + text)[:most]


def call(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    """The model on token ids [1, T]."""
    try:
        return model(input_ids=ids, **more)
    except AttributeError:  # a class that cannot make its own cache
        return model(input_ids=ids, use_cache=False, **more)


@torch.no_grad()
def _check(read: Any, made: Any) -> None:
    ids = torch.arange(60, 84)[None]
    one, other = call(read, ids).logits, call(made, ids).logits
    if one.shape[:2] != ids.shape:
        raise ClassFails(f"its logits of {list(ids.shape)} tokens are {list(one.shape)}")
    if not torch.isfinite(one).all():
        raise ClassFails("its logits are not finite")
    if not torch.allclose(one, other, atol=1e-4, rtol=1e-4):
        raise ClassFails("what it saves it does not read back: other logits")


def _first(name: Any) -> str:
    return name if isinstance(name, str) else name[0]
