"""The class of transformers that a base is made as, and the head that its files may lack.

A base that was trained to predict tokens has no head for another task. transformers draws one at
random, on each rank for itself; here it is zero in W0, and what is trained in its place is drawn
from the run's seed (`draw_copies`), so that it is the same on every rank and under every engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dlora.base.skeleton import auto_class
from dlora.errors import UsageError
from dlora.lora.attach import named_copies
from dlora.lora.dropout import seed_of

_POOLER = re.compile(r"(^|\.)pooler\.")


def _as_it_is(config: Any) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class ModelClass:
    """What a base is made as.

    Attributes:
        name: of transformers' class that finds the one for a configuration.
        configure: sets on a configuration what the use of the model decides.
        draws_head: whether the files may lack what comes behind the base model, and its pooler.
    """

    name: str = "AutoModelForCausalLM"
    configure: Callable[[Any], None] = _as_it_is
    draws_head: bool = False

    def auto(self, config: Any) -> Any:
        """The class itself, for a configuration.

        Raises:
            UsageError: it knows no model of that kind.
        """
        if self.name == "AutoModelForCausalLM":
            return auto_class(config)
        import transformers

        found = getattr(transformers, self.name)
        if type(config) in found._model_mapping or hasattr(config, "auto_map"):
            return found
        raise UsageError(
            f"train.task: transformers has no model of {config.model_type} for it ({self.name})"
        )

    def may_lack(self, model: Any) -> set[str]:
        """The parameters that the files of the model may lack."""
        if not self.draws_head:
            return set()
        prefix = f"{model.base_model_prefix}."
        names = model.state_dict().keys()
        return {name for name in names if not name.startswith(prefix) or _POOLER.search(name)}


CAUSAL = ModelClass()
# The classes for PEFT's other tasks, and whether a base has no head for them.
_OF_TASK = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", True),
    "TOKEN_CLS": ("AutoModelForTokenClassification", True),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", True),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", False),
}


def class_for(task: str | None, labels: Sequence[str]) -> ModelClass:
    """What the base of an adapter is made as.

    Args:
        task: PEFT's word for what the adapter was trained for.
        labels: of a classification, in order.
    """
    if task not in _OF_TASK:
        return CAUSAL
    name, draws_head = _OF_TASK[task]
    return ModelClass(name, partial(set_labels, labels=labels), draws_head)


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Let a configuration have these labels, in this order; none: those that it has."""
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}


def owners_of(names: Collection[str]) -> list[str]:
    """Paths of the modules that have the parameters `names`."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


@torch.no_grad()
def draw_copies(model: nn.Module, skeleton: Any, names: Collection[str], seed: int) -> None:
    """Fill the trained copies of the parameters `names` as the model's class fills new ones.

    Args:
        skeleton: the model on the meta device, without adapters.
    """
    for path, _, copy in named_copies(model):
        if not any(f"{path}.{name}" in names for name, _ in copy.named_parameters()):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "head", path))
            fresh = skeleton.get_submodule(path).to_empty(device="cpu")
            fresh.apply(skeleton._init_weights)
        drawn = dict(fresh.named_parameters())
        for name, parameter in copy.named_parameters():
            if f"{path}.{name}" in names:
                parameter.copy_(drawn[name])
