"""A model as lm-eval sees it: what `lm_eval.api.model.LM` asks for, answered by all ranks.

    log P(continuation | context)     Σ_t log softmax(z_t)[token], in float32
    rolling                           the same over windows that cover a text
    generate until                    greedy answers, up to a stop text

Every rank runs lm-eval as if it were alone, so that all ask for the same at the same time; the work
is dealt over them here, and each gets all results.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import StoppingCriteria

from dlora.errors import UsageError
from dlora.evaluation.answers import Stopping, answers_to, dealt
from dlora.evaluation.opened import OpenedModel
from dlora.objectives.own_length import depends_on_length, forget_lengths
from dlora.runtime.ranks import Ranks

LONGEST = 2048  # tokens, where neither the model nor its tokenizer has a limit
NEW_TOKENS = 256  # of an answer, where the task says nothing
Pair = tuple[list[int], list[int]]  # context, continuation
_SAMPLING = ("temperature", "top_p", "top_k")
_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", *_SAMPLING}


class DloraLM(TemplateLM):
    """A loaded model.

    Args:
        opened: its tokenizer and its limits.
        model: in eval mode.
        rows: sequences in a pass of a rank.
    """

    def __init__(self, opened: OpenedModel, model: Any, ranks: Ranks, rows: int) -> None:
        super().__init__()
        self.tokenizer = opened.tokenizer
        self.model, self._opened, self._ranks, self._rows = model, opened, ranks, rows
        self.max_length = self._limit()
        keeps = inspect.signature(type(model).forward).parameters
        self._selects = "logits_to_keep" in keeps

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else int(own)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            add_special_tokens = False
        own = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **own)
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.likelihoods([(context, rest) for _, context, rest in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows: list[Pair] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [utils.make_disjoint_window(window) for window in found]
            windows += own
            counts.append(len(own))
        values = iter(self.likelihoods(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        for (until, most), numbers in self._by_settings(requests).items():
            room = max(1, self.max_length - most)
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in numbers]
            made = answers_to(
                self.model,
                prompts,
                pad_id=self._opened.pad_id,
                stops=[self.eot_token_id],
                most=min(most, self.max_length - 1),
                rows=self._rows,
                ranks=self._ranks,
                stopping=_until(self.tokenizer, until),
            )
            for number, tokens in zip(numbers, made, strict=True):
                answers[number] = _cut(
                    self.tokenizer.decode(tokens, skip_special_tokens=True), until
                )
        return answers

    @torch.no_grad()
    def likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each (log P(continuation | context), whether it is what greedy decoding writes)."""
        rows = [(context + rest)[-(self.max_length + 1) :] for context, rest in pairs]
        alone = depends_on_length(self.model)
        batches = dealt([len(row) for row in rows], 1 if alone else self._rows)
        found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self._ranks.device)
        for turn in range(-(-len(batches) // self._ranks.world)):
            place = turn * self._ranks.world + self._ranks.rank
            numbers = batches[place] if place < len(batches) else []
            group = [(rows[i], len(pairs[i][1])) for i in numbers]
            for number, value in zip(numbers, self._pass(group), strict=True):
                found[number] = value
        if self._ranks.world > 1:
            dist.all_reduce(found)
        return [(value, bool(is_greedy)) for value, is_greedy in found.tolist()]

    def _pass(self, group: list[tuple[list[int], int]]) -> list[Tensor]:
        """(log P, whether greedy) of the last tokens of rows; of no rows, a pass all the same.

        Args:
            group: rows, each with the number of its last tokens that are asked for.
        """
        device, pad = self._ranks.device, self._opened.pad_id
        inputs = [row[:-1] for row, _ in group] or [[pad]]
        longest = max(map(len, inputs))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in inputs], device=device)
        mask = torch.tensor(
            [[1] * len(r) + [0] * (longest - len(r)) for r in inputs], device=device
        )
        first = min((len(row) - 1 - asked for row, asked in group), default=0)
        forget_lengths(self.model)
        kept = {"logits_to_keep": longest - first} if self._selects else {}
        logits = self.model(input_ids=ids, attention_mask=mask, **kept).logits
        offset = longest - logits.shape[1]
        results = []
        for z, (row, asked) in zip(logits, group, strict=False):
            stop = len(row) - 1 - offset
            log_p = torch.log_softmax(z[stop - asked : stop], -1, dtype=torch.float32)
            wanted = torch.tensor(row[-asked:], device=device)
            value = log_p.gather(1, wanted[:, None]).sum().double()
            results.append(torch.stack([value, (log_p.argmax(-1) == wanted).all().double()]))
        return results

    def _by_settings(self, requests: Any) -> dict[tuple[tuple[str, ...], int], list[int]]:
        """The numbers of the requests by stop texts and most tokens."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            settings = dict(request.args[1])
            samples = settings.get("do_sample") or (settings.get("temperature") or 0) > 0
            if unknown := sorted(settings.keys() - _KNOWN):
                raise UsageError(f"--tasks: generation_kwargs: {unknown[0]} is not honoured here")
            if samples:
                raise UsageError("--tasks: a task samples its answers, which are greedy here")
            until = settings.get("until") or []
            texts = (until,) if isinstance(until, str) else tuple(until)
            most = settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS
            groups.setdefault((texts, int(most)), []).append(number)
        return groups

    def _limit(self) -> int:
        """Tokens of the longest sequence."""
        config = self.model.config.get_text_config()
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        found = [getattr(config, name, None) for name in names]
        found.append(min(self.tokenizer.model_max_length, 10**9))
        limits = [limit for limit in found if isinstance(limit, int) and limit < 10**9]
        return limits[0] if limits else LONGEST


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of these."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def _until(tokenizer: Any, until: Sequence[str]) -> Stopping | None:
    """Criteria that end an answer at one of these texts."""
    if not any(until):
        return None
    return lambda prompt: [_Until(tokenizer, [stop for stop in until if stop], prompt)]


class _Until(StoppingCriteria):
    """Ends rows whose answer, behind `prompt` tokens, has one of some texts in it."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._until, self._prompt = tokenizer, until, prompt
        # A token is a byte at least, and some characters of its text are those of an earlier one.
        self._looks = max(len(stop.encode()) for stop in until) + 4

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        behind = input_ids[:, self._prompt :][:, -self._looks :]
        ended = list(self._ended(self._tokenizer.batch_decode(behind)))
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _ended(self, texts: Sequence[str]) -> Iterator[bool]:
        for text in texts:
            yield any(stop in text for stop in self._until)
