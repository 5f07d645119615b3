"""Runs that distil: one process and sharded, resumed, from files, and what is refused."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from hostile import edit_json
from refusals import preparation, refusal
from run_training import Run, Runs, check_near
from sampling import full
from stopped_runs import check_equal, crashed
from tiny import MODELS, VOCABULARY, save_chats, save_model, tokenizer
from tiny import command as options
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, GPT2Config, LlamaConfig

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.config.load import parse
from dlora.library.compress import main as compress
from dlora.library.compressed import load_compressed
from dlora.plan.command import main as plan
from dlora.runtime.ranks import Ranks
from dlora.sharding.topology import Topology
from dlora.together.prepare import prepare_together
from dlora.training.prepare import prepare
from dlora.training.startup import prepared
from dlora.training.teach import main as teach
from dlora.training.teach import write

WORLD = {"sharding__base": "world"}
DISTILL = {"train__objective": "distill", "distill__temperature": 2.0, "optimizer__lr": 1e-2}


@pytest.fixture(scope="module")
def adapter(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the base, with a dropout that a teacher has not."""
    model = AutoModelForCausalLM.from_pretrained(saved_models("llama"), dtype=torch.float32)
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(
                    0, 0.3, generator=torch.Generator().manual_seed(parameter.numel())
                )
    directory = tmp_path_factory.mktemp("adapter") / "teacher"
    save_adapter(model, directory, base_model_name_or_path=saved_models("llama"))
    return str(directory)


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, **DISTILL, train__max_steps=4, adapter__lora_dropout=0.1)


@pytest.fixture(scope="module")
def teachers(saved_models: Any, adapter: str) -> dict[str, dict[str, Any]]:
    return {
        "base": {},
        "base, adapter": {"distill__teacher_adapter": adapter},
        "other": {"distill__teacher": saved_models("tied"), "distill__ce_weight": 0.5},
        "other, adapter": {
            "distill__teacher": saved_models("llama"),
            "distill__teacher_adapter": adapter,
            "distill__teacher_quantization": "int8",
        },
    }


def check(run: Run, one: Run) -> None:
    check_near(run, one)
    for line, wanted in zip(run[1], one[1], strict=True):
        for name in ("ce", "kl"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("teacher", "engine", "world"),
    [
        ("base", "fsdp2", 2),
        ("base", "zero3", 2),
        ("base, adapter", "fsdp2", 2),
        ("other, adapter", "fsdp2", 2),
        full("other, adapter", "fsdp2", 3),  # 3 s each
        full("base, adapter", "zero3", 2),
        full("other", "fsdp2", 2),
    ],
)
def test_sharded_is_one_process(
    run: Runs, teachers: Any, teacher: str, engine: str, world: int
) -> None:
    """On the wire is what the plan says, whatever the teacher."""
    settings = teachers[teacher]
    one = run("one", 1, **settings)
    for line in one[1]:
        whole = settings.get("distill__ce_weight", 1.0) * line["ce"] + 4 * line["kl"]
        assert line["loss"] == pytest.approx(whole, rel=1e-6)
    assert teacher == "base" or one[1][-1]["kl"] < one[1][0]["kl"]
    placed = settings | WORLD | {"sharding__engine": engine}
    sharded = run("sharded", world, **placed)
    check(sharded, one)
    config = parse(run.command(run.root / "planned", **placed), "dlora.train").config
    planned = prepare(config, Topology(0, world, world), lambda line: None).budget
    assert sharded[1][-2]["wire_bytes"] == planned.gathers + planned.reduction
    assert (planned.memory.teacher > 0) == (teacher != "base")


@pytest.mark.parametrize("teacher", [full("base, adapter"), "other"])  # 3 s each
def test_a_crash(run: Runs, teachers: Any, teacher: str, tmp_path: Path) -> None:
    settings = teachers[teacher] | WORLD | {"output__save_every": 3}
    whole = run("whole", 2, **settings)
    results, _ = run("run", 2, work=crashed, arguments=(4,), **settings)
    assert results == ["crashed"] * 2
    check_equal(run("run", 2, **settings), whole)


def test_padded_rows_are_packed_ones(run: Runs, teachers: Any) -> None:
    packed, padded = (run(f"{p}", 1, data__packing=p, **teachers["other"]) for p in (True, False))
    check(packed, padded)


def taught(argv: list[str], to: str) -> None:
    """What `dlora teach` does on ranks that have joined."""
    rank, world = dist.get_rank(), dist.get_world_size()
    here = Ranks(rank, world, torch.device("cpu"), ranks.current_store)
    write(prepared(parse(argv, "dlora.train").config, here), here, Path(to))


