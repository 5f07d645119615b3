"""An adapter and its neighbours: who leaves, fails or differs changes no other."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import preparation, refusal
from run_training import same_bits
from sampling import full
from test_together import ADALORA, BY_TOKENS, DORA, FSDP2, MIXED, PLAIN, RSLORA, WHOLE
from together_runs import (
    Together,
    check_as_alone,
    crashed_together,
    obstructed_together,
    train_together,
)

from dlora.config.adapters import configs_of
from dlora.config.load import parse
from dlora.lora.segments import NotByTokenError, Segment, Segments
from dlora.together.prepare import prepare_together
from dlora.together.run import TogetherRun
from dlora.training.checks import check_output
from dlora.training.show_data import main as data_command

FIRST = {
    "name": "First-1",
    "adapter": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]},
    "train": {"max_steps": 3},
}
LAST = {
    "name": "first-1",
    "adapter": {"r": 200, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "train": {"max_steps": 12},
}
ONE_BY_ONE = {
    "name": "one",
    "adapter": {"r": 2, "lora_dropout": 0.3},
    "train": {"global_batch_size": 1, "max_steps": 5, "seed": 7},
}
EVERYWHERE = ["q_proj", "down_proj", "lm_head", "embed_tokens"]


def check_all_as_alone(
    together: Together, alone: Any, world: int, members: list[dict[str, Any]], **settings: Any
) -> None:
    """Each is the adapter of its run alone in one process."""
    results = together("run", world, members, **settings)
    assert [result["status"] for result in results] == [0] * world
    own = {key: value for key, value in settings.items() if not key.startswith("sharding")}
    for member in members:
        name = member["name"]
        check_as_alone(results, together.lines("run", name), name, alone(member, **own))


def check_same_tensors(one: list[Any], other: list[Any]) -> None:
    for mine, wanted in zip(one, other, strict=True):
        for name, tensors in wanted["tensors"].items():
            assert same_bits(mine["tensors"][name], tensors), name


@pytest.mark.parametrize("settings", [{}, full({"data__packing": False})], ids=["packed", "padded"])
def test_layers_steps_and_ranks_that_they_do_not_share(
    together: Together, alone: Any, settings: Any
) -> None:
    """One adapts the first block, another the last; one has fewer sequences than there are ranks;
    names differ in case alone; the last audit is of one that is alone by then."""
    members = [FIRST, LAST, ONE_BY_ONE]
    check_all_as_alone(together, alone, 3, members, **FSDP2, **settings)


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw8bit", "sgd"])
def test_other_optimizers(together: Together, alone: Any, name: str) -> None:
    section = {"name": name, "lr": 1e-2, "loraplus_lr_ratio": 4, "weight_decay": 0.1}
    members = [
        {"name": "other", "adapter": {"r": 2}, "optimizer": section},
        {"name": "adamw", "adapter": {"r": 3}, "train": {"max_steps": 3}},
    ]
    check_all_as_alone(together, alone, 2, members, **FSDP2, train__max_steps=5)


@pytest.mark.full
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "milora"])
def test_other_starts(together: Together, alone: Any, init: str) -> None:
    """Two draw at random, one after the other; each draws what it draws alone."""
    start = {"init_lora_weights": init}
    members = [
        {"name": "one", "adapter": {"r": 2, **start}},
        {"name": "other", "adapter": {"r": 4, **start}, "train": {"seed": 4}},
        PLAIN,
    ]
    check_all_as_alone(together, alone, 2, members, **FSDP2, train__max_steps=3)


@pytest.mark.full
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_other_packed_bases(together: Together, alone: Any, quantization: str) -> None:
    packed = {"model": "blocks", "model__quantization": quantization}
    check_all_as_alone(together, alone, 2, [PLAIN, DORA], **FSDP2, **packed)


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        pytest.param({}, EVERYWHERE, id="packed"),
        pytest.param({"data__packing": False}, EVERYWHERE, id="padded", marks=pytest.mark.full),
        *(
            pytest.param({"model": model}, "all-linear", id=model, marks=pytest.mark.full)
            for model in ("mixtral", "windows", "gpt2")
        ),
    ],
)
def test_nan_beside_an_adapter_changes_no_bit_of_it(
    together: Together, settings: Any, targets: Any
) -> None:
    wild: dict[str, Any] = {
        "name": "wild",
        "adapter": {"r": 4, "target_modules": targets},
        "optimizer": {"lr": 1e30, "max_grad_norm": 0, "warmup_ratio": 0},
    }
    tame = wild | {"optimizer": {"lr": 1e-3, "max_grad_norm": 0}}
    dora = {"name": "dora", "adapter": {"r": 2, "use_dora": True}}
    others = [PLAIN, RSLORA, DORA, ADALORA] if targets is EVERYWHERE else [PLAIN, dora]
    others = copy.deepcopy(others)
    for other in others:
        other.setdefault("train", {})["max_steps"] = 4
        other["adapter"] |= {"tinit": 1, "tfinal": 1} if other["name"] == "adalora" else {}
    first, *rest = others
    settings = {**FSDP2, "train__max_steps": 4, **settings}
    beside = together("run", 2, [first, wild, *rest], **settings)
    wanted = together("tame", 2, [first, tame, *rest], **settings)
    assert [result["status"] for result in (*beside, *wanted)] == [1, 1, 0, 0]
    for name in (other["name"] for other in others):
        assert together.lines("run", name) == together.lines("tame", name)
        assert all(
            same_bits(one["tensors"][name], other["tensors"][name])
            for one, other in zip(beside, wanted, strict=True)
        )


def held(argv: list[str]) -> dict[str, list[str]]:
    """What of an adapter's training is alive in the step after it has left, by adapter."""
    known: dict[str, dict[str, Any]] = {}
    alive: dict[str, list[str]] = {}

    def meddle(run: TogetherRun) -> None:
        before = run.passes

        def passes(step: int, mine: Any) -> Any:
            for member in run.members:
                name, context = member.name, member.context
                if member.running and step:
                    states = [t for s in context.optimizer.state.values() for t in s.values()]
                    parts = {"optimizer": context.optimizer, "buffers": context.replica.buffers}
                    parts |= {f"state {n}": t for n, t in enumerate(states) if torch.is_tensor(t)}
                    parts["gradients"] = run.reduction._whole
                    known[name] = {part: weakref.ref(it) for part, it in parts.items()}
                elif name not in alive and name in known:
                    alive[name] = [p for p, it in known[name].items() if it() is not None]
            return before(step, mine)

        run.passes = passes  # type: ignore[method-assign]

    train_together(argv, meddle)
    return alive


