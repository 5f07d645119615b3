"""Whether the run that resumes from a checkpoint is the run that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from dlora.config.load import SCHEMA, Config, to_dict
from dlora.data import Sampler
from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.training.find_checkpoint import ResumePoint

# Keys that may change between a run and its continuation: they do not alter the result.
FREE_KEYS = {
    "model.cache_dir",
    "adapter.path",  # the adapter's settings are compared, not its path
    "data.train",  # the files' content is compared, not their names
    "data.eval",
    "data.max_eval_samples",
    "data.cache_dir",
    "data.on_error",
    "train.max_steps",
    "train.epochs",
    "train.micro_batch_size",
    "train.allow_unused",
    "train.deterministic",
}
FREE_SECTIONS = {"sharding", "output"}
# Settings of an adapter that come from elsewhere in the configuration.
SAID_AS = {"total_step": "train.max_steps or train.epochs (the method's schedule spans all steps)"}


def check_resume(
    resumed: ResumePoint,
    config: Config,
    lora: LoraConfig,
    tensors: Mapping[str, Tensor],
    sampler: Sampler,
    fingerprint: str,
    base: str | None,
) -> None:
    """Check that resuming from `resumed` continues the run that saved it.

    Args:
        lora: what this run attaches, and `tensors` what its adapters then have.
        fingerprint: of the training data.
        base: identity of the base, where it is known.

    Raises:
        UsageError: settings, data, names or shapes differ, or the run ends before that step.
    """
    if not config.output.resume_force:
        _refuse_conflicts(resumed, config, lora, fingerprint, base)
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


def _refuse_conflicts(
    resumed: ResumePoint, config: Config, lora: LoraConfig, fingerprint: str, base: str | None
) -> None:
    """Raise a `UsageError` if settings, base or data differ from those of the saved run."""
    conflicts, compared = [], set(FREE_KEYS)
    if base and (before := resumed.state.get("base")):
        compared |= {"model.path", "model.revision"}  # what they name is known
        if before != base:
            conflicts.append(f"model.path: {config.model.path} is another base")
    if resumed.lora is not None:
        whose = "{} of the adapter" if config.adapter.path else "adapter.{}"
        before, now = asdict(resumed.lora), asdict(lora)
        compared |= {f"adapter.{name}" for name in {*before, *now}}
        # As JSON, so that a tuple equals a list and the order of patterns counts.
        ignored = {"r"} if "init_r" in now else set()
        for name in (name for name in now if name in before and name not in ignored):
            if json.dumps(before[name]) != json.dumps(now[name]):
                key = SAID_AS.get(name, whose.format(name))
                conflicts.append(f"{key} was {before[name]!r} and is {now[name]!r}")
    for section, options in to_dict(config).items():
        for name, value in options.items() if section not in FREE_SECTIONS else ():
            key = f"{section}.{name}"
            # An option that the checkpoint lacks is newer than it.
            saved = resumed.settings.get(section, {}).get(name, SCHEMA[key].default)
            if key not in compared and saved != value:
                conflicts.append(f"{key} was {saved!r} and is {value!r}")
    if resumed.state["data"]["fingerprint"] != fingerprint:
        conflicts.append("data.train contains other sequences")
    if conflicts:
        raise UsageError(
            f"output.resume: {resumed.directory} belongs to another run: {'; '.join(conflicts)} "
            "(output.resume: none starts afresh, output.resume_force: true resumes anyway)"
        )