def test_files_are_the_teacher(run: Runs, teachers: Any, tmp_path: Path) -> None:
    """As many tokens of each target, live and from files that two ranks wrote."""
    settings = teachers["other"] | {"distill__top_k": 9}
    live = run("live", 1, **settings)
    to = str(tmp_path / "taught")
    argv = run.command(tmp_path / "x", **settings | WORLD)
    run.pools(2).run(taught, argv, to)
    again = {"distill__teacher": to, "distill__ce_weight": 0.5}
    check(run("one", 1, **again), live)
    check(run("two", 2, **again, **WORLD, data__packing=False), live)
    fewer = run("fewer", 1, **again, distill__top_k=2)
    check(fewer, run("live, fewer", 1, **settings | {"distill__top_k": 2}))


def test_a_compressed_model_gets_back_what_was_taken(
    run: Runs, saved_models: Any, tmp_path: Path
) -> None:
    """Of tokens that it has not seen as well."""
    whole, low = saved_models("llama"), tmp_path / "low"
    assert compress(["--base", whole, "--energy", "0.7", "--to", str(low)]) == 0
    settings = {"distill__teacher": whole, "distill__ce_weight": 0.0, "distill__temperature": 1.0}
    settings |= {"model__path": str(low), "adapter__r": 8, "train__max_steps": 20}
    _, lines = run("run", 1, **settings)
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    chats = save_chats(tmp_path / "unseen.jsonl", 40).read_text().splitlines()[24:]
    unseen = "\n".join(json.loads(line)["messages"][1]["content"] for line in chats)
    ids = tokenizer()(unseen, return_tensors="pt")["input_ids"][:, :200]
    student = load_compressed(low, dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)

    @torch.no_grad()
    def divergence() -> float:
        log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    before = divergence()
    load_adapter(student, tmp_path / "run" / "adapter")
    assert divergence() < 0.9 * before


# What is refused ---------------------------------------------------------------------------------


def base_of(directory: Path, config: Any) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def asked(saved_models: Any, directory: Path, **settings: Any) -> list[str]:
    return options(saved_models("llama"), directory, **DISTILL | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__objective": "sft"}, "distill.temperature: 2.0 cannot act"),
        ({"distill__teacher_quantization": "nf4"}, "cannot act: distill.teacher is base"),
        ({"distill__weight": 0.0}, "distill.weight: must be > 0"),
        ({"distill__top_k": 0}, "distill.top_k: must be >= 1"),
        ({"train__task": "classification"}, "cannot be combined with train.objective: distill"),
        (
            {"adapter__init_lora_weights": "lora_ga"},
            "lora_ga cannot be combined with train.objective: distill",
        ),
        ({"train__compile": True}, "train.compile: true: train.objective: distill has no graphs"),
        ({"distill__teacher": "nowhere/at/all"}, "distill.teacher: directory nowhere/at/all does"),
        ({"distill__teacher_adapter": "no/such/place"}, "no/such/place"),
    ],
)
def test_settings_that_cannot_act(
    saved_models: Any, tmp_path: Path, settings: Any, message: str, no_weights_are_read: None
) -> None:
    assert message in refusal(lambda: preparation(asked(saved_models, tmp_path, **settings)))


