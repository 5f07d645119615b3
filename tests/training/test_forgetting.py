"""What a run forgets of its base: measured as transformers has it, and what the gate does."""

import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from forgetting_runs import KEYS, lost, measured, of_adapter, retained, state_of
from ranks import Pools
from refusals import preparation, refusal
from run_training import Runs, same_bits, told
from safetensors.torch import load_file
from sampling import full
from stopped_runs import steps_saved
from tiny import save_chats, whole

from dlora.adapters.open_adapter import open_adapter
from dlora.data.cache import stored

STEPS, EVERY = 8, 2
EVERYWHERE = {"sharding__base": "world"}
ZERO3 = {"sharding__engine": "zero3", **EVERYWHERE}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A retained set of 9 chats, other than those that are trained on."""
    path = save_chats(tmp_path_factory.mktemp("held") / "held.jsonl", 24 + 9)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[24:]))
    return str(path)


@pytest.fixture(scope="module")
def command(words: Any, held: str) -> Any:
    """command(directory, **settings): the words of a run of 8 steps with 4 measurements."""
    often = {"output__eval_every": EVERY, "output__save_every": 1, "output__keep_last": 99}
    settings = often | {"train__max_steps": STEPS, "forget__data": held, "optimizer__lr": 5e-3}
    return functools.partial(words, **settings)


@pytest.fixture(scope="module")
def plain(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(run on 2 ranks without a gate, its directory)."""
    root = tmp_path_factory.mktemp("plain")
    return Runs(pools, command, root)("run", 2, **EVERYWHERE), root / "run"


def kl_at(plain: Any, step: int) -> float:
    """KL after a step of the run without a gate."""
    return next(float(r["forget_kl"]) for r in plain[0][1] if r["step"] == step)


def between(plain: Any, step: int) -> float:
    """A limit that the run exceeds at the measurement of `step`, and not at the one before."""
    return (kl_at(plain, step - EVERY) + kl_at(plain, step)) / 2


def adapter_at(directory: Path, step: int) -> Any:
    return load_file(directory / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors")


def without_forgetting(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("forget_")} for line in lines]


# Measuring ---------------------------------------------------------------------------------------


def test_figures_are_those_of_transformers(plain: Any, saved_models: Any, held: str) -> None:
    """Of the base and of the model that PEFT merges, in float64; on 2 ranks under FSDP2."""
    (results, lines), directory = plain
    texts = retained(held)
    measurements = [line for line in lines if "forget_kl" in line]
    assert [line["step"] for line in measurements] == [0, 2, 4, 6, 8]
    assert all("forget_passed" not in line and "stopped_by" not in line for line in lines)
    base = whole(saved_models("llama"))
    start = measured(base, base, texts)
    first, last = measurements[0], measurements[-1]
    assert first["forget_kl"] == first["forget_kl_error"] == 0 and first["forget_agreement"] == 1
    assert first["forget_nll"] == first["forget_base_nll"] == pytest.approx(start["forget_nll"])
    wanted = of_adapter(saved_models("llama"), directory / "adapter", texts)
    assert {key: last[key] for key in KEYS} == pytest.approx(wanted, rel=1e-4)
    assert wanted["forget_kl"] > 0.01 and wanted["forget_agreement"] < 1
    assert len({line["forget_base_nll"] for line in measurements}) == 1  # W0 stays what it is


@pytest.mark.parametrize(
    ("world", "settings"),
    # 2 to 8 s each
    [(2, ZERO3), full(1, {"data__packing": False}), full(3, ZERO3), full(3, EVERYWHERE)],
)
def test_every_placement_measures_the_same(
    run: Runs, plain: Any, world: int, settings: dict[str, Any]
) -> None:
    _, lines = run("run", world, **settings, output__save_every=0)
    for got, wanted in zip(lines, plain[0][1], strict=True):
        here = {key: wanted[key] for key in wanted if key.startswith("forget_")}
        assert {key: got[key] for key in here} == pytest.approx(here, rel=1e-4, abs=1e-7)


