"""Whether the run that resumes from a checkpoint is the run that wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from dlora.config.load import SCHEMA, Config, to_dict
from dlora.data import Sampler
from dlora.data.stream import StreamSampler
from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.optim.schedule import lr_factor
from dlora.registry.options import is_of
from dlora.training.find_checkpoint import ResumePoint

# Keys that may change between a run and its continuation: they do not alter the result.
FREE_KEYS = {
    "model.cache_dir",
    "adapter.path",  # the adapter's settings are compared, not its path
    "data.train",  # the files' content and their weights are compared, not their names
    "data.eval",
    "data.max_eval_samples",
    "data.cache_dir",
    "data.on_error",
    "data.packing",
    "train.max_steps",
    "train.epochs",
    "train.micro_batch_size",
    "train.tokens_per_micro_batch",
    "train.allow_unused",
    "train.compile",
    "train.compile_cache",
    "train.deterministic",
}
FREE_SECTIONS = {"sharding", "output", "forget"}
BOUND_KEYS = {"sharding.reduce_dtype"}  # of these sections: it rounds gradients
# Values that say the same: a class without `sdpa` refuses it; null stands for float32.
SAME = {
    "model.attn_implementation": ("auto", "sdpa"),
    "sharding.reduce_dtype": (None, "float32"),
}
# Settings of an adapter that come from elsewhere in the configuration.
SAID_AS = {"total_step": "train.max_steps or train.epochs (the method's schedule spans all steps)"}


def check_resume(
    resumed: ResumePoint,
    config: Config,
    lora: LoraConfig,
    tensors: Mapping[str, Tensor],
    sampler: Sampler | StreamSampler,
    fingerprint: str,
    base: str | None,
    announce: Callable[[str], None],
) -> None:
    """Check that resuming from `resumed` continues the run that saved it.

    Args:
        lora: what this run attaches, and `tensors` what its adapters then have.
        fingerprint: of the training data.
        base: identity of the base, where it is known.
        announce: gets a line where the user has changed what may change, and it changes the result.

    Raises:
        UsageError: settings, data, names or shapes differ, or the run ends before that step.
    """
    conflicts = "; ".join(_conflicts(resumed, config, lora, fingerprint, base))
    if config.output.resume_force:
        if conflicts:
            announce(f"output.resume_force: resumes {resumed.directory} although {conflicts}")
    else:
        if conflicts:
            raise UsageError(
                f"output.resume: {resumed.directory} belongs to another run: {conflicts} "
                "(output.resume: none starts afresh, output.resume_force: true resumes anyway)"
            )
        wanted = sampler.sequences(resumed.step)
        seen = resumed.state["data"].get("sequences", wanted)
        if resumed.step < sampler.total_steps and seen != wanted:
            raise UsageError(
                f"train.epochs: step {resumed.step} of {resumed.directory} was the smaller last "
                "step of its run; steps after it would skip sequences (output.resume: none starts "
                "afresh, output.resume_force: true resumes anyway)"
            )
    _check_fits(resumed.shapes, tensors)
    if resumed.step > sampler.total_steps:
        raise UsageError(
            f"train.{config.train.governed_by}: {resumed.directory} is at step {resumed.step} "
            f"already, past the run's {sampler.total_steps}"
        )
    if line := _changed_rate(resumed, config, sampler.total_steps):
        announce(line)


def _check_fits(saved: Mapping[str, list[int]], named: Mapping[str, Tensor]) -> None:
    """Raise a `UsageError` if names or shapes differ from the adapters that this run has.

    Args:
        saved: {name: shape} of a checkpoint's tensors.
    """
    live = {name: list(p.shape) for name, p in named.items()}
    for name in sorted(saved.keys() | live.keys()):
        if saved.get(name) != live.get(name):
            raise UsageError(
                f"output.resume: the checkpoint has {name} {saved.get(name, 'missing')}, this run "
                f"{live.get(name, 'missing')}; the adapter's settings differ"
            )


def _conflicts(
    resumed: ResumePoint, config: Config, lora: LoraConfig, fingerprint: str, base: str | None
) -> Iterator[str]:
    """What of settings, base and data differs from the saved run."""
    compared = set(FREE_KEYS)
    if base and (before := resumed.state.get("base")):
        compared |= {"model.path", "model.revision"}  # what they name is known
        if before != base:
            yield f"model.path: {config.model.path} is another base"
    if resumed.lora is not None:
        whose = "{} of the adapter" if config.adapter.path else "adapter.{}"
        before, now = asdict(resumed.lora), asdict(lora)
        compared |= {f"adapter.{name}" for name in {*before, *now}}
        # As JSON, so that a tuple equals a list and the order of patterns counts.
        ignored = {"r"} if "init_r" in now else set()
        for name in (name for name in now if name in before and name not in ignored):
            if json.dumps(before[name]) != json.dumps(now[name]):
                key = SAID_AS.get(name, whose.format(name))
                yield f"{key} was {before[name]!r} and is {now[name]!r}"
    for section, options in to_dict(config).items():
        for name, value in options.items():
            key = f"{section}.{name}"
            if section in FREE_SECTIONS and key not in BOUND_KEYS:
                continue
            # An option that the checkpoint lacks is newer than it.
            saved = resumed.settings.get(section, {}).get(name, SCHEMA[key].default)
            same = saved == value or all(said in SAME.get(key, ()) for said in (saved, value))
            if key not in compared and not same:
                yield f"{key} was {_short(saved)} and is {_short(value)}"
    if resumed.state["data"]["fingerprint"] != fingerprint:
        yield "data.train contains other sequences"


def _short(value: Any) -> str:
    """A value for a message; a chat template may be pages long."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _changed_rate(resumed: ResumePoint, config: Config, total: int) -> str:
    """A line about the learning rate, where its schedule is not the one that the run began with.

    A schedule spans all steps, so that more or fewer of them change the rate of those that are
    left: a finished cosine run that is made longer jumps from almost 0 to a high rate.
    """
    done, before = resumed.step, resumed.state.get("total_steps")
    if not isinstance(before, int) or not 0 < done < total:
        return ""
    names = ("lr", "schedule", "warmup_ratio")
    now = {name: getattr(config.optimizer, name) for name in names}
    section = resumed.settings.get("optimizer", {})
    saved = {n: v if is_of(v := section.get(n), type(now[n])) else now[n] for n in names}

    def rate(of: Mapping[str, Any], steps: int, step: int) -> float:
        return float(of["lr"] * lr_factor(of["schedule"], step, steps, of["warmup_ratio"]))

    steps = (done, done + 1, min(before, total))
    if all(rate(saved, before, step) == rate(now, total, step) for step in steps):
        return ""
    changes = [f"optimizer.{n} was {saved[n]} and is {now[n]}" for n in names if saved[n] != now[n]]
    if before != total:
        changes.insert(0, f"the schedule spanned {before} steps and spans {total}")
    unchanged = "its end" if done >= before else f"{rate(saved, before, done):.3g}"
    return (
        f"optimizer.schedule: lr was {rate(saved, before, done - 1):.3g} at step {done}, and is "
        f"{rate(now, total, done):.3g} at step {done + 1}, where the run that saved had "
        f"{unchanged}: {'; '.join(changes)}"
    )
