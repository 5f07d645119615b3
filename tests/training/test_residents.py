"""Layers that stay gathered give way when memory is short: on all ranks; no number changes."""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from plan_table import check_plan_was_kept
from ranks import Pool
from run_training import Runs, command_line, prepared_run, train
from sampling import full
from tiny import VOCABULARY, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dlora.config.load import parse
from dlora.metrics.log import read_metrics
from dlora.plan.report import lines_of
from dlora.sharding.topology import Topology
from dlora.training.prepare import prepare


def short_on_rank_1(run: Any) -> None:
    """From the first step on, rank 1 has too little memory for what it takes."""
    if run.ranks.rank == 1:
        run.context.residents.limit = 1


def short(argv: list[str]) -> tuple[dict[str, Any], str, int]:
    """A run with too little memory on rank 1, what it printed, and the layers left in its plan."""
    printed, runs = io.StringIO(), list[Any]()

    def meddle(run: Any) -> None:
        short_on_rank_1(run)
        runs.append(run)

    with contextlib.redirect_stdout(printed):
        result = train(argv, meddle)
    return result, printed.getvalue(), len(runs[0].context.residents.plan.resident)


@pytest.mark.parametrize("engine", ["fsdp2", full("zero3")])
def test_layers_give_way_on_all_ranks_and_no_number_changes(run: Runs, engine: str) -> None:
    world = {"sharding__base": "world", "sharding__engine": engine, "train__max_steps": 6}
    _, bare = run("bare", 2, **world)
    results, held = run("held", 2, work=short, **world, sharding__memory_budget_gb=4)
    assert [line["loss"] for line in held] == [line["loss"] for line in bare]
    sent = [line["wire_bytes"] for line in held]
    assert sent[1] < sent[-1] == bare[-1]["wire_bytes"]
    assert [left for _, _, left in results] == [0, 0]
    assert "resident: memory is short on 1 rank(s): " in results[0][1]


SHORT, LONG, STEPS = 8, 96, 4


def save_deep(directory: Path) -> str:
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, **heads, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def told(argv: list[str], free: int) -> tuple[str, list[str]]:
    """What a run prints where each rank finds so much memory free, and its resident layers."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch("dlora.training.startup.free_bytes", lambda device, ranks: free),
    ):
        run = prepared_run(argv)
        print("\n".join(lines_of(run.prepared.decision, is_open=True)))
        run.train()
    return printed.getvalue(), list(run.prepared.budget.resident)


def test_auto_stays_within_its_memory_when_the_longest_batch_comes_last(tmp_path: Path) -> None:
    """Short sequences, and in the last step one long one for each rank."""
    text = tmp_path / "text.jsonl"
    lines = [SHORT] * (4 * (STEPS - 1)) + [LONG] * 2 + [SHORT] * 2
    text.write_text("".join('{"text": "' + "y" * length + '"}\n' for length in lines))
    argv = command_line(
        output__dir=str(tmp_path / "run"),
        model__path=save_deep(tmp_path / "model"),
        data__train=str(text),
        data__format="text",
        data__shuffle=False,
        train__max_steps=STEPS,
        train__global_batch_size=4,
        train__micro_batch_size=1,
    )
    config = parse(argv, prog="dlora.train").config
    whole = prepare(config, Topology(0, 2, 2), print).budget
    assert whole.placement.base == "none"
    most = whole.memory.peak - 10**6  # of what may be used: too little for all of W0
    pool = Pool(2, tmp_path / "ranks", fresh=True)
    results = pool.run(told, argv, int(most / 0.95), limit=500)
    pool.close()
    (printed, resident), (_, other) = results
    print(printed)
    assert "chosen          base: world" in printed
    assert resident == other and 0 < len(resident) < 24
    assert f"resident        {len(resident)} layers, " in printed
    assert "memory is short" not in printed  # the plan has known of the long one
    check_plan_was_kept(printed)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    peaks = [record["peak_memory_bytes"] for record in records]
    assert peaks[-1] > 1.1 * peaks[0]
    assert max(peaks) <= most