def test_what_an_adapter_s_training_held_is_freed(together: Together) -> None:
    wild = {"name": "wild", "adapter": {"r": 4}, "optimizer": {"lr": 1e30, "max_grad_norm": 0}}
    adalora = ADALORA | {"train": {"seed": 3, "max_steps": 6}}
    [alive] = together("run", 1, [wild, DORA, adalora, PLAIN], work=held)
    assert alive == {"wild": [], "dora": [], "adalora": []}


def test_a_snapshot_is_of_the_standings_of_its_step(together: Together) -> None:
    """What is committed of the step before one has left resumes with it."""
    settings = {**FSDP2, "output__snapshot_every": 4, "output__keep_last": 9}
    whole = together("whole", 2, MIXED, **settings)
    together("run", 2, MIXED, work=crashed_together, arguments=(7, True), **settings)
    before = together.root / "run/checkpoints/step-000004"
    again = together("again", 2, MIXED, **settings, output__resume=str(before))
    assert [result["start"] for result in again] == [4, 4]
    check_same_tensors(again, whole)


@pytest.mark.full
def test_every_step_is_resumed_bit_for_bit(together: Together) -> None:
    settings = {**WHOLE, "output__save_every": 1, "output__keep_last": 9}
    whole = together("whole", 1, MIXED, **settings)
    for step in range(1, 8):
        directory = together.root / f"whole/checkpoints/step-{step:06d}"
        again = together(f"from {step}", 1, MIXED, **settings, output__resume=str(directory))
        assert again[0]["start"] == step
        check_same_tensors(again, whole)


@pytest.mark.full
def test_another_number_of_ranks_goes_on_within_the_bounds(together: Together, alone: Any) -> None:
    settings = {**FSDP2, "output__save_every": 1, "output__keep_last": 9}
    together("whole", 2, MIXED, **settings)
    for step in (3, 6, 7):
        directory = together.root / f"whole/checkpoints/step-{step:06d}"
        again = together(f"from {step}", 3, MIXED, **settings, output__resume=str(directory))
        for member in MIXED:
            name = str(member["name"])
            check_as_alone(again, [], name, (alone(member)[0], []))


@pytest.mark.full
def test_a_run_with_one_that_has_failed_is_resumed(together: Together) -> None:
    wild = {"name": "wild", "adapter": {"r": 4}, "optimizer": {"lr": 1e30, "max_grad_norm": 0}}
    settings = {**FSDP2, "output__save_every": 3}
    members = [wild, DORA, PLAIN]
    whole = together("whole", 2, members, **settings)
    together("run", 2, members, work=crashed_together, arguments=(5,), **settings)
    again = together("run", 2, members, **settings)
    assert [result["status"] for result in (*whole, *again)] == [1] * 4
    check_same_tensors(again, whole)


def test_more_steps_of_one_that_has_finished_are_refused(together: Together) -> None:
    """Of one that is still trained they are as in a run of its own."""
    settings = {"output__save_every": 1}
    together("run", 1, [PLAIN, FIRST], work=crashed_together, arguments=(5,), **settings)
    more = FIRST | {"train": {"max_steps": 6}}
    refused = refusal(
        preparation, together.words("run", [PLAIN, more], **settings), how=prepare_together
    )
    assert refused.startswith("adapters[First-1]: train.max_steps: it has finished after 3 steps")
    longer = PLAIN | {"train": {"max_steps": 10}}
    prepared: Any = preparation(
        together.words("run", [longer, FIRST], **settings), how=prepare_together
    )
    assert prepared.total_steps == 10


