"""Whole runs on pairs of answers: one process and two ranks, both engines, resumed, continued."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from run_training import Runs, check_near, command_line, same_bits, train
from sampling import full
from stopped_runs import crashed
from tiny import save_chats

from dlora.config.load import parse
from dlora.errors import UsageError
from dlora.sharding.topology import Topology
from dlora.training.prepare import prepare

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FIGURES = {"rewards_chosen", "rewards_rejected", "margin", "accuracy"}
DPO = {"train__objective": "dpo", "dpo__beta": 0.5}


def rows(count: int = 12) -> list[dict[str, Any]]:
    found = []
    for number in range(count):
        asked = " ".join(WORDS[: 1 + number % 5])
        answers = [WORDS[number % 9], " ".join(WORDS[number % 4 :][:3])]
        found.append(
            {"prompt": [{"role": "user", "content": asked}]}
            | {
                name: [{"role": "assistant", "content": f"{text} {number}"}]
                for name, text in zip(("chosen", "rejected"), answers, strict=True)
            }
        )
    return found


@pytest.fixture(scope="module")
def command(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, **settings): the words of a run on pairs."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows())))
    (root / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows(5))))

    def of(directory: Path, model: str = "llama", **settings: Any) -> list[str]:
        common = {
            "model__path": saved_models(model),
            "data__train": str(root / "pairs.jsonl"),
            "data__eval": str(root / "held_out.jsonl"),
            "data__format": "preference",
            "data__max_length": 96,
            "train__max_steps": 6,
            "train__objective": "dpo",
            "output__eval_every": 6,
            "output__dir": str(directory),
        }
        return command_line(**common | settings)

    return of


def with_plan(argv: list[str]) -> dict[str, Any]:
    """A run, and the bytes of a step by the plan."""
    found: list[Any] = []
    done = train(argv, found.append)
    budget = found[0].prepared.budget
    planned = budget.gathers + budget.reduction
    return done | {"planned": planned, "reference": budget.workload.reference}


@pytest.mark.parametrize(
    ("model", "settings", "reference"),
    [
        ("llama", DPO | {"dpo__sft_weight": 0.5, "dpo__kl_weight": 0.2}, "joined"),
        # An adapter before the blocks: the reference has a pass of its own.
        ("tied", DPO | {"adapter__target_modules": ["embed_tokens", "q_proj"]}, "apart"),
        # Some seconds each: what differs from the first is in tests/objectives in one process.
        full("gpt2", {"train__objective": "orpo"}, ""),
        full("gpt2", DPO | {"dpo__loss_type": "ipo"}, "joined"),
        full("llama", {"train__objective": "simpo"}, ""),
        full("mixtral", DPO, "joined"),
        full("llama", DPO | {"adapter__use_dora": True, "adapter__lora_dropout": 0.2}, "joined"),
    ],
)
def test_two_ranks_train_as_one_process_and_send_what_is_planned(
    run: Runs, model: str, settings: dict[str, Any], reference: str
) -> None:
    one = run("one", 1, model, work=with_plan, **settings)
    compares = settings["train__objective"] == "dpo"
    names = FIGURES | ({"kl"} if compares else set())
    before, first, *_, last = one[1]
    assert names < first.keys() and {f"eval_{name}" for name in names} < before.keys()
    if compares:  # the policy is the reference
        assert first["margin"] == before["eval_margin"] == 0
        assert first["kl"] == pytest.approx(0, abs=1e-6)
        if "dpo__sft_weight" not in settings and "dpo__loss_type" not in settings:
            assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert last["kl"] > 0
    assert last["eval_loss"] < before["eval_loss"]
    assert last["eval_margin"] > before["eval_margin"]
    assert one[0][0]["reference"] == reference
    for engine in ("fsdp2", "zero3") if reference != "apart" else ("fsdp2",):
        where = {"sharding__engine": engine, "sharding__base": "world"}
        two = run(engine, 2, model, work=with_plan, **settings | where)
        exact = ("step", "lr", "tokens", "all_tokens", "batch_hash")
        lines = [line for line in one[1] if line["step"]]
        others = [line for line in two[1] if line["step"]]
        check_near((two[0], others), (one[0], lines), exact=exact)
        for got, wanted in zip(two[1], one[1], strict=True):
            for name in names | {f"eval_{name}" for name in (*names, "loss")}:
                if name in wanted:
                    near = pytest.approx(wanted[name], rel=1e-4, abs=1e-6)
                    assert got[name] == near, (engine, name)
        sent = {line["wire_bytes"] for line in others[2:-1]}
        assert sent == {two[0][0]["planned"]}, engine


def test_a_pair_is_one_sequence(run: Runs, command: Any, tmp_path: Path) -> None:
    """Of the batch, the order and the hash; tokens are those of both answers."""
    argv = command(tmp_path / "pairs", train__global_batch_size=4, data__shuffle=True)
    found = prepare(parse(argv, prog="dlora").config, Topology(0, 1, 1), print)
    assert len(found.train) == 12 and found.sampler.step(0) != found.sampler.step(1)
    [[first, *_]] = found.dealing(found.sampler.step(0), found.train.lengths, 1)
    batch = found.collate([found.train[i] for i in first])
    assert (batch.weight, len(batch.input_ids)) == (2, 4)
    results, lines = run(
        "run", 1, train__global_batch_size=4, data__eval=None, output__eval_every=None
    )
    ids = found.sampler.step(0)
    targets = [sum(int(t >= 0) for t in found.train[i].labels.tolist()) for i in ids]
    assert lines[0]["tokens"] == sum(targets)
    assert lines[0]["all_tokens"] == sum(len(found.train[i]) for i in ids)
    assert results[0]["status"] == 0


@pytest.fixture(scope="module")
def continued(pools: Pools, saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of a supervised run."""
    root = tmp_path_factory.mktemp("continued")
    settings = {
        "model__path": saved_models("llama"),
        "data__train": str(save_chats(root / "chats.jsonl", 8)),
        "optimizer__lr": 1e-2,
        "train__max_steps": 3,
        "output__dir": str(root / "sft"),
    }
    pools(1).run(train, command_line(**settings))
    return str(root / "sft/adapter")


