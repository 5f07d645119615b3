"""`train.compile`: runs whose blocks are graphs are those without, and make no graph twice.

But for one run, graphs are made by `aot_eager`: traced, with gradients of their own, and run by
torch's kernels, which takes seconds where torch's own compiler takes minutes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import refusals
import torch
from kill_trials import ADALORA
from run_training import Run, Runs, check_near, prepared_run, train
from sampling import sampled
from tiny import command, save_chats
from torch import nn

from dlora import LoraConfig, attach
from dlora.base.recomputation import recompute_blocks
from dlora.errors import UsageError
from dlora.lora.attach import named_adapters
from dlora.plan.graphs import graphs_in_words
from dlora.plan.speed import Speeds
from dlora.runtime.console import console
from dlora.train import Run as TrainingRun
from dlora.training.compile_cache import check_cache, use_cache
from dlora.training.compiled import CompiledBlocks
from dlora.training.settle_compile import (
    Compiler,
    changed_compile,
    earlier_compile,
    settle_compile,
)
from dlora.training.warm_up import make_graphs, weigh_graphs

DROPS = {"adapter__lora_dropout": 0.1}
NF4 = {"model__quantization": "nf4", "model": "blocks"}
INT8 = {"model__quantization": "int8", "model": "blocks"}
METHODS: dict[str, dict[str, Any]] = {
    "lora, dropout": DROPS,
    "dora, dropout": DROPS | {"adapter__use_dora": True},
    "dora, bfloat16": {"adapter__use_dora": True, "model__dtype": "bfloat16"},
    "adalora": ADALORA,
    "flora": {"adapter__method": "flora"},
    "pissa": {"adapter__init_lora_weights": "pissa"},
    "nf4, dropout": DROPS | NF4,
    "int8": INT8,
    "windows, dropout": DROPS | {"model": "windows"},
    "learned positions": {"model": "gpt2"},
}
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "fsdp2": (2, {"sharding__base": "world"}),
    "fsdp2, recomputed": (
        2,
        {"sharding__base": "world", "sharding__activation_checkpointing": True},
    ),
}
SAMPLE = [("adalora", "alone", True)]  # each takes most of a minute


def steps_of(run: Run) -> Run:
    """Without the lines of held-out answers and of cuts, which have no loss."""
    return run[0], [line for line in run[1] if "loss" in line]


def traced(argv: list[str]) -> dict[str, Any]:
    """A run whose blocks are graphs of `aot_eager`; with how many there were, step by step."""
    made: list[int] = []

    def with_graphs(run: TrainingRun) -> None:
        packs = run.prepared.dealing.packs
        blocks = CompiledBlocks(run.model, packs=packs, backend="aot_eager")
        torch._dynamo.reset()
        make_graphs(run.context, blocks, run.objective)
        made.append(blocks.made)
        own = run.figures

        def figures(*args: Any) -> Any:
            made.append(blocks.made)
            assert not blocks.failed
            return own(*args)

        run.figures = figures  # type: ignore[method-assign]

    return train(argv, with_graphs) | {"made": made}


@pytest.mark.parametrize(
    ("method", "place", "packing"),
    sampled(SAMPLE, [(m, p, packs) for m in METHODS for p in PLACES for packs in (True, False)]),
)
def test_a_run_ends_where_it_ends_without(
    run: Runs, method: str, place: str, packing: bool
) -> None:
    """Evaluated between steps; of 7 sequences, micro-batches of 2 leave one alone."""
    world, where = PLACES[place]
    settings = METHODS[method] | where | {"data__packing": packing, "train__max_steps": 6}
    settings |= {"data__eval": str(save_chats(run.root / "held.jsonl", 5)), "output__eval_every": 3}
    if method == "adalora":
        settings |= {"train__max_steps": 9}
    eager = run("eager", world, **settings, train__compile=False)
    graphs = run("graphs", world, work=traced, **settings, train__compile=False)
    rounded = {"rel": 2e-2, "bound": 0.2} if "bfloat16" in method else {}
    check_near(*(steps_of(result) for result in (graphs, eager)), **rounded)
    for result in graphs[0]:
        assert result["made"][0] > 0
        assert len(set(result["made"])) == 1  # the last batch of a step, a mask, an evaluation


def compiled(argv: list[str]) -> dict[str, Any]:
    """A run with `train.compile`, and what it printed of it."""
    torch._inductor.config.cpp.vec_isa_ok = True  # as it finds by compiling a program for each set
    printed: list[str] = []
    handler = SimpleNamespace(level=0, handle=lambda record: printed.append(record.getMessage()))
    console.addHandler(handler)  # type: ignore[arg-type]
    try:
        run = prepared_run(argv)
    finally:
        console.removeHandler(handler)  # type: ignore[arg-type]
    blocks = run.context.blocks
    assert blocks is not None
    before = blocks.made
    status = run.train()
    tensors = {name: parameter.detach().clone() for name, parameter in run.replica.named.items()}
    return {
        "status": status,
        "tensors": tensors,
        "made": (before, blocks.made),
        "failed": blocks.failed,
        "printed": [line for line in printed if line.startswith("train.compile")],
        "cache": os.environ["TORCHINDUCTOR_CACHE_DIR"],
    }


def test_all_graphs_are_made_before_the_first_step(run: Runs, tmp_path: Path) -> None:
    """By torch's own compiler, in a directory of the user's alone."""
    settings = DROPS | {"train__max_steps": 4}
    eager = run("eager", 1, **settings, train__compile=False)
    cache = {"train__compile": True, "train__compile_cache": str(tmp_path / "cache")}
    made = run("compiled", 1, work=compiled, **settings, **cache)
    check_near(made, eager)
    [result] = made[0]
    before, after = result["made"]
    assert before == after > 0
    assert not result["failed"]
    [line] = result["printed"]
    assert line.startswith(f"train.compile: {before} graphs of 2 blocks in ")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert Path(result["cache"]).parent == tmp_path / "cache"
    assert any(Path(result["cache"]).rglob("*.so"))


def weighed(argv: list[str], *shares: float) -> dict[str, Any]:
    """What `auto` makes of graphs whose passes take that share of others' time, by rank."""
    share = shares[int(os.environ.get("RANK", "0"))]
    run = prepared_run(argv)
    blocks = CompiledBlocks(run.model, packs=run.prepared.dealing.packs, backend="eager")
    torch._dynamo.reset()
    make_graphs(run.context, blocks, run.objective)
    made, now = blocks.made, 0.0

    def clock() -> float:
        nonlocal now
        now += share if blocks.on else 1.0
        return now

    weigh_graphs(run.context, blocks, run.objective, clock)
    found = {"on": blocks.on, "failed": blocks.failed, "more": blocks.made - made}
    run.train()
    return found


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.9,), ""),
        ((0.5, 1.1), "a pass with graphs takes 1.10 of the time"),
    ],
    ids=["gain", "no gain on one rank"],
)
def test_auto_leaves_graphs_that_gain_nothing(
    run: Runs, shares: tuple[float, ...], said: str
) -> None:
    settings = {"train__compile": False, "sharding__base": "world"}
    results, _ = run("weighed", len(shares), work=weighed, arguments=shares, **settings)
    for found in results:
        assert found["failed"].startswith(said) and bool(found["failed"]) == bool(said)
        assert found["on"] is not bool(said) and not found["more"]


