"""Ollama's `Modelfile`: the base, the adapter, how a chat is written and where an answer ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODELFILE = "Modelfile"
# Ollama's templates are Go's. One of these is written where it says what the chat template says.
_TURNS = {
    "<|im_start|>{role}\n{content}<|im_end|>\n": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    ),
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>": (
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}"
        "<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
]


def modelfile(base: str, adapter: str | None, tokenizer: Any, ends: Iterable[int]) -> str:
    """The text of a `Modelfile`.

    Args:
        base: a `.gguf` file or a model directory.
        adapter: a `.gguf` file of an adapter; None: the base has it merged.
        tokenizer: with the chat template of the training; None: not known.
        ends: tokens that end an answer.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if tokenizer is None:
        return "\n".join(lines) + "\n"
    if (found := _template(tokenizer)) is not None:
        template, system = found
        lines.append(f'TEMPLATE """{template}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template has no known twin here: Ollama takes one by the file's.")
    for end in ends:
        text = tokenizer.convert_ids_to_tokens(end).replace('"', '\\"')
        lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, *what: Any) -> None:
    """Write `modelfile(*what)` into a directory."""
    (folder / MODELFILE).write_text(modelfile(*what), encoding="utf-8")


def _template(tokenizer: Any) -> tuple[str, str] | None:
    """Ollama's template for a tokenizer's own, and the system text of a chat that has none.

    None: no template here writes a chat as the tokenizer does.
    """
    if not tokenizer.chat_template:
        return None
    try:
        said, bare = (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in (_CHAT, _CHAT[1:])
        )
    except Exception:  # a template of another use: it raises what it likes
        return None
    for turn, template in _TURNS.items():
        head = turn.partition("{content}")[0].format(role="assistant")
        first, *turns = [turn.format(**message) for message in _CHAT]
        rest = "".join(turns) + head
        begin = said.removesuffix(first + rest)
        if begin not in ("", tokenizer.bos_token) or not bare.endswith(rest):
            continue
        opening = bare.removesuffix(rest).removeprefix(begin)
        before, after = turn.replace("{role}", "system").split("{content}")
        if opening and not (opening.startswith(before) and opening.endswith(after)):
            continue
        return template, opening.removeprefix(before).removesuffix(after)
    return None
