"""The tokenizer of a Hugging Face model as llama.cpp reads it from a GGUF file.

    byte-level BPE (GPT-2, Llama 3, Qwen)      tokenizer.ggml.model = gpt2, with merges and a word
                                               for how text is split (`tokenizer.ggml.pre`)
    BPE with byte fallback (Llama 2, Mistral)  tokenizer.ggml.model = llama, with scores

Source: conversion/base.py of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from dlora.errors import UsageError

_DIGITS = [{"type": "Digits", "individual_digits": True}]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before BPE: expressions in tokenizer.json → llama.cpp's word for it.
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_SPECIAL = ("bos", "eos", "unk", "pad")
_KIND = gguf.TokenType


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Add a tokenizer's metadata.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the model's embedding; the file names as many tokens.

    Raises:
        UsageError: llama.cpp has no such tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("--format: gguf needs a tokenizer.json beside the base")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UsageError(f"--format: gguf has no place for a {model['type']} tokenizer here")
    falls_back = bool(model.get("byte_fallback"))
    if not model["merges"]:
        raise UsageError("--format: gguf: llama.cpp reads no tokenizer without merges")
    words, kinds = _tokens(tokenizer, rows, falls_back)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("llama" if falls_back else "gpt2")
    writer.add_tokenizer_pre("default" if falls_back else _split(described))
    writer.add_token_list(words)
    if falls_back:
        writer.add_token_scores(_scores(words, merges))
    writer.add_token_types(kinds)
    if not falls_back:
        writer.add_token_merges(merges)
    for name in _SPECIAL:
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, rows: int, falls_back: bool) -> tuple[list[str], list[int]]:
    """The texts and kinds of all tokens, by id; rows without a token are unused."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    words, kinds = [], []
    for index in range(rows):
        kind = _KIND.NORMAL
        if (text := texts.get(index)) is None:
            text, kind = f"[PAD{index}]", _KIND.UNUSED
        elif index in added:
            kind = _KIND.CONTROL if added[index].special else _KIND.USER_DEFINED
        elif falls_back and text.startswith("<0x") and len(text) == 6:
            kind = _KIND.BYTE
        words.append(text)
        kinds.append(int(kind))
    return words, kinds


def _split(described: Mapping[str, Any]) -> str:
    """llama.cpp's word for how a byte-level tokenizer splits a text."""
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if steps else []
    *first, last = steps or [{}]
    if last.get("type") == "ByteLevel":
        splits = last.get("use_regex", True)
        if splits and not first:
            return "gpt-2"
        if splits and first == _DIGITS:
            return "smollm"
        if not splits and len(first) == 1 and first[0].get("type") == "Split":
            word = _SPLITS.get(first[0].get("pattern", {}).get("Regex", ""))
            if word:
                return word
    raise UsageError(
        "--format: gguf: llama.cpp's word for how this tokenizer splits a text is not known here; "
        "name a .gguf of the base with --base, or export with --merge and use llama.cpp's own "
        "convert_hf_to_gguf.py"
    )


def _scores(words: list[str], merges: list[str]) -> list[float]:
    """Scores that order merges as their ranks do: llama.cpp joins what has the highest first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(word, len(merges))) for word in words]