@pytest.mark.parametrize(
    ("engine", "state"),
    [
        ("fsdp2", "replicated"),
        # 5 s each: both parts are resumed without a copy in test_resume.py and test_divided_runs.py
        full("zero3", "replicated"),
        full("fsdp2", "divided"),
    ],
)
def test_a_continued_adapter_is_compared_with_its_copy_after_a_resume_as_well(
    run: Runs, continued: str, tmp_path: Path, engine: str, state: str
) -> None:
    """Bit for bit; the adapter that the run began with may be gone by then."""
    start = tmp_path / "start"
    start.mkdir()
    for file in Path(continued).iterdir():
        if file.is_file():
            (start / file.name).write_bytes(file.read_bytes())
    settings = {
        "sharding__engine": engine,
        "sharding__base": "world",
        "sharding__optimizer_state": state,
        "output__save_every": 2,
        "adapter__path": str(start),
        "adapter__r": None,
        "adapter__lora_alpha": None,
    }
    whole = run("whole", 2, **settings)
    assert whole[1][0]["eval_margin"] == 0  # the policy is its copy, and not W0
    assert whole[1][-1]["eval_margin"] > 0
    stopped = run("run", 2, work=crashed, arguments=(5,), **settings)
    assert stopped[0] == ["crashed"] * 2
    for file in start.iterdir():
        file.unlink()
    start.rmdir()
    again = run("run", 2, **settings)
    for result, wanted in zip(again[0], whole[0], strict=True):
        assert same_bits(result["tensors"], wanted["tensors"])
    for line in (*again[1], *whole[1]):
        line.pop("wire_bytes", None)  # DeepSpeed has its trace from the third step of a process on
    assert again[1] == whole[1]


def test_a_policy_may_be_compared_with_the_base_instead(run: Runs, continued: str) -> None:
    settings = {"adapter__path": continued, "adapter__r": None, "adapter__lora_alpha": None}
    _, lines = run("base", 1, **settings, dpo__reference="base")
    assert lines[0]["eval_margin"] != 0 and lines[0]["eval_kl"] > 0