def test_measuring_changes_nothing_else(run: Runs, plain: Any) -> None:
    """The run without it has the same bits, and no line of it."""
    without = {"forget__data": None, "output__eval_every": None}
    results, lines = run("run", 2, **EVERYWHERE, **without)
    assert not any(key.startswith("forget") for line in lines for key in line)
    assert lines == without_forgetting(plain[0][1])[1:]
    assert same_bits(results[0]["tensors"], plain[0][0][0]["tensors"])


STARTS: dict[str, dict[str, Any]] = {
    **{init: {"adapter__init_lora_weights": init} for init in ("gaussian", "milora", "lora_ga")},
    "pissa": {"adapter__init_lora_weights": "pissa"},
    "orthogonal": {"adapter__init_lora_weights": "orthogonal"},
    "dora": {"adapter__use_dora": True},
    "adalora": {"adapter__method": "adalora", "adapter__r": None},
    "flora": {"adapter__method": "flora"},
    "mola": {"adapter__method": "mola", "adapter__experts": 2, "adapter__top_k": 1},
    "a copied head": {"adapter__modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    "start",
    # Two runs of 1 s each; of one layer at a time they are in lora/test_family.py.
    [start if start == "pissa" else full(start) for start in STARTS],
)
def test_without_its_adapter_the_model_is_the_base(run: Runs, plain: Any, start: str) -> None:
    """The same bits whatever the start, before and after training."""
    short = {"train__max_steps": 2, "output__save_every": 0}
    _, lines = run("run", 1, **STARTS[start], **short)
    _, usual = run("usual", 1, **short)
    found = [line["forget_base_nll"] for line in lines if "forget_base_nll" in line]
    assert len(found) == 2 and {*found} == {usual[0]["forget_base_nll"]}
    # That B·A = 0 is rounded where both are orthogonal and neither is 0.
    assert lines[0]["forget_kl"] < (1e-6 if start == "orthogonal" else 1e-9)
    assert lines[-1]["forget_kl"] > max(lines[0]["forget_kl"], 1e-9)


@pytest.mark.full  # 2 s, and one kind of base
def test_a_packed_residual_is_compared_with_what_training_began_from(run: Runs) -> None:
    """W0 − s·B₀·A₀ is packed, and without the adapter the layers add B₀·A₀ back."""
    packed = {"model__quantization": "nf4", "adapter__init_lora_weights": "pissa"}
    _, lines = run("run", 1, "blocks", **packed, train__max_steps=2, output__save_every=0)
    assert lines[0]["forget_kl"] == 0 and lines[0]["forget_nll"] == lines[0]["forget_base_nll"]
    assert lines[-1]["forget_kl"] > 1e-6


def test_beside_held_out_data_and_packed_rows(run: Runs, plain: Any, held: str) -> None:
    both = {"data__eval": held, "data__packing": True, "train__max_steps": EVERY}
    _, lines = run("run", 2, **both, **EVERYWHERE, output__save_every=0)
    assert lines[0]["forget_nll"] == pytest.approx(lines[0]["eval_loss"], rel=1e-6)
    assert lines[0]["forget_base_nll"] == pytest.approx(plain[0][1][0]["forget_base_nll"], rel=1e-6)


# The gate ----------------------------------------------------------------------------------------


def test_stop(run: Runs, plain: Any) -> None:
    """Ends with a commit, status 0 and the reason; the same command finds it ended."""
    (_, lines), _ = plain
    gate = {"forget__max_kl": between(plain, 4), **EVERYWHERE}
    assert run("run", 2, **gate, work=lost, arguments=(4,))[0] == ["lost"] * 2
    results, stopped = run("run", 2, **gate)
    directory = run.root / "run"
    assert [result["status"] for result in results] == [0, 0]
    assert [line["step"] for line in stopped] == [0, 1, 2, 3, 4]
    assert stopped[-1]["stopped_by"] == "forget" and stopped[-1]["forget_passed"] is False
    assert [line.get("forget_passed") for line in stopped[:-1]] == [True, None, True, None]
    assert without_forgetting(stopped)[:-1] == without_forgetting(lines)[:4]
    assert steps_saved(directory)[-1] == "step-000004"
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()

    # A resume finds the decision, trains nothing and writes the adapter again.
    (directory / "adapter" / "adapter_model.safetensors").unlink()
    [(again, said), _], after = run("run", 2, **gate, work=told)
    assert again["status"] == 0 and after == stopped
    assert "already finished: step 4 of 8; after step 4 KL" in said
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter

    # With another limit the run goes on, as if it had never ended.
    [(more, said), _], rest = run("run", 2, work=told, **gate | {"forget__max_kl": 1e9})
    assert "the limits are others now, so it goes on" in said
    assert more["status"] == 0 and [line["step"] for line in rest] == list(range(9))
    assert same_bits(more["tensors"], plain[0][0][0]["tensors"])


@pytest.mark.parametrize(
    ("settings", "first"),
    [  # 3 s each
        full(EVERYWHERE, None),
        ({**ZERO3, "output__keep_last": 1}, (6, False)),
        full({**EVERYWHERE, "output__keep_last": 1}, (6, True)),
    ],
    ids=["whole", "lost, zero3", "committed in the evaluation"],
)
def test_rollback(run: Runs, plain: Any, settings: dict[str, Any], first: Any) -> None:
    """The last measurement that passed is what is left, also if the run was lost in a later one."""
    gate = {"forget__max_kl": between(plain, 6), "forget__action": "rollback", **settings}
    directory = run.root / "run"
    if first is not None:
        assert run("run", 2, **gate, work=lost, arguments=first)[0] == ["lost"] * 2
        assert "step-000004" in steps_saved(directory)  # although only one is to be kept
    results, lines = run("run", 2, **gate)
    assert [result["status"] for result in results] == [0, 0]
    assert steps_saved(directory)[-1] == "step-000004"
    assert state_of(directory, 4)["forget"]["ended"]["step"] == 6
    wanted = adapter_at(plain[1], 4)
    exact = "sharding__engine" not in settings
    for result in results:
        assert same_bits(result["tensors"], results[0]["tensors"])
        if exact:
            assert same_bits(result["tensors"], wanted)
    assert same_bits(adapter_at(directory, 4), results[0]["tensors"])
    if first is None or not first[1]:  # else the line of step 6 was written by the commit
        assert lines[-1]["step"] == 6 and lines[-1]["stopped_by"] == "forget"
        assert lines[-1]["forget_back_to"] == 4
    card = (directory / "adapter" / "README.md").read_text()
    assert "| optimizer steps | 4 of 8 |" in card
    loss = next(line["loss"] for line in lines if line["step"] == 4)
    assert f"| loss of the last step | {loss:.4f} |" in card
    again, after = run("run", 2, **gate)
    assert again[0]["status"] == 0 and after == lines
    assert same_bits(again[0]["tensors"], results[0]["tensors"])
    assert (directory / "adapter" / "README.md").read_text() == card


def test_rollback_to_the_start(run: Runs, plain: Any) -> None:
    """An adapter that fails at its first measurement is left as it began: without an update."""
    gate = {"forget__max_kl": kl_at(plain, 2) / 2, "forget__action": "rollback"}
    results, lines = run("run", 1, **gate, output__save_every=0)
    assert results[0]["status"] == 0 and lines[-1]["forget_back_to"] == 0
    assert steps_saved(run.root / "run") == ["step-000000"]
    assert not any(t.any() for name, t in results[0]["tensors"].items() if "lora_B" in name)
    again, after = run("run", 1, **gate, output__save_every=0)
    assert again[0]["status"] == 0 and after == lines


@pytest.mark.parametrize(
    ("settings", "committed"),  # 4 s each
    [(EVERYWHERE, False), full(EVERYWHERE, True), full(ZERO3, False), full(ZERO3, True)],
)
def test_shrink(
    run: Runs,
    plain: Any,
    saved_models: Any,
    held: str,
    settings: dict[str, Any],
    committed: bool,
) -> None:
    """The written adapter passes, at the largest scale that does; the checkpoint is as trained."""
    limit = kl_at(plain, STEPS) / 3
    gate = {"forget__max_kl": limit, "forget__action": "shrink", "data__eval": held, **settings}
    arguments = (STEPS, committed)
    assert run("run", 2, **gate, work=lost, arguments=arguments)[0] == ["lost"] * 2
    [(result, said), _], lines = run("run", 2, **gate, work=told)
    directory, texts = run.root / "run", retained(held)
    assert result["status"] == 0 and "the scale of the adapter is lowered to" in said
    wanted = adapter_at(plain[1], STEPS)
    if settings is EVERYWHERE:
        assert same_bits(result["tensors"], wanted)
    found = of_adapter(saved_models("llama"), directory / "adapter", texts)
    assert found["forget_kl"] <= limit * (1 + 1e-6)
    share = json.loads((directory / "adapter/adapter_config.json").read_text())["lora_alpha"] / 8
    larger = peft.PeftModel.from_pretrained(
        whole(saved_models("llama")).double(), str(directory / "adapter")
    )
    for module in larger.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer((share + 2**-10) / share)
    base = whole(saved_models("llama"))
    assert measured(base, larger, texts)["forget_kl"] > limit
    if not committed:  # else the line of the last step was written by the commit
        assert lines[-1]["forget_scale"] == share
        assert lines[-1]["forget_kl_shrunk"] == pytest.approx(found["forget_kl"], rel=1e-4)
        assert state_of(directory, STEPS)["forget"]["scale"] == share
        assert lines[-1]["eval_loss_shrunk"] == pytest.approx(found["forget_nll"], rel=1e-4)
        assert f"{lines[-1]['eval_loss_shrunk']:.4f} after" in said
        card = (directory / "adapter" / "README.md").read_text()
        assert f"| scale | {share:g} of that in training (forget.action: shrink) |" in card
        assert f"| held-out loss at step {STEPS} | {lines[-1]['eval_loss_shrunk']:.4f} |" in card
        of_checkpoint = open_adapter(directory / "checkpoints" / f"step-{STEPS:06d}")
        assert of_checkpoint.config.lora_alpha == pytest.approx(8 * share)

    # The same command writes the same adapter again; a longer run goes on without the scale.
    files = [
        directory / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json")
    ]
    before = [file.read_bytes() for file in files]
    assert run("run", 2, **gate)[0][0]["status"] == 0
    assert [file.read_bytes() for file in files] == before


@pytest.mark.full  # 4 s
def test_a_longer_run_after_a_shrunk_one(run: Runs, plain: Any) -> None:
    gate = {"forget__max_kl": kl_at(plain, 2) / 2, "forget__action": "shrink", **EVERYWHERE}
    constant = {"optimizer__schedule": "constant", "output__save_every": 2}
    run("run", 2, **gate, **constant, train__max_steps=4)
    [(longer, said), _], _ = run("run", 2, **gate, **constant, train__max_steps=6, work=told)
    assert "goes on with the adapter's own scale" in said
    assert state_of(run.root / "run", 6)["forget"]["scale"] < 1
    [whole_run, _], _ = run("whole", 2, **gate, **constant, train__max_steps=6)
    assert same_bits(longer["tensors"], whole_run["tensors"])


# Texts of the base -------------------------------------------------------------------------------


def texts_in(path: Path) -> list[list[int]]:
    dataset = stored(path)
    assert dataset is not None
    return [example.input_ids.tolist() for example in dataset[:]]


def test_texts_that_the_base_samples(run: Runs, tmp_path: Path) -> None:
    """The same on any placement and after a resume; read again where they are."""
    own = {"forget__data": "self", "forget__texts": 5, "forget__text_tokens": 12}
    short = {"train__max_steps": 2, "output__save_every": 0, "optimizer__lr": 0.05} | own
    [(_, said), _], two = run("two", 2, **short, **EVERYWHERE, work=told)
    assert "the base has sampled 5 texts" in said
    [(_, said)], one = run("one", 1, **short, work=told)
    [made], [same] = ([*(run.root / d).glob("self-*.safetensors")] for d in ("one", "two"))
    assert made.name == same.name and texts_in(made) == texts_in(same)
    for got, wanted in zip(one, two, strict=True):
        here = {key: wanted[key] for key in KEYS if key in wanted}
        assert {key: got[key] for key in here} == pytest.approx(here, rel=1e-4, abs=1e-7)
    assert two[0]["forget_kl"] == 0 and two[-1]["forget_kl"] > 0
    [(_, said), _], again = run("two", 2, **short, **EVERYWHERE, work=told, output__resume="none")
    assert "sampled before; read from" in said and again == two
    cache = {"data__cache_dir": str(tmp_path / "cache")}
    run("cached", 2, **short, **EVERYWHERE, **cache)
    [cached] = (tmp_path / "cache").glob("self-*.safetensors")
    assert texts_in(cached) == texts_in(made) and not [*(run.root / "cached").glob("self-*")]

    # The base is best at its own texts: a limit of NLL.
    ratio = one[-1]["forget_nll"] / one[-1]["forget_base_nll"]
    assert ratio > 1.001
    _, stopped = run("stopped", 1, **short, forget__max_nll_ratio=(1 + ratio) / 2)
    assert stopped[-1]["stopped_by"] == "forget" and stopped[-1]["step"] == 2


# Refusals ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no evaluations": (
        {"output__eval_every": 0},
        "forget.data: ",
    ),
    "a limit of nothing": (
        {"forget__data": None, "output__eval_every": None, "forget__max_kl": 0.1},
        "forget.max_kl: 0.1 cannot act: forget.data is null",
    ),
    "an action without a limit": (
        {"forget__action": "shrink"},
        "forget.action: 'shrink' cannot act: neither forget.max_kl nor forget.max_nll_ratio is set",
    ),
    "texts of a file": (
        {"forget__texts": 9},
        "forget.texts: 9 cannot act: forget.data is not self",
    ),
    "another task": (
        {"train__task": "seq2seq"},
        "forget.data: train.task: seq2seq cannot be combined with it",
    ),
    "rollback of adalora": (
        {
            "adapter__method": "adalora",
            "adapter__r": None,
            "forget__max_kl": 0.1,
            "forget__action": "rollback",
        },
        "forget.action: rollback cannot be combined with adapter.method: adalora",
    ),
    "rollback with copies elsewhere": (
        {"output__remote": "memory://x", "forget__max_kl": 0.1, "forget__action": "rollback"},
        "forget.action: rollback cannot be combined with output.remote",
    ),
    "several adapters": (
        {"adapters": [{"name": "a"}, {"name": "b"}]},
        "forget.data: ",
    ),
}
SHRINKS = {"forget__max_kl": 0.1, "forget__action": "shrink"}
TOO_LONG = (
    {"forget__data": "self", "forget__text_tokens": 256},
    "forget.text_tokens: 256 tokens behind a first one, but the model has learned 256 positions",
)
UNSHRINKABLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"adapter__use_dora": True}, "dora scales the rows of W0 as well"),
    "mola": (STARTS["mola"], "mola has another scale for each token"),
    "a copy": (STARTS["a copied head"], "modules_to_save (lm_head) are trained whole"),
    "a packed residual": (
        {"model__quantization": "nf4", "adapter__init_lora_weights": "pissa"},
        "with init_lora_weights: pissa model.quantization: nf4 packs the residual",
    ),
}


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("case", [*REFUSED, *UNSHRINKABLE])
def test_what_cannot_be_is_refused_by_name(command: Any, tmp_path: Path, case: str) -> None:
    if case in UNSHRINKABLE:
        settings, says = UNSHRINKABLE[case]
        settings, says = SHRINKS | settings, f"forget.action: shrink cannot be done: {says}"
        words = command(tmp_path, "blocks", **settings)
    else:
        settings, says = REFUSED[case]
        words = command(tmp_path, **settings)
    assert says in refusal(preparation, words)


@pytest.mark.usefixtures("no_weights_are_read")
def test_texts_longer_than_the_base_knows_are_refused(command: Any, tmp_path: Path) -> None:
    settings, says = TOO_LONG
    assert says in refusal(preparation, command(tmp_path, "gpt2", **settings))
