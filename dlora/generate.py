"""`python -m dlora.generate`: try an adapter, or a base, on a prompt.

The answer is printed to standard output as it is generated, and nothing else; messages are printed
to standard error.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from dlora.adapters.open_adapter import open_adapter
from dlora.adapters.source import AdapterSource
from dlora.base.model import DTYPES
from dlora.base.native import AUTO_DTYPE
from dlora.cli import answering, chosen_base, loaded, naming_base
from dlora.data.encode import text_prompt
from dlora.data.stops import stop_tokens
from dlora.errors import UsageError
from dlora.evaluation.inference import inference
from dlora.lora.tasks import HEADS
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    if not args.prompt:
        raise UsageError("--prompt: is empty")
    source = open_adapter(args.adapter) if args.adapter else None
    base, option = chosen_base(
        args.base,
        source,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        announce=report,
    )
    with naming_base(option):
        tokenizer, skeleton = base.tokenizer(), base.skeleton()
    ends, labels = answering(tokenizer, source), _labels(source)
    if labels or getattr(skeleton.config, "is_encoder_decoder", False):
        encoded = _plain(tokenizer, args.prompt, args.system)
    else:
        encoded = encode(tokenizer, args.prompt, args.system)
    if source is not None:
        source.attach_to(skeleton)  # an adapter that does not fit fails before weights are read
    with naming_base(option):
        model = loaded(base)
    if source is not None:
        source.attach_to(model)
        source.load_into(model)
    if labels:
        _classify(model, encoded, labels)
        return 0
    stops = stop_tokens(tokenizer, model.generation_config.eos_token_id, ends)
    _answer(model, tokenizer, encoded, stops, args.max_new_tokens, args.temperature)
    return 0


def report(line: str) -> None:
    """Print a message to standard error."""
    print(line, file=sys.stderr, flush=True)


def encode(tokenizer: Any, prompt: str, system: str | None) -> torch.Tensor:
    """Token ids [1, T] of the conversation up to the answer; without a template, of the text alone.

    Raises:
        UsageError: the prompt has no tokens, or the tokenizer's template takes no system prompt.
    """
    if not tokenizer.chat_template:
        if system is not None:
            raise UsageError("--system cannot act: the tokenizer has no chat template")
        ids = torch.tensor([text_prompt(tokenizer, prompt)])
    else:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises: many refuse a system prompt
            raise UsageError(
                f"the tokenizer's chat template refuses the prompt: {error}"
            ) from error
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise UsageError("--prompt: has no tokens")
    return ids


def _labels(source: AdapterSource | None) -> list[str]:
    """The labels that an adapter tells apart; none: it answers.

    Raises:
        UsageError: it does neither.
    """
    task = source.task if source else None
    if task not in HEADS:
        return []
    assert source is not None
    if task != "SEQ_CLS":
        raise UsageError(
            f"--adapter: {source.directory} is of task_type {task}; dlora.generate writes answers, "
            "or names the label of a text"
        )
    return source.labels


def _plain(tokenizer: Any, prompt: str, system: str | None) -> torch.Tensor:
    """Token ids [1, T] of a text with the tokenizer's own around it, as such models read it."""
    if system is not None:
        raise UsageError("--system cannot act: this model reads one text")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids


def _classify(model: Any, ids: torch.Tensor, labels: list[str]) -> None:
    """Print the likeliest label of a text, and its probability."""
    with inference(model):
        logits = model(input_ids=ids.to(next(model.parameters()).device)).logits[0]
    place = int(logits.argmax())
    print(f"{labels[place]} ({float(logits.float().softmax(-1)[place]):.3f})")


def _answer(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    stops: list[int],
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Print the answer up to a token of `stops`, word by word."""
    from transformers import TextStreamer

    class Answer(TextStreamer):
        """Prints no token that ends the answer, be it a special one or not."""

        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or int(value.view(-1)[-1]) not in stops:
                super().put(value)

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] >= limit:
        raise UsageError(f"--prompt: has {ids.shape[1]} tokens, but the base takes at most {limit}")
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        max_new_tokens = limit - ids.shape[1]
        report(f"the base takes at most {limit} tokens, so the answer has at most {max_new_tokens}")
    ids = ids.to(next(model.parameters()).device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with inference(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id or 0,
            streamer=Answer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **(sampling or {"do_sample": False}),
        )


def _at_least_one(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {word!r}")
    return int(word)


def _not_negative(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {word!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora.generate", "Answer a prompt with a base, or with a base and an adapter."
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer (required)")
    parser.add_argument(
        "--adapter", metavar="DIR", help="adapter directory or checkpoint (default: none)"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="hub id, directory or .gguf file (default: the one that the adapter records)",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="system prompt, for a chat template (default: none)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_at_least_one,
        default=128,
        metavar="N",
        help="most tokens of the answer (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.0,
        metavar="T",
        help="0: always the likeliest token; above 0: sampling (default: 0)",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, AUTO_DTYPE),
        default="bfloat16",
        help="dtype of the base; auto: bfloat16 where this machine multiplies in it natively, else "
        "float32 (default: bfloat16)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the base (default: no)",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
