"""Records of every format as strangers write them: right ones, and some with something odd."""

import json
import random
from typing import Any

TEXTS = [
    "Hello",
    "",
    " ",
    "I am fine.\n",
    "<|im_end|>",
    "é 😀",
    "[INST]",
    "{{ x }}",
    "\ud800",
    "42",
]
ODD: list[Any] = [None, 0, 1, -1.5, True, False, [], {}, [[]], [None], {"a": {"b": []}}, "x", "{"]
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "human", "gpt", "bot"]
SHAREGPT = ["system", "human", "gpt", "observation", "function_call", "model", "tool", "fox"]
MARKS = ["train", "loss", "loss_mask", "trainable", "masked", "weight", "mask"]
TURN_FIELDS = [*MARKS, "thinking", "reasoning", "reasoning_content", "tool_calls", "function_call"]
TURN_FIELDS += ["name", "id", "role", "content", "from", "value", "tool_call_id"]
FIELDS = [*MARKS, "tools", "documents", "system", "history", "chat_template_kwargs", "functions"]
FIELDS += ["messages", "bos_token", "add_generation_prompt", "input", "text", "prompt", "range"]


def records(format: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` records for a format, the same for a seed; each has a field that nothing reads."""
    draw = random.Random(f"{format} {seed}")
    return [_record(format, draw) | {"nothing reads this": i} for i in range(count)]


def _record(format: str, draw: random.Random) -> dict[str, Any]:
    if format == "alpaca":
        record = {"instruction": _text(draw), "input": _text(draw), "output": _text(draw)}
    elif format == "labelled":
        record = {"text": _text(draw), "label": draw.choice([_text(draw), draw.randint(0, 9), 0.5])}
    elif format == "text":
        record = {"text": "<s>" * draw.randint(0, 1) + _text(draw)}
    elif format == "preference":
        chats = draw.random() < 0.5
        answers = [_chat("chat", 1, draw) if chats else _text(draw) for _ in range(2)]
        record = {"prompt": _chat("chat", 0, draw) if chats else _text(draw)}
        record |= dict(zip(("chosen", "rejected"), answers, strict=True))
    else:
        field = {"chat": "messages", "sharegpt": "conversations"}[format]
        record = {field: [_turn(format, i, draw) for i in range(draw.randint(0, 5))]}
    for name in draw.sample(FIELDS, draw.choice([0, 0, 0, 1, 2])):
        record[name] = _value(draw)
    if draw.random() < 0.05:
        record.pop(draw.choice(list(record)))
    return record


def _chat(format: str, i: int, draw: random.Random) -> list[Any]:
    """A conversation of one turn."""
    return [_turn(format, i, draw)]


def _turn(format: str, i: int, draw: random.Random) -> Any:
    if draw.random() < 0.01:
        return draw.choice(ODD)
    usual = {"chat": ["user", "assistant"], "sharegpt": ["human", "gpt"]}[format][i % 2]
    role = usual if draw.random() < 0.95 else draw.choice(ROLES if format == "chat" else SHAREGPT)
    names = {"chat": ("role", "content"), "sharegpt": ("from", "value")}[format]
    turn = dict(zip(names, (role, _text(draw)), strict=True))
    if role == "function_call" or draw.random() < 0.02:
        turn[names[1]] = json.dumps(_call(draw))
    if draw.random() < 0.05:
        turn[names[1]] = [_part(draw) for _ in range(draw.randint(0, 3))]
    for name in draw.sample(TURN_FIELDS, draw.choice([0] * 9 + [1, 2])):
        turn[name] = _value(draw)
    return turn


def _value(draw: random.Random) -> Any:
    made = [lambda: draw.choice(ODD), lambda: _text(draw), lambda: [_call(draw)]]
    return draw.choice(made)()


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(TEXTS, [9, 0.5, 0.5, 9, 1, 3, 2, 2, 0.1, 9], k=draw.randint(1, 3)))


def _part(draw: random.Random) -> Any:
    kinds = ["text", "text", "text", "thinking", "image", None]
    return {"type": draw.choice(kinds), draw.choice(["text", "thinking"]): _text(draw)}


def _call(draw: random.Random) -> Any:
    arguments = draw.choice([{"city": _text(draw)}, json.dumps({"a": 1}), "{", None, [], 3])
    call = {"name": draw.choice(["weather", "", 5]), "arguments": arguments}
    return draw.choice([call, {"type": "function", "function": call}, {"function": "f"}, call])
