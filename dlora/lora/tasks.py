"""What a model is for, in PEFT's words (`task_type`), and the heads that are trained for it.

PEFT has one class of adapted model for each task, and of these three add a head to
`modules_to_save`, since a base has none of its own for the task: it was drawn at random.
"""

from __future__ import annotations

from torch import nn

TASKS = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)
AUTO = "auto"
# The heads by task, as in PEFT: a model has those that end with one of these names.
HEADS = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
_ENDINGS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def headed_task(model: nn.Module) -> str | None:
    """The task of `HEADS` that the model's class is named after, or None."""
    for base in type(model).__mro__:
        for ending, task in _ENDINGS.items():
            if base.__name__.endswith(ending):
                return task
    return None


def head_names(model: nn.Module, task: str | None) -> list[str]:
    """The names of `HEADS` that the model has a module for.

    Args:
        task: `AUTO`: that of the model's class.
    """
    names = HEADS.get((headed_task(model) if task == AUTO else task) or "", ())
    paths = [path for path, _ in model.named_modules()]
    return [name for name in names if any(path.endswith(name) for path in paths)]
