"""Runs of several adapters through dlora's own pieces, inside the workers of `ranks.py`."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from run_training import figures, prepared_run, relative_error, same_bits
from stopped_runs import Crash, crash, handlers_kept
from torch import Tensor

from dlora.config.adapters import read
from dlora.config.options import Given
from dlora.hooks import Hooks
from dlora.lora.attach import adapter_tensors
from dlora.lora.names import by_name
from dlora.together.prepare import prepare_together
from dlora.together.run import TogetherRun


def train_together(
    argv: list[str], meddle: Callable[[TogetherRun], None] | None = None
) -> dict[str, Any]:
    """Run to the end; its status, and each adapter's tensors by the names they have alone."""
    run = prepared_run(argv, kind=TogetherRun, how=prepare_together)
    if meddle is not None:
        meddle(run)
    planned = run.joint.residents.plan
    status = run.train()
    run.checkpoints.close()
    tensors: dict[str, dict[str, Tensor]] = {}
    for member in run.members:
        with by_name(run.model, member.name):
            own = adapter_tensors(run.model)
            tensors[member.name] = {
                name.replace(f".adapters.{member.name}.", ".adapter."): tensor.detach().clone()
                for name, tensor in own.items()
            }
    wire = planned.traffic.gathers.rank + planned.traffic.reduction.rank
    return {
        "status": status,
        "start": run.start,
        "tensors": tensors,
        "planned_wire": round(wire),
    }


def followed(argv: list[str], dropped_after: int) -> dict[str, Any]:
    """What the hooks of a run are told; the adapter `late` is dropped after so many steps."""
    left: list[tuple[str, str, str]] = []
    saved: dict[int, dict[str, Any]] = {}

    def save(record: Any, _: Any) -> None:
        lines = record["adapters"].items()
        saved[record["step"]] = {name: line.get("eval_loss") for name, line in lines}

    hooks = Hooks(
        should_drop=lambda name: name == "late" and len(run.records) == dropped_after,
        saved=save,
        left=lambda *told: left.append(told),
    )
    run = prepared_run(argv, hooks, kind=TogetherRun, how=prepare_together)
    run.train()
    run.checkpoints.close()
    return {"left": left, "saved": saved}


def in_pass(number: int, act: Callable[[], None]) -> Callable[[TogetherRun], None]:
    """Meddles with a run: `act` before the passes of its step of this number."""

    def meddle(run: TogetherRun) -> None:
        made, before = itertools.count(1), run.passes

        def passes(*args: Any) -> Any:
            if next(made) == number:
                act()
            return before(*args)

        run.passes = passes  # type: ignore[method-assign]

    return meddle


def crashed_together(argv: list[str], steps: int, commits: bool = False) -> str:
    """A run that dies after so many steps of all adapters.

    Args:
        commits: the last whole step, as a rank that has lost its peers does.
    """
    runs: list[TogetherRun] = []

    def meddle(run: TogetherRun) -> None:
        runs.append(run)
        in_pass(steps + 1, crash)(run)

    try:
        train_together(argv, meddle)
    except Crash:
        return runs[0].checkpoints.commit_alone(ending=True) if commits else "crashed"
    return "finished"


def obstructed_together(argv: list[str], place: str) -> dict[str, Any]:
    """A run in whose second step a directory appears where a file is to be written."""
    return train_together(argv, in_pass(2, lambda: Path(place, "other").mkdir(parents=True)))


def terminated_together(argv: list[str], step: int) -> dict[str, Any]:
    """A run of which the last rank alone gets SIGTERM in this step."""
    last = dist.get_rank() == dist.get_world_size() - 1
    with handlers_kept():
        kill = in_pass(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train_together(argv, kill if last else None)


def short_together(argv: list[str]) -> dict[str, Any]:
    """A run in which rank 1 has too little memory for layers that stay gathered, from the first
    step on."""

    def meddle(run: TogetherRun) -> None:
        if dist.get_rank() == 1:
            run.joint.residents.limit = 1

    return train_together(argv, meddle)


def dropped_together(argv: list[str], name: str, step: int) -> dict[str, Any]:
    """A run whose rank 0 wants one adapter dropped in this step."""

    def meddle(run: TogetherRun) -> None:
        asked = itertools.count(1)

        def should_drop(other: str) -> bool:
            return other == name and dist.get_rank() == 0 and next(asked) == step

        run.hooks = dataclasses.replace(run.hooks, should_drop=should_drop)

    return train_together(argv, meddle)


def check_as_alone(results: list[Any], lines: list[dict[str, Any]], name: str, wanted: Any) -> None:
    """Invariant 3's bounds of the run alone, and the same bits on every rank."""
    tensors, wanted_lines = wanted
    for got, expected in zip(lines, wanted_lines, strict=True):
        close = ("loss", "grad_norm", "orth_loss", "eval_loss")
        for key in (key for key in close if key in expected):
            assert got[key] == pytest.approx(expected[key], rel=1e-5), key
        exact = ("step", "lr", "tokens", "all_tokens", "batch_hash", "budget", "kept_ranks")
        for key in (key for key in exact if key in expected):
            assert got[key] == expected[key], key
    for result in results:
        assert same_bits(result["tensors"][name], results[0]["tensors"][name])
    own = {n: t for n, t in results[0]["tensors"][name].items() if ".offset_" not in n}
    assert own.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert own[key].shape == tensor.shape, key
        assert not tensor.numel() or relative_error(own[key], tensor) < 1e-4, key


class Together:
    """`together("run", 2, members, **settings)`: several adapters in one run.

    Args:
        command: (directory, **settings) → the words of a command line.
    """

    def __init__(self, pools: Any, command: Callable[..., list[str]], root: Path) -> None:
        self.pools, self.command, self.root = pools, command, root

    def words(self, name: str, members: list[dict[str, Any]], **settings: Any) -> list[str]:
        return self.command(self.root / name, adapters=members, **settings)

    def __call__(
        self,
        name: str,
        world: int,
        members: list[dict[str, Any]],
        *,
        work: Callable[..., Any] = train_together,
        arguments: tuple[Any, ...] = (),
        per_node: int | None = None,
        **settings: Any,
    ) -> list[Any]:
        words = self.words(name, members, **settings)
        return self.pools(world).run(work, words, *arguments, ranks_per_node=per_node)

    def lines(self, name: str, member: str) -> list[dict[str, Any]]:
        """An adapter's metrics without what was measured."""
        return figures(self.root / name / "adapters" / member)


def words_alone(words: list[str], name: str, directory: Path) -> list[str]:
    """The command line of the run that trains one of the adapters alone, in a file of its own."""
    at = words.index("--adapters")
    [member] = [m for m in read(Given(words[at + 1], is_word=True)) if m.name == name]
    file = directory.parent / f"{directory.name}.yaml"
    values = [*words[:at], *words[at + 2 :]]
    sections: dict[str, dict[str, Any]] = {}
    for key, value in zip(values[::2], values[1::2], strict=True):
        section, _, option = key.removeprefix("--").partition(".")
        sections.setdefault(section, {})[option] = _plain(value)
    for key, value in member.values.items():
        section, _, option = key.partition(".")
        sections.setdefault(section, {})[option] = value
    sections["output"]["dir"] = str(directory)
    file.write_text(json.dumps(sections), encoding="utf-8")
    return ["--config", str(file)]


def _plain(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
