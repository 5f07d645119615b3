"""PEFT's `task_type` of a model, by the auto class that loads it.

PEFT has a class of adapted model for each task, and `AutoPeftModelFor…` loads the base with the
auto class of the same name. So a task is right where transformers' table for that auto class has
the model's class, and where the forward takes what PEFT's class passes on.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from dlora.lora.attach import attachment_of
from dlora.lora.made_class import original_class
from dlora.lora.tasks import AUTO, HEADS, head_names

_TABLES = {  # in this order: a class stands in the table of its task, and in few others
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
# What PEFT's classes pass to every forward. Models of images and sounds have no `input_ids`.
_PASSED = ("input_ids", "attention_mask", "inputs_embeds")


def task_type_of(model: nn.Module) -> str | None:
    """The task that PEFT's files of this model name; None where PEFT has no class for it.

    A task whose head PEFT reads from the file is not named where that head was not trained.
    """
    task = attachment_of(model).config.task_type
    if task in (None, AUTO):
        task = _task_of_class(model)
    if task in HEADS:
        saved = attachment_of(model).saved
        heads = head_names(model, task)
        if not heads or not all(any(p.endswith(h) for p in saved) for h in heads):
            return None
    return task


def auto_mapping_of(model: nn.Module) -> dict[str, str]:
    """PEFT's record of a base without a task, with which `AutoPeftModel` finds its class."""
    base = _own_class(model)
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _task_of_class(model: nn.Module) -> str | None:
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    from transformers.models.auto import modeling_auto

    tables = {task: _names(getattr(modeling_auto, name)) for task, name in _TABLES.items()}
    for base in _own_class(model).__mro__:
        for task, names in tables.items():
            if base.__name__ in names:
                return task if _takes_what_is_passed(model, task) else None
    return None


def _takes_what_is_passed(model: nn.Module, task: str) -> bool:
    own: Any = _own_class(model)  # a run extends the forward of its model
    parameters = inspect.signature(own.forward).parameters
    if all(name in parameters for name in _PASSED):
        return True
    # A model of text ignores an argument that is None; one of several kinds of input may not.
    ignores = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return task != "FEATURE_EXTRACTION" and "input_ids" in parameters and ignores


def _names(table: Any) -> set[str]:
    """The names of the classes of one of transformers' tables; an entry is a name or several."""
    found = (names if isinstance(names, tuple | list) else (names,) for names in table.values())
    return {name for names in found for name in names}


def _own_class(model: nn.Module) -> type:
    """The class that the model had before dlora and `fully_shard` put theirs in front."""
    return next(
        original_class(cls)
        for cls in type(model).__mro__
        if not original_class(cls).__name__.startswith("FSDP")
    )