def test_another_base_has_to_fit(
    saved_models: Any, adapter: str, tmp_path: Path, no_weights_are_read: None
) -> None:
    def said(teacher: str, **settings: Any) -> str:
        argv = asked(saved_models, tmp_path, distill__teacher=teacher, **settings)
        return refusal(preparation, argv)

    sizes: Any = MODELS["llama"]().to_dict() | {"vocab_size": VOCABULARY + 5}
    wider = base_of(tmp_path / "wider", LlamaConfig(**sizes))
    assert f"has logits of {VOCABULARY + 5} tokens, and model.path of {VOCABULARY}" in said(wider)
    other = save_model(tmp_path / "other", "llama")
    file = json.loads((other / "tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    edit_json(other / "tokenizer.json", model=file["model"])
    assert "has another vocabulary than model.path: the token 'a' is" in said(str(other))
    zero3 = said(saved_models("tied"), sharding__engine="zero3")
    assert "zero3 follows the modules of one model; use fsdp2" in zero3
    few: Any = MODELS["gpt2"]().to_dict() | {"n_positions": 20}
    positions = base_of(tmp_path / "short", GPT2Config(**few))
    assert "but the teacher has learned 20 positions" in said(positions)
    packed = base_of(
        tmp_path / "bloom", BloomConfig(vocab_size=VOCABULARY, hidden_size=40, n_layer=2, n_head=4)
    )
    assert "data.packing: the teacher: " in said(packed, data__packing=True)
    lines: list[str] = []
    config = parse(asked(saved_models, tmp_path, distill__teacher=packed), "dlora.train").config
    assert not prepare(config, Topology(0, 1, 1), lines.append).dealing.packs
    assert any("data.packing: off: the teacher: " in line for line in lines)
    bert = base_of(
        tmp_path / "bert",
        BertConfig(
            is_decoder=True,
            vocab_size=VOCABULARY,
            hidden_size=40,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
    )
    assert "computes its logits is not known row by row" in said(bert)
    wrong = said(saved_models("gpt2"), distill__teacher_adapter=adapter)
    assert "distill.teacher_adapter" in wrong


def test_several_adapters_have_no_teacher(
    saved_models: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    argv = asked(saved_models, tmp_path, adapters=[{"name": "a"}, {"name": "b"}])
    assert "distill has no loss_of_parts" in refusal(preparation, argv, how=prepare_together)


def test_files_have_to_fit(saved_models: Any, tmp_path: Path) -> None:
    to = tmp_path / "taught"
    live = {"distill__teacher": saved_models("tied"), "distill__top_k": 4}
    for settings, message in (
        ({"distill__top_k": None}, "distill.top_k: set how many"),
        ({"distill__top_k": VOCABULARY + 1}, f"but the teacher has {VOCABULARY} tokens"),
        ({"train__objective": "sft", "distill__temperature": None}, "train.objective: sft has no"),
        ({"data__streaming": True}, "data.streaming: dlora teach"),
    ):
        argv = asked(saved_models, tmp_path, **live | settings)
        if settings.get("train__objective"):
            argv = options(saved_models("llama"), tmp_path)
        assert message in refusal(teach, [*argv, "--to", str(to)])
    argv = asked(saved_models, tmp_path, **live)
    assert "--to: name the directory" in refusal(teach, argv)
    assert "is not empty" in refusal(teach, [*argv, "--to", str(tmp_path)])
    assert teach([*argv, "--to", str(to)]) == 0

    def said(**settings: Any) -> str:
        given = {"distill__teacher": str(to)} | settings
        return refusal(preparation, asked(saved_models, tmp_path, **given))

    assert "distill.temperature: 1, but" in said(distill__temperature=1.0)
    assert "distill.top_k: 5, but" in said(distill__top_k=5)
    assert "distill.teacher_adapter: cannot act" in said(distill__teacher_adapter="x/y/z")
    assert "distill.teacher_quantization: cannot act" in said(distill__teacher_quantization="int8")
    assert "of a data set in memory" in said(data__streaming=True)
    assert "is of other sequences than data.train has" in said(data__max_length=40)
    assert "is a directory of dlora teach" in refusal(
        teach,
        [
            *asked(saved_models, tmp_path, distill__teacher=str(to), distill__top_k=2),
            *("--to", str(tmp_path / "again")),
        ],
    )
    for name, changes, message in (
        ("format", {"format": 2}, "is not what dlora teach writes: its format is 2"),
        ("sequences", {"sequences": 9}, "of 9 sequences, there are 8"),
        ("vocabulary", {"vocabulary": 7}, "has logits of 7 tokens"),
        ("parts", {"parts": {"../x": ""}}, "is not the name of a file in it"),
    ):
        copy = shutil.copytree(to, tmp_path / name)
        edit_json(copy / "teacher.json", **changes)
        assert message in said(distill__teacher=str(copy))


def test_a_resumed_run_has_the_same_teacher(saved_models: Any, tmp_path: Path, run: Runs) -> None:
    teacher = save_model(tmp_path / "teacher", "tied")
    settings = {"distill__teacher": str(teacher), "train__max_steps": 1, "output__save_every": 1}
    run("run", 1, **settings)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(teacher)
    argv = run.command(tmp_path / "run", **settings | {"train__max_steps": 2})
    assert "distill.teacher: the weights of the teacher are others" in refusal(preparation, argv)
    assert preparation([*argv, "--output.resume_force", "true"]).resumed is not None


def test_the_plan_counts_a_teacher(saved_models: Any, tmp_path: Path, capsys: Any) -> None:
    for teacher in ("base", saved_models("wide")):
        argv = asked(saved_models, tmp_path, distill__teacher=teacher, sharding__base="world")
        machines = ["--nodes", "1", "--gpus-per-node", "2", "--gpu-memory-gb", "80"]
        assert plan([*argv, *machines]) == 0
        printed = capsys.readouterr().out
        assert ("teacher, with what stays in a step" in printed) == (teacher != "base")