@pytest.mark.full  # 5 s: the one that is continued has more to restore
def test_a_fresh_policy_resumes_bit_for_bit(run: Runs) -> None:
    settings = {"output__save_every": 2, "adapter__lora_dropout": 0.1, "train__micro_batch_size": 3}
    whole = run("whole", 2, **settings)
    assert run("run", 2, work=crashed, arguments=(5,), **settings)[0] == ["crashed"] * 2
    again = run("run", 2, **settings)
    assert again[1] == whole[1]
    assert same_bits(again[0][0]["tensors"], whole[0][0]["tensors"])


@pytest.mark.parametrize(
    "settings",
    [
        {"sharding__activation_checkpointing": True},
        # 1 s each: tests/objectives and test_streaming.py have the two apart
        full({"data__streaming": True, "data__shuffle_window": 64}),
        full({"adapter__init_lora_weights": "pissa"}),
    ],
)
def test_what_a_run_may_have_beside_pairs(run: Runs, settings: dict[str, Any]) -> None:
    """Recomputed blocks give the same; a stream and another start train as well."""
    lines = run("other", 1, **settings)
    assert lines[1][-1]["eval_margin"] > 0
    if "sharding__activation_checkpointing" in settings:
        check_near(_steps(lines), _steps(run("plain", 1)))


def _steps(found: Any) -> Any:
    return found[0], [line for line in found[1] if line["step"]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data__format": "chat"}, "data.format: train.objective: dpo reads preference, not chat"),
    ({"train__objective": "sft"}, "train.objective: sft cannot read data.format: preference"),
    ({"data__packing": True}, "data.packing: the answers of a pair have a row each"),
    ({"train__tokens_per_micro_batch": 64, "train__micro_batch_size": None}, "counts pairs"),
    ({"train__compile": True}, "train.objective: dpo has no graphs"),
    ({"dpo__loss_type": "ipo", "dpo__label_smoothing": 0.1}, "dpo.label_smoothing: 0.1 cannot act"),
    ({"dpo__reference": "adapter"}, "dpo.reference: adapter is a copy of the adapter at"),
    ({"simpo__gamma": 0.5}, "simpo.gamma: 0.5 cannot act: train.objective is not simpo"),
    ({"dpo__label_smoothing": 0.5}, "dpo.label_smoothing"),
    ({"train__task": "classification"}, "train.task: classification cannot be combined with"),
    ({"adapter__init_lora_weights": "lora_ga"}, "adapter.init_lora_weights: lora_ga cannot be"),
    ({"adapter__method": "mola"}, "adapter.method: mola cannot be combined"),
    ({"adapters": "[{name: a}, {name: b}]"}, "train.objective: dpo trains one adapter at a time"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSED)
def test_what_pairs_cannot_have_is_refused_by_name(
    settings: dict[str, Any], says: str, command: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    argv = command(tmp_path / "run", **settings)
    with pytest.raises(UsageError) as refused:
        prepare(parse(argv, prog="dlora").config, Topology(0, 1, 1), print)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_routers_with_a_loss_of_their_own_are_refused(
    command: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    argv = command(tmp_path / "run", "mixtral_aux")
    with pytest.raises(UsageError, match="train.objective: the base asks for an auxiliary loss"):
        prepare(parse(argv, prog="dlora").config, Topology(0, 1, 1), print)


def test_zero3_computes_no_reference_apart(command: Any, tmp_path: Path) -> None:
    settings = {"sharding__engine": "zero3", "sharding__base": "world"}
    argv = command(tmp_path / "run", adapter__target_modules=["embed_tokens"], **settings)
    with pytest.raises(UsageError, match="sharding.engine: zero3 cannot compute a reference in a"):
        prepare(parse(argv, prog="dlora").config, Topology(0, 2, 2), print)


def test_what_is_decided_is_printed(command: Any, tmp_path: Path, continued: str) -> None:
    def said(**settings: Any) -> str:
        lines: list[str] = []
        argv = command(tmp_path / "run", **settings)
        prepare(parse(argv, prog="dlora").config, Topology(0, 1, 1), lines.append)
        return "\n".join(lines)

    fresh = said()
    assert "dpo: the reference is W0 with the adapter off, in the policy's pass" in fresh
    assert "data.packing: off: the answers of a pair have a row each" in fresh
    own = {"adapter__path": continued, "adapter__r": None, "adapter__lora_alpha": None}
    assert "dpo: the reference is a frozen copy of the adapter at adapter.path" in said(**own)
    assert "pass of its own" in said(adapter__target_modules=["embed_tokens"])