class Branching(nn.Module):
    """A block that reads a value, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if float(y.sum()) > 0 else -y


def test_a_block_that_does_not_compile_is_named_and_runs() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.ModuleDict({"blocks": nn.Sequential(Branching(), Branching())})
    attach(model, LoraConfig(r=2, target_modules=["linear"]))
    x = torch.randn(2, 5, 8)
    wanted = model["blocks"](x)
    blocks = CompiledBlocks(model, packs=False, backend="aot_eager")
    blocks.start()
    assert torch.equal(model["blocks"](x), wanted)
    assert blocks.failed.startswith("Branching does not compile: ")
    assert not blocks.on


class Straight(Branching):
    """One that can be a graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.relu()


def test_what_ran_as_a_graph_before_another_block_failed_is_recomputed_as_one() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    kinds = [nn.Sequential(kind(), kind()) for kind in (Straight, Branching)]
    model = nn.ModuleDict(dict(zip(("first", "second"), kinds, strict=True)))
    attach(model, LoraConfig(r=2, target_modules=["linear"]))
    for _, _, adapter in named_adapters(model):
        nn.init.normal_(adapter.lora_B)
    model.train()
    x = torch.randn(2, 5, 8)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model["second"](model["first"](x)).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    blocks = CompiledBlocks(model, packs=False, backend="aot_eager")
    recompute_blocks(model, 1)
    blocks.start()
    found = gradients()
    assert blocks.failed.startswith("Branching does not compile: ") and blocks.used
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


# -- whether a run compiles ------------------------------------------------------------------------


def decision(engine: str = "fsdp2", flops: float = 1e12) -> Any:
    placement = SimpleNamespace(engine=engine, shard_size=2)
    return SimpleNamespace(plan=SimpleNamespace(placement=placement, flops=flops))


