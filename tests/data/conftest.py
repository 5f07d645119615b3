"""Tiny fast tokenizers, trained here: no network, no model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello there! How are you today? I am fine, thank you.",
    "Write the first sentence of the docstring of this Python definition.",
    "The quick brown fox jumps over the lazy dog. Return the number of items.",
    "[INST] What is the answer? [/INST] The answer is 42.\nUser: yes\nAssistant: no",
] * 4
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|end|>",
    "<|return|>",
]

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(trim_offsets: bool = False) -> Tokenizer:
    """Byte-level BPE like GPT-2's. Trimmed offsets leave out the blank in front of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """A BPE like Llama 2's: blanks become U+2581 and stick to the word behind them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(template, kind="byte_level", **special): a transformers tokenizer."""
    kinds = {
        "byte_level": byte_level(),
        "trimmed": byte_level(trim_offsets=True),
        "metaspace": metaspace(),
    }

    def make(template: str | None = CHATML, kind: str = "byte_level", **special: Any) -> Any:
        names = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "<unk>"} | special
        copy = Tokenizer.from_str(kinds[kind].to_str())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, **names)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """jsonl(record, ..., name="data.jsonl"): writes the records, gives the path."""

    def write(*records: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return str(path)

    return write
