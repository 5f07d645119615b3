"""Which answers are trained on: the spellings of it that data sets have.

"train": false   "loss": false   "loss_mask": 0   "trainable": false   "weight": 0   not trained
"masked": true   "mask": true                                                        on
"""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.record import Conversation, Fields, RecordError, kind_of

# As in axolotl, OpenAI's and Mistral's files, ms-swift, torchtune, XTuner and Megatron.
_TRAINED = (
    "train",
    "training",
    "trainable",
    "train_on",
    "learn",
    "learnable",
    "loss",
    "loss_mask",
    "loss_scale",
    "loss_weight",
    "weight",
    "compute_loss",
)
_MASKED = ("masked", "mask", "is_masked", "mask_loss", "ignore_loss", "no_loss")
MARKS = {**dict.fromkeys(_TRAINED, True), **dict.fromkeys(_MASKED, False)}
# Parts of an answer that are trained on or not: only whole answers are.
_DETAILS = ("train_detail", "training_detail")
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def take_mark(turn: dict[str, Any], where: str) -> bool | None:
    """Take the mark out of a message: whether to train on it; None where it has none.

    Raises:
        RecordError: a value is neither yes nor no, or two marks differ.
    """
    for name in _DETAILS:
        if turn.pop(name, None) is not None:
            raise RecordError(f"{where} has {name!r}, which is not supported; expected 'train'")
    found = {name: turn.pop(name) for name in [n for n in turn if n in MARKS]}
    read = {n: _meaning(n, v, where) for n, v in found.items() if v is not None}
    if len(set(read.values())) > 1:
        shown = " and ".join(f"{name!r}: {found[name]!r}" for name in read)
        raise RecordError(f"{where} has {shown}, of which one says train and one does not")
    return next(iter(read.values()), None)


def mark_record(record: Fields, conversation: Conversation) -> None:
    """Apply the marks of a whole record: yes or no, one for each message, or roles to leave out.

    A value of any other kind means something else, and is left unread.

    Raises:
        RecordError: as `mark`; or a list has another length than the messages.
    """
    for name in [n for n in record if n in MARKS]:
        value = record.peek(name)
        if isinstance(value, list):
            values = record[name]
            if len(values) != len(conversation):
                raise RecordError(
                    f"{name!r} has {len(values)} values for {len(conversation)} messages; expected "
                    "one for each"
                )
            for i, (turn, each) in enumerate(zip(conversation, values, strict=True)):
                if each is not None:
                    mark(turn, _meaning(name, each, f"{name}[{i}]"), f"{name}[{i}]")
        elif (
            name == "mask" and isinstance(value, str) and not is_yes_or_no(value)
        ):  # NeMo: who is not trained on
            roles = {_ROLES.get(r.strip().lower(), "") for r in record[name].split(",")}
            for turn in conversation:
                if turn["role"] in roles and turn["role"] == "assistant":
                    mark(turn, False, repr(name))
        elif is_yes_or_no(value) and not _meaning(name, record[name], "the record"):
            for turn in conversation:
                if turn["role"] == "assistant":
                    mark(turn, False, repr(name))


_ROLES = {"assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def mark(turn: dict[str, Any], trained: bool | None, where: str) -> None:
    """Mark a message.

    Raises:
        RecordError: it is to be trained on and is no answer, or its own mark says otherwise.
    """
    if trained is None:
        return
    if turn["role"] != "assistant":
        if trained:
            raise RecordError(
                f"{where} asks to train on a message of role {turn['role']!r}; only answers are "
                "trained on"
            )
        return
    if turn.get("train", trained) is not trained:
        raise RecordError(f"{where} contradicts the mark of the message itself")
    turn["train"] = trained


def refused_whole(record: Fields) -> str | None:
    """The mark by which a record of plain text is not to be trained on."""
    for name in [n for n in record if n in MARKS]:
        value = record.peek(name)
        if is_yes_or_no(value) and not _meaning(name, record[name], "the record"):
            return name
    return None


def is_yes_or_no(value: Any) -> bool:
    """A boolean, 0, 1 or such a word, but no float: a `loss` of 0.0 may be a measurement."""
    if isinstance(value, str):
        return value.strip().lower() in _WORDS
    return isinstance(value, bool) or type(value) is int and value in (0, 1)


def _meaning(name: str, value: Any, where: str) -> bool:
    said: Any = value
    if isinstance(value, str):
        said = _WORDS.get(value.strip().lower(), value)
    if isinstance(said, bool | int | float) and said in (0, 1):
        return bool(said) is MARKS[name]
    shown = value if isinstance(value, str | int | float) else kind_of(value)
    raise RecordError(
        f"{where} has {name!r}: {shown!r}; expected true or false, 1 or 0: an answer counts whole "
        "or not at all"
    )


def trained(conversation: Conversation) -> list[Mapping[str, Any]]:
    """The answers that are trained on."""
    return [t for t in conversation if t["role"] == "assistant" and t.get("train") is not False]
