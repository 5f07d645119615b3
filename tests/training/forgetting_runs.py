"""Runs that measure what is forgotten, and what transformers says of their adapters."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from run_training import train
from stopped_runs import Crash, handlers_kept
from tiny import tokenizer, whole

from dlora.data import Dataset, load_examples
from dlora.training.forgetting import Forgetting

KEYS = ("forget_nll", "forget_base_nll", "forget_kl", "forget_agreement")


def retained(path: str) -> Dataset:
    """A file of chats as a run reads it."""
    return load_examples(
        path, key="forget.data", format="chat", tokenizer=tokenizer(), max_length=1024
    )


def measured(base: Any, tuned: Any, texts: Dataset) -> dict[str, float]:
    """The figures by their definitions, in float64, a text at a time."""
    nll, base_nll, kl, agreed, tokens = 0.0, 0.0, 0.0, 0, 0
    base, tuned = base.double(), tuned.double()
    for example in texts[:]:
        ids = torch.from_numpy(example.input_ids.astype("int64"))[None]
        labels = torch.from_numpy(example.labels.astype("int64"))[1:]
        at = (labels >= 0).nonzero()[:, 0]
        with torch.no_grad():
            p, q = (
                torch.distributions.Categorical(logits=model(ids).logits[0, :-1][at])
                for model in (base, tuned)
            )
        base_nll -= float(p.log_prob(labels[at]).sum())
        nll -= float(q.log_prob(labels[at]).sum())
        kl += float(torch.distributions.kl_divergence(p, q).sum())
        agreed += int((p.probs.argmax(-1) == q.probs.argmax(-1)).sum())
        tokens += len(at)
    return dict(
        zip(KEYS, (nll / tokens, base_nll / tokens, kl / tokens, agreed / tokens), strict=True)
    )


def of_adapter(base: Path | str, adapter: Path, texts: Dataset) -> dict[str, float]:
    """The figures of an adapter that a run has written, merged by PEFT."""
    tuned = peft.PeftModel.from_pretrained(whole(base).double(), str(adapter)).merge_and_unload()
    return measured(whole(base), tuned, texts)


def lost(argv: list[str], at: int, committed: bool = False) -> str:
    """A run that is lost in the evaluation of a step.

    Args:
        committed: after the step was committed from its snapshot, as where a peer is lost.
    """
    look = Forgetting.look

    def dies(self: Forgetting, step: int, *, last: bool = False) -> dict[str, Any]:
        if step != at:
            return look(self, step, last=last)
        if committed:
            self._checkpoints.commit(ending=True)
        raise Crash

    Forgetting.look = dies  # type: ignore[method-assign]
    try:
        with handlers_kept():
            train(argv)
    except Crash:
        return "lost"
    finally:
        Forgetting.look = look  # type: ignore[method-assign]
    return "finished"


def state_of(directory: Path, step: int) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    path = directory / "checkpoints" / f"step-{step:06d}" / "state.json"
    state: dict[str, Any] = json.loads(path.read_text())
    return state
