"""How often the host would wait for a GPU: never in a micro-batch, once in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Calls
from kill_trials import ADALORA
from ranks import Pools
from run_training import prepared_run
from torch.overrides import TorchFunctionMode

STEPS, MICRO_BATCHES = 6, 4
READS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter__use_dora": True},
    "adalora": ADALORA,
    "adalora quiet": ADALORA | {"output__log_every": 0},
    "divided": {"sharding__optimizer_state": "divided"},
}


class Syncs(Calls):
    """Counts what reads a value on the host, or needs one to know a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indexed = args[1] if name in ("aten::index", "aten::index_put_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indexed)
        unknown = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        if by_mask or name.removeprefix("aten::").rstrip("_2") in unknown:
            self.counted["syncs"] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what copies a tensor to the host without an operator that shows."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._syncs.counted["syncs"] += func in READS
        return func(*args, **(kwargs or {}))


def counted(argv: list[str]) -> tuple[list[int], list[int]]:
    """(those of each step, those of each step's passes)."""
    run, syncs = prepared_run(argv), Syncs()
    in_steps, in_passes = [0], list[int]()
    passes, snapshot = run.passes, run.checkpoints.snapshot

    def watched(step: int, batches: Any) -> Any:
        before = syncs["syncs"]
        result = passes(step, batches)
        in_passes.append(syncs["syncs"] - before)
        return result

    def ended(step: int, metrics: Any) -> None:
        in_steps.append(syncs["syncs"])
        snapshot(step, metrics)

    run.passes, run.checkpoints.snapshot = watched, ended  # type: ignore[method-assign]
    with syncs, Reads(syncs):
        assert run.train() == 0
    return [b - a for a, b in zip(in_steps, in_steps[1:], strict=False)], in_passes


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_from_the_device_once(
    pools: Pools, words: Any, tmp_path: Path, method: str
) -> None:
    argv = words(
        tmp_path / "run",
        adapter__lora_dropout=0.05,
        train__max_steps=STEPS,
        train__global_batch_size=2 * MICRO_BATCHES,
        train__micro_batch_size=1,
        output__save_every=0,
        **METHODS[method],
    )
    for steps, passes in pools(2).run(counted, argv):
        assert passes == [0] * STEPS
        quiet = steps[1:-1]  # the last one audits
        if method.startswith("adalora"):
            # At the mask the scores of all triplets are read, and γ·R in each step that logs.
            assert quiet[-2:] == ([1, 1] if "quiet" in method else [2, 2])
        else:
            assert quiet == [1] * len(quiet)
