"""Runs that follow a plan: the choice of `auto` is kept, a budget is used, figures come out."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plan_table import check_plan_was_kept
from ranks import Pool
from run_training import Runs, command_line, prepared_run
from sampling import full
from tiny import VOCABULARY, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dlora.base.native import has_kernels
from dlora.config.load import parse
from dlora.data.builtin import builtin_records
from dlora.metrics.log import read_metrics
from dlora.sharding.topology import Topology
from dlora.training.prepare import prepare

# Where bfloat16 has no instructions a step of the wide model takes minutes in it.
DTYPE = "bfloat16" if has_kernels() else "float32"
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}


def told(argv: list[str]) -> tuple[str, list[str]]:
    """What a run printed, and the paths of what it held."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run = prepared_run(argv)
        run.train()
    return printed.getvalue(), list(run.prepared.budget.resident)


def base_of(directory: Path) -> str:
    return yaml.safe_load((directory / "config.yaml").read_text())["sharding"]["base"]


def test_auto_is_stored_and_kept_by_a_resume(run: Runs, tmp_path: Path) -> None:
    """All of W0 fits here, so `auto` is `none`; a checkpoint that says `world` keeps `world`."""
    run("fresh", 2, work=told, train__max_steps=2)
    assert base_of(tmp_path / "fresh") == "none"
    begun = {"sharding__base": "world", "output__save_every": 1}
    run("run", 2, work=told, train__max_steps=2, **begun)
    run("run", 2, work=told, train__max_steps=4)
    assert base_of(tmp_path / "run") == "world"
    run("run", 3, work=told, train__max_steps=5)
    assert base_of(tmp_path / "run") == "none"  # chosen again, for another number of ranks


def test_a_budget_keeps_layers_and_saves_their_bytes(run: Runs) -> None:
    steps = {"train__max_steps": 3, "sharding__base": "world"}
    _, bare = run("bare", 2, work=told, **steps)
    results, held = run("held", 2, work=told, **steps, sharding__memory_budget_gb=4)
    assert results[0][1] == results[1][1] != []
    assert [line["loss"] for line in bare] == [line["loss"] for line in held]
    assert held[1]["wire_bytes"] < 0.2 * bare[1]["wire_bytes"]  # the gradients of A and B are left


def test_a_budget_that_nothing_fits_is_refused(run: Runs, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="sharding.memory_budget_gb: .* is not enough"):
        run("run", 2, work=told, sharding__memory_budget_gb=1e-3)
    assert not (tmp_path / "run").exists()


def save_wide(directory: Path) -> str:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=VOCABULARY * 31, **heads, **WIDE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def wide_words(directory: Path, **settings: Any) -> list[str]:
    """A run of a model so large that its memory can be told from a process's own."""
    text = directory / "text.jsonl"
    text.write_text(('{"text": "' + "y" * 600 + '"}\n') * 16)
    return command_line(
        output__dir=str(directory / "run"),
        model__path=save_wide(directory / "model"),
        data__train=str(text),
        model__dtype=DTYPE,
        data__format="text",
        data__max_length=256,
        adapter__r=16,
        train__max_steps=3,  # the first two gather what later ones find
        train__global_batch_size=16,
        train__micro_batch_size=8,
        **settings,
    )


def told_by_new_processes(directory: Path, argv: list[str]) -> tuple[str, list[str]]:
    """`told` on two ranks whose memory holds nothing of other runs."""
    pool = Pool(2, directory / "ranks", fresh=True)
    result, _ = pool.run(told, argv, limit=500)
    pool.close()
    print(result[0])
    return result


@pytest.mark.parametrize(
    ("engine", "base", "recomputed", "quantization"),
    [
        # 30 s each. FSDP2's is in the test below, and `make train` in that of the README
        pytest.param("fsdp2", "world", False, "none", marks=pytest.mark.full),
        ("zero3", "world", True, "none"),
        full("fsdp2", "none", False, "none"),
        full("fsdp2", "world", True, "nf4"),
        full("zero3", "world", False, "int8"),
    ],
)
def test_planned_is_measured(
    tmp_path: Path, engine: str, base: str, recomputed: bool, quantization: str
) -> None:
    argv = wide_words(
        tmp_path,
        sharding__engine=engine,
        sharding__base=base,
        sharding__activation_checkpointing=recomputed,
        model__quantization=quantization,
    )
    printed, _ = told_by_new_processes(tmp_path, argv)
    check_plan_was_kept(printed)


def test_a_budget_is_used_and_never_passed(tmp_path: Path) -> None:
    argv = wide_words(tmp_path, sharding__base="world")
    config = parse(argv, prog="dlora.train").config
    bare = prepare(config, Topology(0, 2, 2), print).budget
    budget = bare.memory.peak + 0.4 * bare.base_total
    printed, held = told_by_new_processes(
        tmp_path, [*argv, "--sharding.memory_budget_gb", str(budget / 1e9)]
    )
    check_plan_was_kept(printed)
    # The last block waits for its backward anyway: at the loss it takes nothing more.
    assert "model.layers.0" in held and "model.layers.6" not in held
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(record["peak_memory_bytes"] for record in records) <= budget
    saved = bare.gathers + bare.reduction - records[-1]["wire_bytes"]
    assert 0.3 * bare.gathers < saved < bare.gathers


CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "models/SmolLM2" in path.read_text())
OTHERWISE: dict[str, dict[str, Any]] = {
    "adalora": {"adapter.tinit": 1, "adapter.tfinal": 1, "adapter.deltaT": 1},
    "distill": {"model.path": "models/SmolLM2-135M-Instruct.Q4_1.gguf"},  # and not a compressed one
}
WITHOUT_BFLOAT16 = "AVX512_CORE"  # the most that oneDNN may use: stands for an older CPU


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every 20th record of the configurations' own data."""
    path = tmp_path_factory.mktemp("docstrings") / "chats.jsonl"
    records = builtin_records("docstrings")[::20]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


@pytest.mark.full  # 30 s each; the README's test makes the quickstart's run
@pytest.mark.parametrize("isa", ["", WITHOUT_BFLOAT16])
@pytest.mark.parametrize("name", DEMO)
def test_a_configuration_takes_the_memory_that_its_plan_says(
    tmp_path: Path, cache: str, docstrings: str, monkeypatch: Any, name: str, isa: str
) -> None:
    """Three steps of one micro-batch for each rank; the peak within 15 %."""
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    size = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["train"]["micro_batch_size"]
    settings = {
        "model.cache_dir": cache,
        "data.train": docstrings,
        "train.max_steps": 3,
        "train.global_batch_size": 2 * size,
        "output.dir": str(tmp_path / "run"),
        "output.eval_every": 0,
        "output.samples": 0,
        **OTHERWISE.get(name, {}),
    }
    argv = ["--config", str(CONFIGS / f"{name}.yaml")]
    argv += [f"--{key}={value}" for key, value in settings.items()]
    printed, _ = told_by_new_processes(tmp_path, argv)
    check_plan_was_kept(printed, "peak")
