"""The choice of `base: auto`, residency within a budget, and what the command refuses."""

import json
import subprocess
import sys
from typing import Any

import pytest
from llama_shapes import saved_config, subject
from refusals import refusal

from dlora.config.load import parse
from dlora.config.recompute import Recompute
from dlora.plan.choose import Capacity, decide
from dlora.plan.command import Machines, main, survey
from dlora.plan.plan import Plan
from dlora.sharding.topology import Topology

GB = 10**9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_config("small", tmp_path_factory.mktemp("model"))


def words_for(path: str, *words: str) -> list[str]:
    return ["--model.path", path, "--data.train", "x.jsonl", "--output.dir", "unwritten", *words]


def surveyed(path: str, machines: Machines, **settings: Any) -> Any:
    words = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
    if "sharding__activation_checkpointing" not in settings:
        words = ["--sharding.activation_checkpointing=true", *words]
    words = words_for(path, *words)
    return survey(parse(words, prog="dlora.plan").config, machines)


def test_the_cheapest_that_fits_is_taken(path: str) -> None:
    """As memory shrinks W0 moves from every rank to every node to all nodes."""
    wide = surveyed(path, Machines(nodes=4, gpus_per_node=4, gpu_memory_gb=1000))
    peaks = {c.base: c.plan.memory.peak for c in wide.decision.candidates if not c.plan.divided}
    assert peaks["none"] > peaks["node"] > peaks["world"]
    taken = []
    for memory in (peaks["none"], peaks["none"] - 1, peaks["node"] - 1):
        machines = Machines(nodes=4, gpus_per_node=4, gpu_memory_gb=memory / GB)
        found = surveyed(path, machines)
        assert found.decision.plan.memory.peak <= memory
        assert found.decision.reason
        taken.append((found.decision.plan.placement.base, found.decision.plan.divided))
    assert taken == [("none", False), ("node", False), ("world", False)]


def test_the_optimizer_state_is_divided_only_where_nothing_fits_otherwise(path: str) -> None:
    wide = surveyed(path, Machines(nodes=1, gpus_per_node=8, gpu_memory_gb=1000), adapter__r=256)
    least = min(c.plan.memory.peak for c in wide.decision.candidates if not c.plan.divided)
    for memory, divided in ((least, False), (least - 1, True)):
        machines = Machines(nodes=1, gpus_per_node=8, gpu_memory_gb=memory / GB)
        found = surveyed(path, machines, adapter__r=256)
        assert found.decision.plan.divided is divided
        assert found.decision.plan.memory.peak <= memory


def test_activations_are_recomputed_only_where_nothing_fits_otherwise(path: str) -> None:
    """As memory shrinks: none, then more and more blocks, then their inputs go to the host."""
    settings: dict[str, Any] = {"sharding__base": "world", "train__micro_batch_size": 4}
    settings["data__max_length"] = 512
    machines, peaks = Machines(nodes=1, gpus_per_node=2, gpu_memory_gb=10_000), {}
    for way in ("false", "{every: 8}", "{every: 4}", "{every: 2}", "true", "{offload: true}"):
        found = surveyed(path, machines, sharding__activation_checkpointing=way, **settings)
        peaks[way] = found.decision.plan.memory.peak
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    taken = []
    for peak in peaks.values():
        least = Machines(nodes=1, gpus_per_node=2, gpu_memory_gb=peak / GB)
        found = surveyed(path, least, sharding__activation_checkpointing="auto", **settings)
        assert found.decision.plan.memory.peak <= peak
        taken.append(found.decision.plan.workload.checkpointing)
    assert taken == [*map(Recompute, (0, 8, 4, 2, 1)), Recompute(1, offload=True)]


