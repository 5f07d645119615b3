"""`dlora teach --config FILE --to DIR`: what the teacher of a run finds likeliest, in files.

The teacher passes once over `data.train`, sharded as in the run; no adapter is trained. A run whose
`distill.teacher` is DIR then learns from it without the teacher, as often as it likes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dlora.config.load import Config
from dlora.data.encode import count_targets
from dlora.errors import UsageError
from dlora.io.files import path_of, sync
from dlora.objectives.distill import BASE, Distill, likeliest
from dlora.objectives.head_input import at_head
from dlora.objectives.output_head import output_head
from dlora.objectives.teachers import TopK
from dlora.plan.taught import About, Writer, write_manifest
from dlora.registry import option
from dlora.runtime.agreement import agree, broadcast, gather
from dlora.runtime.console import console
from dlora.runtime.determinism import deterministic
from dlora.runtime.exit_status import exit_with
from dlora.runtime.failure import reported
from dlora.runtime.ranks import Ranks
from dlora.sharding.engines.protocol import build_engine
from dlora.training.prepare import Preparation
from dlora.training.startup import enter, import_late_ones, prepared
from dlora.training.teacher import load_teacher


@dataclass(frozen=True)
class To:
    """Where to."""

    to: str = option("", "directory to write; new or empty (required)")


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    ranks, options = enter(argv, prog="dlora.teach", first=lambda: None, extra=To)
    if options is None:
        return 0
    config = options.config

    def target() -> tuple[Path, str]:
        if options.check:
            raise UsageError("--check is an option of dlora.train; dlora.teach trains nothing")
        _check(config)
        return _new(options.extra.to), options.extra.to

    directory = agree(ranks, "teach", target)
    config = replace(config, output=replace(config.output, resume="none"))
    import_late_ones(config)
    found = prepared(config, ranks, check=True)
    with reported(ranks), deterministic(config.train.deterministic):
        ranks.join(config.sharding.loading_timeout_seconds)
        write(found, ranks, directory)
    ranks.leave()
    return 0


def _check(config: Config) -> None:
    """Check what a run may have, and this command not."""
    objective = config.train.objective
    if objective != Distill.name:
        raise UsageError(f"train.objective: {objective} has no teacher; set distill")
    if config.adapters:
        raise UsageError("adapters: train.objective: distill trains one adapter at a time")
    if getattr(config, Distill.name).top_k is None:
        raise UsageError("distill.top_k: set how many tokens of each target are written")
    if config.data.streaming:
        raise UsageError("data.streaming: dlora teach writes of a data set in memory; set false")


def _new(to: str) -> Path:
    if not to:
        raise UsageError("--to: name the directory to write")
    target = path_of(to, "--to").resolve()
    if target.exists() and not target.is_dir():
        raise UsageError(f"--to: {to} is not a directory")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"--to: {to} is not empty; name a new or empty directory")
    return target


def write(found: Preparation, ranks: Ranks, target: Path) -> None:
    """Write what the teacher of a run finds likeliest. Collective.

    Raises:
        UsageError: the teacher is such a file itself, or has fewer tokens than are asked for.
    """
    teacher, section = found.teacher, getattr(found.config, Distill.name)
    assert teacher is not None and section.top_k is not None
    if teacher.taught is not None:
        raise UsageError(f"distill.teacher: {section.teacher} is a directory of dlora teach")
    engine = build_engine(found.placement, found.topology)
    model, replica = load_teacher(teacher, found.task, engine, ranks.device, found.base)
    vocabulary = output_head(model).vocabulary
    if section.top_k > vocabulary:
        raise UsageError(f"distill.top_k: {section.top_k}, but the teacher has {vocabulary} tokens")
    dataset: Any = found.train
    dealt = found.dealing(range(len(dataset)), dataset.lengths, ranks.world)[ranks.rank]
    with _beside(target, ranks) as directory:
        writer = Writer(directory, ranks.rank)
        for number, ids in enumerate(dealt, 1):
            batch = found.collate([dataset[i] for i in ids]).to(ranks.device)
            taken = _taken(model, batch, section)
            counts = [count_targets(dataset[i].labels) for i in ids]
            pieces = zip(taken.ids.split(counts), taken.log_p.split(counts), strict=True)
            for sequence, (tokens, log_p) in zip(ids, pieces, strict=bool(ids)):
                writer.add(sequence, tokens.int().cpu(), log_p.float().cpu())
            if number % max(1, len(dealt) // 10) == 0:
                console.info(f"taught {number} of {len(dealt)} micro-batches")
        writer.flush()
        replica.release()
        parts = {n: d for own in gather(ranks, "parts", writer.parts) for n, d in own.items()}
        if ranks.main:
            said = section.teacher if section.teacher != BASE else found.base.path
            about = About(
                section.temperature,
                section.top_k,
                vocabulary,
                dataset.fingerprint,
                len(dataset),
                f"{said} {section.teacher_adapter or ''}".strip(),
            )
            write_manifest(directory, about, parts)
    console.info(f"wrote {target}")


@torch.no_grad()
def _taken(model: torch.nn.Module, batch: Any, section: Any) -> TopK:
    """The likeliest tokens of a batch's targets."""
    made: list[TopK] = []

    def take(head: Any) -> torch.Tensor:
        made.append(likeliest(head, section.temperature, section.top_k))
        return head.hidden.new_zeros(())

    at_head(model, batch, take)
    return made[0]


@contextmanager
def _beside(target: Path, ranks: Ranks) -> Iterator[Path]:
    """A directory that all ranks write into, and that becomes `target` once all of it is there."""

    def make() -> tuple[str | None, str]:
        if not ranks.main:
            return None, ""
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            beside.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"--to: cannot write {target}: {error.strerror}") from error
        return str(beside), ""

    made = agree(ranks, "directory", make)
    directory = Path(broadcast(ranks, "directory/place", made))
    try:
        yield directory
        if ranks.main:
            sync(directory)
            os.replace(directory, target)
            sync(target.parent)
    finally:
        if ranks.main:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    exit_with(main)
