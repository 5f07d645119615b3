"""Several adapters in one run: each is the adapter of its own run alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from refusals import preparation, refusal
from run_training import same_bits
from sampling import full
from stopped_runs import steps_saved
from tiny import save_chats
from together_runs import (
    Together,
    check_as_alone,
    crashed_together,
    dropped_together,
    followed,
    short_together,
    terminated_together,
)
from transformers import AutoModelForCausalLM

from dlora.metrics.log import read_metrics
from dlora.together.prepare import prepare_together

STEPS = 8
PLAIN = {"name": "plain", "adapter": {"r": 4, "lora_dropout": 0.1}}
DORA = {
    "name": "dora",
    "adapter": {"r": 3, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "optimizer": {"lr": 1e-3, "schedule": "constant", "max_grad_norm": 0.1},
    "train": {"seed": 5, "max_steps": 6, "global_batch_size": 9, "micro_batch_size": 3},
}
ADALORA = {
    "name": "adalora",
    "adapter": {"method": "adalora", "init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 2},
    "train": {"seed": 3, "max_steps": STEPS},
}
RSLORA = {
    "name": "rs",
    "adapter": {
        "r": 6,
        "use_rslora": True,
        "target_modules": ["v_proj", "embed_tokens", "lm_head"],
    },
    "train": {"max_steps": 7},
}
MIXED = [PLAIN, DORA, ADALORA, RSLORA]
FSDP2 = {"sharding__engine": "fsdp2", "sharding__base": "world"}
ZERO3 = {"sharding__engine": "zero3", "sharding__base": "world"}
WHOLE = {"sharding__engine": "fsdp2", "sharding__base": "none"}
BY_TOKENS = {"train__micro_batch_size": None, "train__tokens_per_micro_batch": 128}
NODE = {"sharding__engine": "fsdp2", "sharding__base": "node"}


@pytest.mark.parametrize(
    ("world", "placement", "settings"),
    [
        pytest.param(1, WHOLE, {}, id="one process"),
        pytest.param(2, FSDP2, {}, id="fsdp2"),
        pytest.param(2, ZERO3, {}, id="zero3"),
        pytest.param(3, FSDP2, {"data__packing": False}, id="padded"),
        pytest.param(3, ZERO3, {"data__packing": False}, id="padded zero3", marks=pytest.mark.full),
        pytest.param(2, WHOLE, {}, id="whole", marks=pytest.mark.full),
        pytest.param(4, NODE, {}, id="node", marks=pytest.mark.full),
        pytest.param(
            2,
            FSDP2,
            {"sharding__activation_checkpointing": True},
            id="recomputed",
            marks=pytest.mark.full,
        ),
    ],
)
def test_each_is_the_adapter_of_its_own_run(
    together: Together, alone: Any, world: int, placement: Any, settings: Any
) -> None:
    per_node = 2 if placement is NODE else None
    results = together("run", world, MIXED, per_node=per_node, **placement, **settings)
    assert [result["status"] for result in results] == [0] * world
    for member in MIXED:
        name = str(member["name"])
        check_as_alone(results, together.lines("run", name), name, alone(member))
    if world > 1 and placement is not WHOLE:  # before anybody leaves, what is sent is planned
        [_, line, *_] = read_metrics(together.root / "run/adapters/plain/metrics.jsonl")
        assert line["wire_bytes"] == pytest.approx(results[0]["planned_wire"], abs=1)


@pytest.mark.parametrize("placement", [FSDP2, full(ZERO3)], ids=["fsdp2", "zero3"])
def test_a_packed_base_is_shared(together: Together, alone: Any, placement: Any) -> None:
    members = [PLAIN, DORA, {**ADALORA, "train": {"max_steps": 6}}]
    packed = {"model": "blocks", "model__quantization": "nf4"}
    results = together("run", 2, members, **packed, **placement)
    for member in members:
        name = str(member["name"])
        wanted = alone(member, **packed)
        check_as_alone(results, together.lines("run", name), name, wanted)


def test_adapters_of_w0_and_of_another_adapter(
    together: Together, alone: Any, tmp_path: Path
) -> None:
    """PiSSA starts from W0, another from an adapter on disk; each evaluates its own data."""
    held_out = str(save_chats(tmp_path / "held out.jsonl", 9))
    first = together("first", 1, [{**PLAIN, "train": {"max_steps": 2}}])
    assert first[0]["status"] == 0
    start = str(tmp_path / "first/adapters/plain/adapter")
    members = [
        {"name": "pissa", "adapter": {"r": 3, "init_lora_weights": "pissa"}},
        {"name": "more", "adapter": {"path": start}, "data": {"eval": held_out}},
    ]
    settings = {"train__max_steps": 4}
    results = together("run", 2, members, **FSDP2, **settings, output__eval_every=2)
    for member in members:
        more = {"output__eval_every": 2} if "data" in member else {}
        name = str(member["name"])
        wanted = alone(member, **settings, **more)
        check_as_alone(results, together.lines("run", name), name, wanted)


def test_micro_batches_by_tokens(together: Together, alone: Any) -> None:
    other = {**DORA, "train": {"seed": 5, "max_steps": 6, "global_batch_size": 9}}
    results = together("run", 2, [PLAIN, other], **FSDP2, **BY_TOKENS)
    for member in (PLAIN, other):
        name = str(member["name"])
        check_as_alone(results, together.lines("run", name), name, alone(member))


def test_another_setting_of_one_is_another_run(together: Together) -> None:
    settings = {"train__max_steps": 4, "output__save_every": 2}
    together("run", 1, [PLAIN, DORA], work=crashed_together, arguments=(3,), **settings)
    faster = {**PLAIN, "optimizer": {"lr": 1e-5}}
    words = together.words("run", [faster, DORA], **settings)
    refused = refusal(preparation, words, how=prepare_together)
    assert "adapters[plain]: output.resume: " in refused
    assert "optimizer.lr was 0.002 and is 1e-05" in refused
    words = together.words("run", [DORA], **settings)
    one_less = refusal(preparation, words, how=prepare_together)
    assert "is of a run with adapters: plain, dora, and this one has dora" in one_less
    none = refusal(preparation, together.command(together.root / "run", **settings))
    assert "is of a run with adapters: plain, dora, and this one has none" in none


def test_the_base_gathers_for_one_run(together: Together) -> None:
    """What is sent: the gathers of one run, and the gradients of all."""
    one = [{"name": "a", "adapter": {"r": 4}}]
    four = [{"name": name, "adapter": {"r": 4}} for name in "abcd"]
    settings = {**FSDP2, "train__max_steps": 4, "train__micro_batch_size": 7}
    together("one", 2, one, **settings)
    together("four", 2, four, **settings)
    [alone_bytes, all_bytes] = [
        read_metrics(together.root / name / "adapters/a/metrics.jsonl")[2]["wire_bytes"]
        for name in ("one", "four")
    ]
    [planned] = [r["planned_wire"] for r in together("again", 2, one, **settings)][:1]
    assert alone_bytes == planned
    gradients = 4 * _numel(together.root / "one/adapters/a/adapter")
    assert all_bytes - alone_bytes == pytest.approx(3 * gradients, rel=0.05)


def _numel(directory: Path) -> int:
    from safetensors.torch import load_file

    return sum(t.numel() for t in load_file(directory / "adapter_model.safetensors").values())


def check_same_run(together: Together, whole: list[Any], resumed: list[Any], start: int) -> None:
    """Bit for bit, on every rank, and every step stands in each adapter's metrics once.

    Args:
        start: the step after which it was resumed.
    """
    assert [result["start"] for result in resumed] == [start, start]
    for one, other in zip(whole, resumed, strict=True):
        assert one["status"] == other["status"] == 0
        for name, tensors in one["tensors"].items():
            assert same_bits(tensors, other["tensors"][name]), name
    for member in MIXED:
        name = str(member["name"])
        assert together.lines("run", name) == together.lines("whole", name)
    ranks = [together.root / run / "adapters/adalora/ranks.json" for run in ("run", "whole")]
    assert ranks[0].read_bytes() == ranks[1].read_bytes()


@pytest.mark.parametrize(
    ("steps", "commits", "start"),
    [(5, False, 4), (7, False, 7), (3, True, 3)],
    ids=["all there", "one finished", "the last whole step is committed"],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    together: Together, steps: int, commits: bool, start: int
) -> None:
    settings = {**FSDP2, "output__save_every": 0 if commits else 2, "output__keep_last": 9}
    whole = together("whole", 2, MIXED, **settings)
    died = together("run", 2, MIXED, work=crashed_together, arguments=(steps, commits), **settings)
    if commits:
        assert all(f"step {steps} is committed" in line for line in died)
    else:
        assert died == ["crashed"] * 2
    check_same_run(together, whole, together("run", 2, MIXED, **settings), start)


@pytest.mark.parametrize("placement", [FSDP2, full(ZERO3)], ids=["fsdp2", "zero3"])
def test_layers_give_way_and_no_number_changes(together: Together, placement: Any) -> None:
    bare = together("bare", 2, MIXED, **placement)
    held = together(
        "held", 2, MIXED, work=short_together, sharding__memory_budget_gb=4, **placement
    )
    for member in MIXED:
        name = str(member["name"])
        lines = zip(together.lines("held", name), together.lines("bare", name), strict=True)
        assert all(mine | {"wire_bytes": 0} == other | {"wire_bytes": 0} for mine, other in lines)
        for mine, theirs in zip(held, bare, strict=True):
            assert same_bits(mine["tensors"][name], theirs["tensors"][name])
    own = [together.root / run / "adapters/plain/metrics.jsonl" for run in ("held", "bare")]
    sent, most = ([line["wire_bytes"] for line in read_metrics(path)] for path in own)
    assert sent[1] < most[1] and sent[-1] == most[-1]  # none is left


def test_a_signal_stops_all_after_a_commit(together: Together) -> None:
    whole = together("whole", 2, MIXED, **FSDP2)
    stopped = together("run", 2, MIXED, work=terminated_together, arguments=(3,), **FSDP2)
    assert [result["status"] for result in stopped] == [143, 143]
    assert steps_saved(together.root / "run") == ["step-000003"]
    check_same_run(together, whole, together("run", 2, MIXED, **FSDP2), 3)


def test_a_finished_run_writes_what_is_missing(together: Together) -> None:
    together("run", 1, MIXED)
    where = together.root / "run/adapters/dora/adapter"
    before = (where / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(where)
    again = together("run", 1, MIXED)
    assert (again[0]["status"], again[0]["start"]) == (0, STEPS)
    assert (where / "adapter_model.safetensors").read_bytes() == before


def test_one_is_dropped_and_stays_away(together: Together, alone: Any) -> None:
    members = [PLAIN, {"name": "loser", "adapter": {"r": 2}}]
    settings = {**FSDP2, "output__save_every": 4}
    results = together("run", 2, members, work=dropped_together, arguments=("loser", 3), **settings)
    assert [result["status"] for result in results] == [0, 0]
    check_as_alone(results, together.lines("run", "plain"), "plain", alone(PLAIN))
    assert [line["step"] for line in together.lines("run", "loser")] == [1, 2, 3]
    assert not (together.root / "run/adapters/loser/adapter").exists()
    again = together("run", 2, members, **settings)
    assert [(r["status"], r["start"]) for r in again] == [(0, STEPS)] * 2


@pytest.mark.parametrize(
    "model", ["gpt2", full("opt_dropout"), full("mixtral"), full("longrope"), full("windows")]
)
def test_other_architectures(together: Together, alone: Any, model: str) -> None:
    members = [
        {"name": "a", "adapter": {"r": 2, "lora_dropout": 0.1}, "train": {"seed": 1}},
        {"name": "b", "adapter": {"r": 4, "use_dora": True}, "optimizer": {"lr": 1e-3}},
    ]
    settings = {"model": model, "train__max_steps": 4}
    results = together("run", 2, members, **FSDP2, **settings)
    for member in members:
        name = str(member["name"])
        check_as_alone(results, together.lines("run", name), name, alone(member, **settings))


def test_one_that_fails_leaves_and_the_rest_go_on(together: Together, alone: Any) -> None:
    wild = {"name": "wild", "adapter": {"r": 4}, "optimizer": {"lr": 1e30, "max_grad_norm": 0}}
    settings = {**FSDP2, "output__save_every": 2}
    results = together("run", 2, [wild, DORA, PLAIN], **settings)
    assert [result["status"] for result in results] == [1, 1]
    for member in (DORA, PLAIN):
        name = str(member["name"])
        check_as_alone(results, together.lines("run", name), name, alone(member))
    adapters = together.root / "run/adapters"
    assert not (adapters / "wild/adapter").exists()
    assert (adapters / "wild/nonfinite.json").exists()
    again = together("run", 2, [wild, DORA, PLAIN], **settings)  # it does not begin again
    assert again[0]["start"] == STEPS
    assert [result["status"] for result in again] == [1, 1]


def test_hooks_follow_every_adapter(together: Together, tmp_path: Path) -> None:
    """Saves have each one's held-out loss; how each has left is told, also after a restart."""
    wild = {"name": "wild", "adapter": {"r": 4}, "optimizer": {"lr": 1e30, "max_grad_norm": 0}}
    held_out = str(save_chats(tmp_path / "held out.jsonl", 4))
    settings = {**FSDP2, "data__eval": held_out, "output__eval_every": 2, "output__save_every": 2}
    members = [wild, PLAIN, {"name": "late", "adapter": {"r": 2}}]
    first, second = together("run", 2, members, work=followed, arguments=(2,), **settings)
    for rank in (first, second):
        how = [(name, standing) for name, standing, _ in rank["left"]]
        assert how == [("late", "dropped"), ("wild", "failed"), ("plain", "finished")]
    assert [bool(why) for _, _, why in first["left"]] == [True, True, False]
    logged = together.lines("run", "plain")
    losses = {line["step"]: line["eval_loss"] for line in logged if "eval_loss" in line}
    saved = {step: lines["plain"] for step, lines in first["saved"].items() if step % 2 == 0}
    assert saved == {step: loss for step, loss in losses.items() if step}
    again, _ = together("run", 2, members, work=followed, arguments=(2,), **settings)
    assert sorted(again["left"]) == sorted(first["left"])
    assert again["saved"] == {}  # nothing was left to do


def test_peft_loads_every_adapter(together: Together, saved_models: Any) -> None:
    [result] = together("run", 1, MIXED, train__max_steps=6)
    assert result["status"] == 0
    ids = torch.arange(1, 9)[None]
    logits = {}
    for member in MIXED:
        where = together.root / "run/adapters" / str(member["name"]) / "adapter"
        base = AutoModelForCausalLM.from_pretrained(saved_models("llama"), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, where).eval()
        with torch.no_grad():
            logits[member["name"]] = model(input_ids=ids).logits
    assert len({float(z.sum()) for z in logits.values()}) == len(MIXED)


def test_what_another_run_left_is_kept(together: Together) -> None:
    members = [{"name": "a", "adapter": {"r": 2}}, {"name": "b", "adapter": {"r": 3}}]
    short = {"train__max_steps": 2}
    together("run", 1, members, **short)
    before = (together.root / "run/adapters/a/metrics.jsonl").read_bytes()
    together("run", 1, members, output__resume="none", **short)
    kept = list((together.root / "run/adapters/a").glob("metrics.jsonl.*"))
    assert [path.read_bytes() for path in kept] == [before]
    shutil.rmtree(together.root / "run")