def test_a_packed_base_fits_where_a_plain_one_does_not(path: str) -> None:
    """And the sizes that are told are those of the model, not of its packed bytes."""
    wide = Machines(nodes=1, gpus_per_node=2, gpu_memory_gb=1000)
    plain, packed = (surveyed(path, wide, model__quantization=q) for q in ("none", "nf4"))
    assert packed.model.startswith(f"{plain.model}; nf4: 56 linear layers are packed, ")
    need = packed.decision.plan.memory.peak
    machines = Machines(nodes=1, gpus_per_node=2, gpu_memory_gb=need / GB)
    bases = [
        surveyed(path, machines, model__quantization=q).decision.plan.placement.base
        for q in ("none", "nf4")
    ]
    assert bases == ["world", "none"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_residency_grows_with_the_budget_and_stays_inside(path: str, engine: str) -> None:
    machines = Machines(nodes=1, gpus_per_node=8, gpu_memory_gb=1000)
    settings = {"sharding__engine": engine, "sharding__base": "world"}
    bare = surveyed(path, machines, **settings).decision.plan
    least, whole = bare.memory.peak, bare.memory.peak + bare.base_total
    shares, sent = [], []
    for part in (0, 0.5, 1.1):
        budget = least + part * (whole - least)
        plan = surveyed(
            path, machines, **settings, sharding__memory_budget_gb=budget / GB
        ).decision.plan
        assert plan.memory.peak <= budget
        shares.append(plan.memory.resident)
        sent.append(plan.gathers)
    assert shares == sorted(shares) and shares[0] < shares[1]
    # What is kept for the step is there anyway: to hold it costs no memory.
    assert shares[0] <= bare.memory.base_gathered
    assert sent == sorted(sent, reverse=True) and sent[-1] == 0


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_auto_keeps_layers_gathered_within_its_margin(engine: str) -> None:
    """Without a budget: what `world` leaves free up to nine tenths, and never more."""

    def taken(memory: float, base: str = "auto") -> Plan:
        capacity = Capacity(round(memory), "a test")
        settings = {"engine": engine, "base": base, "optimizer_state": "replicated"}
        return decide(subject("small"), Topology(0, 8, 8), capacity=capacity, **settings).plan

    bare, whole = (taken(1000 * GB, base) for base in ("world", "none"))
    assert not bare.resident
    least = bare.memory.peak
    assert taken(least).gathers == bare.gathers
    found = taken(memory := 0.5 * (least + whole.memory.peak))
    assert found.placement.base == "world" and found.resident
    assert found.memory.peak <= 0.9 * memory
    assert found.spared == bare.gathers - found.gathers > 0


def test_a_budget_below_the_least_is_refused_with_the_least(path: str) -> None:
    machines = Machines(nodes=1, gpus_per_node=8, gpu_memory_gb=80)
    message = refusal(surveyed, path, machines, sharding__memory_budget_gb=0.5)
    assert "sharding.memory_budget_gb: " in message
    [needed] = [float(word) for word in message.replace(",", "").split() if _is_number(word)][-1:]
    fits = surveyed(path, machines, sharding__memory_budget_gb=needed + 0.01)
    assert fits.decision.plan.memory.peak <= (needed + 0.01) * GB


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def test_the_command_prints_a_table_and_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    machines = ["--nodes", "2", "--gpus-per-node", "8", "--gpu-memory-gb", "2"]
    words = words_for(path, *machines, "--inter-gbps", "100", "--tflops", "400")
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "takes      base:" in table and "does not fit" in table
    assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "0"], "nodes: must be >= 1"),
        (["--gpus-per-node", "many"], "gpus-per-node: expected int"),
        (["--nodez", "2"], "--nodez is not an option"),
        (["--check"], "--check is an option of dlora.train"),
        (["--adapter.target_modules", '["q_prof"]'], "q_prof"),
        (["--sharding.memory_budget_gb", "9", "--gpu-memory-gb", "8"], "is more than"),
        (["--model.quantization", "nf3"], "model.quantization: expected one of none, fp8, int8"),
    ],
)
def test_mistakes_are_one_line(path: str, words: list[str], told: str) -> None:
    assert told in refusal(main, words_for(path, *words))


def test_as_many_tokens_are_planned_as_fit(path: str) -> None:
    """Of sequences of `data.max_length`: the plan for twice as many takes another placement."""
    machines = Machines(gpus_per_node=2, gpu_memory_gb=2.6)
    step = {"data__max_length": 256, "train__global_batch_size": 128}
    chosen = surveyed(path, machines, train__tokens_per_micro_batch="auto", **step).decision.plan
    tokens = chosen.workload.rows * chosen.workload.tokens
    assert chosen.memory.peak <= 2.6e9 and 256 < tokens < 256 * 64
    twice = surveyed(path, machines, train__tokens_per_micro_batch=2 * tokens, **step).decision
    assert twice.warning or twice.plan.placement != chosen.placement


def test_the_command_ends_with_status_2() -> None:
    program = [sys.executable, "-m", "dlora.plan", *words_for("./nowhere")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "dlora: error: model.path: directory ./nowhere does not exist\n"