def config(directory: Path, setting: object, cache: str | None = None) -> Any:
    train = SimpleNamespace(compile=setting, objective="sft", compile_cache=cache)
    adapter, output = SimpleNamespace(method="lora"), SimpleNamespace(directory=directory / "run")
    return SimpleNamespace(train=train, adapter=adapter, output=output)


@pytest.mark.parametrize(
    ("setting", "steps", "earlier", "missing", "wanted", "said"),
    [
        (False, 10**6, None, "", False, ""),
        (True, 1, None, "", True, ""),
        ("auto", 10**6, None, "", True, ""),
        ("auto", 100, None, "", False, "100 steps are estimated to take 2 min, too few to earn"),
        ("auto", 100, True, "", True, ""),
        ("auto", 10**6, False, "", False, "as in the run that is resumed"),
        ("auto", 10**6, None, "there is no compiler (g++)", False, "there is no compiler (g++)"),
    ],
)
def test_auto_weighs_what_a_run_is(
    tmp_path: Path,
    setting: object,
    steps: int,
    earlier: bool | None,
    missing: str,
    wanted: bool,
    said: str,
) -> None:
    lines: list[str] = []
    compiler = Compiler(missing, speed=1e12)
    found = settle_compile(
        config(tmp_path, setting), decision(), steps, compiler, earlier, lines.append
    )
    assert found is wanted
    assert len(lines) == bool(said)
    assert not said or lines[0].startswith(f"train.compile: off: {said}")


@pytest.mark.usefixtures("no_weights_are_read")
def test_what_cannot_compile_is_refused(
    saved_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command(saved_models("llama"), tmp_path, train__compile=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"^train\.compile: true: there is no compiler \(g\+\+"):
        refusals.preparation(argv, check=True)
    with pytest.raises(UsageError, match=r"^train\.compile: true: sharding\.engine: zero3 gathers"):
        settle_compile(config(tmp_path, True), decision("zero3"), 1, Compiler(), None, print)


def test_a_resumed_run_says_that_it_computes_in_another_way() -> None:
    graphs, none = {"train": {"compile": True}}, {"train": {"compile": False}}
    assert changed_compile(None, True) == changed_compile(graphs, True) == ""
    assert changed_compile({"train": {}}, False) == changed_compile(none, False) == ""
    assert "computed with graphs, the steps from here on without" in changed_compile(graphs, False)
    assert "computed without graphs, the steps from here on with" in changed_compile(none, True)
    assert (earlier_compile(graphs), earlier_compile({}), earlier_compile(None)) == (
        True,
        None,
        None,
    )


def test_a_plan_says_whether_blocks_are_compiled(tmp_path: Path) -> None:
    def said(
        setting: object, flops: float | None, steps: int = 10**6, engine: str = "fsdp2"
    ) -> str:
        given = config(tmp_path, setting)
        given.train.governed_by, given.train.max_steps = "max_steps", steps
        return graphs_in_words(given, decision(engine).plan, Speeds(flops=flops))

    assert said(False, 1e12) == "none (train.compile: false)"
    assert said(True, None) == "of each block, made before the first step"
    assert said(True, None, engine="zero3").startswith("none: sharding.engine: zero3 gathers")
    assert said("auto", 1e12) == "of each block, where there is a compiler and they prove faster"
    assert said("auto", 1e12, steps=100).startswith("none: 100 steps are estimated to take 2 min")
    assert said("auto", None, steps=1).endswith("long enough to earn it and they prove faster")


# -- the cache -------------------------------------------------------------------------------------


def test_a_cache_is_the_user_s_own(tmp_path: Path) -> None:
    output, cache = tmp_path / "run", tmp_path / "cache"
    check_cache(str(cache), output)
    assert not cache.exists()
    cache.mkdir(mode=0o700)
    check_cache(str(cache), output)
    check_cache(None, output)
    (tmp_path / "link").symlink_to(cache)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for path, said in {
        output / "cache": "lies in output.dir",
        output: "lies in output.dir",
        tmp_path / "link": "is a link",
        tmp_path / "file": "is no directory",
        tmp_path / "open": "others may write to",
        tmp_path / "open" / "inside": "others may write to",
    }.items():
        message = refusals.refusal(check_cache, str(path), output)
        assert message.startswith("train.compile_cache: ")
        assert said in message
    cache.chmod(0o770)
    assert "others may write to" in refusals.refusal(check_cache, str(cache), output)
    assert "others may write to" in refusals.refusal(use_cache, str(cache))