def test_micro_batches_of_so_many_tokens_are_made(together: Together) -> None:
    members = [PLAIN, {"name": "other", "train": {"tokens_per_micro_batch": 256}}]
    words = together.words("run", members, **BY_TOKENS)
    prepared: Any = preparation(words, how=prepare_together)
    dealt = {name: own.dealing.tokens for name, own in prepared.members.items()}
    assert dealt == {"plain": 128, "other": 256}
    assert prepared.budget.workload.tokens <= 128 + 256
    few = [PLAIN, {"name": "other", "train": {"tokens_per_micro_batch": 8}}]
    refused = refusal(preparation, together.words("run", few, **BY_TOKENS), how=prepare_together)
    assert refused.startswith("adapters[other]: train.tokens_per_micro_batch: 8 is less than the ")


@pytest.mark.parametrize("file", ["adapter", "nonfinite.json", "ranks.png"])
def test_a_file_that_cannot_be_written_is_one_adapter_s_failure(
    together: Together, alone: Any, file: str
) -> None:
    wild = {"name": "bad", "adapter": {"r": 4}, "optimizer": {"lr": 1e30, "max_grad_norm": 0}}
    short = ADALORA | {"name": "bad", "train": {"seed": 3, "max_steps": 6}}
    place = together.root / "run/adapters/bad" / file
    bad = wild if file == "nonfinite.json" else short
    if file == "adapter":
        place.parent.mkdir(parents=True)
        place.write_text("no directory")
        [result] = together("run", 1, [bad, PLAIN])
    else:
        blocked = {"work": obstructed_together, "arguments": (str(place),)}
        [result] = together("run", 1, [bad, PLAIN], **blocked)
    assert result["status"] == 1
    check_as_alone([result], together.lines("run", "plain"), "plain", alone(PLAIN))
    assert (together.root / "run/adapters/plain/adapter/adapter_config.json").exists()


def test_what_is_in_the_way_of_an_adapter_s_directory_is_refused(
    together: Together, tmp_path: Path
) -> None:
    (tmp_path / "run/adapters").mkdir(parents=True)
    (tmp_path / "run/adapters/plain").write_text("")
    config = parse(together.words("run", [DORA, PLAIN]), "dlora.train").config
    assert refusal(check_output, config).startswith("output.dir: ")


def test_what_is_common_is_refused_in_an_entry(together: Together) -> None:
    """One objective computes the joined losses."""
    members = [PLAIN, {"name": "b", "train": {"objective": "sft"}}]
    refused = refusal(preparation, together.words("run", members))
    assert "train.objective is the same for all adapters; set it beside them" in refused


@pytest.mark.parametrize(
    ("place", "shape"),
    [
        ("layers.0.mlp.adapters", (5, 2)),
        ("layers.0.mlp.adapters", (5,)),
        ("layers.0.mlp.adapters", (1, 1)),
        ("layers.0.mlp.experts.1.w1.adapters", (10,)),
    ],
    ids=["tokens first", "fewer", "one", "an expert that gets all"],
)
def test_tokens_in_another_order_are_refused(place: str, shape: tuple[int, ...]) -> None:
    segments = Segments((Segment("a", 0, 10),), rows=2, tokens=5)
    with pytest.raises(NotByTokenError, match="whose they are is not known"):
        segments._check(torch.Size(shape), place)
    for right in ((2, 5), (10,), (2, 5, 1)):
        segments._check(torch.Size(right), "layers.0.mlp.adapters")


def test_data_are_shown_for_each(together: Together, capsys: pytest.CaptureFixture[str]) -> None:
    members = [PLAIN, {"name": "short", "data": {"max_length": 32}}]
    words = together.words("run", members)
    assert data_command([*words, "--show", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("adapters: plain") < printed.index("adapters: short")
    assert "max_length 32" in printed.partition("adapters: short")[2]


def test_what_only_one_cannot_have_is_refused(together: Together) -> None:
    """Also where the key that is named is common: `model.…`, `sharding.…`."""
    wrong = {"name": "wrong", "adapter": {"init_lora_weights": "pissa", "use_dora": True}}
    words = together.words("run", [PLAIN, wrong], model__quantization="nf4")
    assert "adapters[wrong]: " in refusal(preparation, words)


def test_a_chat_template_of_one_is_kept_as_text(together: Together, tmp_path: Path) -> None:
    """As the common one is: a file that changes would be another run."""
    file = tmp_path / "template.jinja"
    text = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    file.write_text(text)
    members = [PLAIN, {"name": "own", "data": {"chat_template": str(file)}}]
    config = parse(together.words("run", members), "dlora.train").config
    assert configs_of(config)["own"].data.chat_template == text
    missing = [{"name": "own", "data": {"chat_template": str(tmp_path / "none")}}]
    refused = refusal(preparation, together.words("run", missing))
    assert refused.startswith("adapters[own]: data.chat_template: ")
