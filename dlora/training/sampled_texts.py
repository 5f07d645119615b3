"""`forget.data: self`: texts that the base samples once, stored beside the run or in a cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlora.config.forget import SELF
from dlora.data import Dataset
from dlora.data.cache import content_of, stored
from dlora.data.encode import NO_TARGET
from dlora.data.report import Report
from dlora.data.stops import stop_tokens
from dlora.io.files import write_atomically
from dlora.lora.attach import disabled
from dlora.lora.init import INITS
from dlora.runtime.agreement import broadcast
from dlora.runtime.console import console
from dlora.tasks.sampling import sample
from dlora.training.context import RunContext
from dlora.training.evaluate import evaluating

_FORM = 1  # of the name
_ROWS = 32  # texts of a rank that are sampled together


def sampled_texts(context: RunContext) -> Dataset:
    """The texts: those of the file that has them, else sampled now, with the adapters off.

    Collective, and the same on every rank. They depend on the base, on `train.seed`, `forget.texts`
    and `forget.text_tokens`, and on nothing else of the run.
    """
    path = _path(context)
    found = stored(path) if context.ranks.main else None
    lengths = found and [len(text) for text in found[:]]
    lengths = broadcast(context.ranks, "forget/texts", lengths)
    if lengths is not None:
        texts = _shared(context, found, lengths)
        console.info(f"forget.data: {SELF}: sampled before; read from {path}")
        return dataset_of(texts)
    dataset = dataset_of(_sampled(context))
    if context.ranks.main:
        context.lock.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content_of(dataset))
    console.info(f"forget.data: {SELF}: the base has sampled {dataset.report.kept} texts: {path}")
    return dataset


def dataset_of(texts: list[list[int]]) -> Dataset:
    """Texts as sequences in which all tokens but the first are targets."""
    ids = np.concatenate([np.array(text, np.int32) for text in texts])
    starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    labels = ids.copy()
    labels[starts[:-1]] = NO_TARGET
    longest = max(map(len, texts))
    count, targets = len(texts), len(ids) - len(texts)
    report = Report(count, count, 0, 0, targets, longest, max_length=longest)
    return Dataset(ids, labels, starts, report)


def _path(context: RunContext) -> Path:
    config, lora = context.config, context.prepared.lora
    name: list[Any] = [
        *(_FORM, context.prepared.base_identity, config.model.path, config.model.revision),
        *(config.model.dtype, config.model.quantization, config.train.seed),
        *(config.forget.texts, config.forget.text_tokens, _first(context), _stops(context)),
    ]
    if config.model.quantization != "none" and INITS[lora.init_lora_weights].needs == "weight":
        name.append(asdict(lora))  # W0 is packed as the residual of these adapters
    digest = hashlib.sha256(json.dumps(name, default=str).encode()).hexdigest()[:32]
    cache = config.data.cache_dir
    place = context.directory if cache is None else Path(cache).expanduser()
    return place / f"self-{digest}.safetensors"


def _first(context: RunContext) -> int:
    """The token that texts begin with."""
    tokenizer = context.prepared.tokenizer
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, context.prepared.pad_id)
    return int(next(token for token in candidates if token is not None))


def _stops(context: RunContext) -> list[int]:
    """The tokens that end a text."""
    own = context.prepared.tokenizer
    settings = getattr(context.model, "generation_config", None)
    return stop_tokens(own, getattr(settings, "eos_token_id", None), ())


def _sampled(context: RunContext) -> list[list[int]]:
    """Each rank samples a part of them, in as many passes; every rank gets all."""
    section, ranks = context.config.forget, context.ranks
    numbers = list(range(section.texts))
    most = -(-section.texts // ranks.world)
    own = (numbers[ranks.rank :: ranks.world] + numbers)[:most]  # as many everywhere
    seed = context.config.train.seed
    how = {"first": _first(context), "tokens": section.text_tokens, "seed": seed}
    made = []
    with evaluating(context), disabled(context.model):
        for start in range(0, most, _ROWS):
            made.append(sample(context.model, own[start : start + _ROWS], **how))
    here = torch.cat(made).contiguous()
    everywhere = [torch.empty_like(here) for _ in range(ranks.world)]
    if ranks.world > 1:
        dist.all_gather(everywhere, here)
    else:
        everywhere = [here]
    stops = set(_stops(context))
    rows = [everywhere[n % ranks.world][n // ranks.world].tolist() for n in numbers]
    return [_until(row, stops) for row in rows]


def _until(row: list[int], stops: set[int]) -> list[int]:
    """A text up to the token that ends it, which belongs to it; the first one begins it."""
    end = next((i for i, token in enumerate(row) if i and token in stops), len(row) - 1)
    return row[: end + 1]


def _shared(context: RunContext, found: Dataset | None, lengths: list[int]) -> list[list[int]]:
    """The texts of rank 0, which alone has read them."""
    tokens = torch.empty(sum(lengths), dtype=torch.int64)
    if found is not None:
        tokens = torch.from_numpy(np.array(found.arrays[0], np.int64))
    tokens = tokens.to(context.ranks.device)
    if context.ranks.world > 1:
        dist.broadcast(tokens, src=0)
    return [part.tolist() for part in tokens.cpu().split(lengths)]
