"""Runs whose sequences share rows are those in which each has a row of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import refusals
from kill_trials import ADALORA
from run_training import Runs, check_near, told, train
from sampling import sampled
from tiny import command
from transformers import AutoModelForCausalLM, BloomConfig

from dlora.data import deal
from dlora.errors import UsageError

DROPS = {"adapter__lora_dropout": 0.1}
NF4 = {"model__quantization": "nf4", "model": "blocks"}
METHODS: dict[str, dict[str, Any]] = {
    "lora, dropout": DROPS,
    "dora, dropout": DROPS | {"adapter__use_dora": True},
    "adalora": ADALORA,
    "flora": {"adapter__method": "flora"},
    "pissa": {"adapter__init_lora_weights": "pissa"},
    "milora": {"adapter__init_lora_weights": "milora"},
    "lora_ga": {"adapter__init_lora_weights": "lora_ga", "adapter__target_modules": ["q_proj"]},
    "orthogonal": {"adapter__init_lora_weights": "orthogonal"},
    "rslora, lora+": {"adapter__use_rslora": True, "optimizer__loraplus_lr_ratio": 4},
    "nf4, dropout": DROPS | NF4,
    "nf4, pissa": NF4 | {"adapter__init_lora_weights": "pissa"},
    "windows, dropout": DROPS | {"model": "windows"},
    "learned positions, dropout": DROPS | {"model": "gpt2_dropout"},
    "longrope, dropout": DROPS | {"model": "longrope"},
    "experts, auxiliary loss": {"model": "mixtral_aux"},
}
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "fsdp2": (2, {"sharding__base": "world"}),
    "fsdp2, recomputed": (
        2,
        {"sharding__base": "world", "sharding__activation_checkpointing": True},
    ),
    "zero3": (2, {"sharding__engine": "zero3", "sharding__base": "world"}),
    "zero3, recomputed": (
        2,
        {
            "sharding__engine": "zero3",
            "sharding__base": "world",
            "sharding__activation_checkpointing": True,
        },
    ),
}
SAMPLE = [
    ("lora, dropout", "fsdp2, recomputed"),
    ("dora, dropout", "zero3"),
    ("adalora", "fsdp2"),
    ("windows, dropout", "zero3, recomputed"),
    ("nf4, dropout", "alone"),
]


@pytest.mark.parametrize(
    ("method", "place"), sampled(SAMPLE, [(m, p) for m in METHODS for p in PLACES])
)
def test_twenty_steps_end_where_they_end_unpacked(run: Runs, method: str, place: str) -> None:
    """The same groups of sequences, padded on one rank: an auxiliary loss depends on them."""
    world, where = PLACES[place]
    settings = METHODS[method] | {"train__global_batch_size": 8}
    padded = run("padded", 1, **settings, data__packing=False, train__micro_batch_size=4)
    size = {"train__micro_batch_size": 4 // world if "aux" not in method else 4}
    packed = run("packed", world, **settings, **where, data__packing=True, **size)
    if "aux" in method and world > 1:
        padded = run("two", 2, **settings, **where, data__packing=False, **size)
    check_near(packed, padded)
    if "kept_ranks" in padded[1][0]:
        assert [line["kept_ranks"] for line in packed[1]] == [
            line["kept_ranks"] for line in padded[1]
        ]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_the_counted_share(run: Runs, packing: bool, world: int) -> None:
    settings = {"data__packing": packing, "train__max_steps": 2}
    [(steps, lengths), *_], lines = run("run", world, work=_with_data, **settings)
    for line, ids in zip(lines, steps, strict=True):
        places = 0
        for micros in deal(ids, lengths, world, 2):
            for micro in micros:
                sizes = [-(-lengths[i] // 8) * 8 for i in micro]
                together = -(-sum(lengths[i] for i in micro) // 8) * 8
                padded = len(micro) * max(sizes, default=0)
                places += (together if packing else padded) or 8
        assert line["padding"] == pytest.approx(1 - line["all_tokens"] / places, rel=1e-9)


def _with_data(argv: list[str]) -> Any:
    """(sequences of each step, tokens of each sequence) of a run."""
    runs: list[Any] = []
    train(argv, runs.append)
    prepared = runs[0].prepared
    steps = [prepared.sampler.step(t) for t in range(prepared.sampler.total_steps)]
    return steps, [int(n) for n in prepared.train.lengths]


# -- what does not pack ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory, saved_models: Any) -> Path:
    directory = tmp_path_factory.mktemp("bloom")
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = Path(saved_models("llama")) / name
        if source.exists():
            (directory / name).write_bytes(source.read_bytes())
    return directory


@pytest.mark.usefixtures("no_weights_are_read")
def test_a_model_that_cannot_is_refused_by_name(bloom: Path, tmp_path: Path) -> None:
    argv = command(bloom, tmp_path, data__packing=True)
    message = r"^data.packing: BloomForCausalLM \(bloom\) is not among the architectures that pack"
    with pytest.raises(UsageError, match=message):
        refusals.preparation(argv, check=True)


def test_auto_says_why_not(run: Runs, bloom: Path) -> None:
    settings = {"model__path": str(bloom), "train__max_steps": 1}
    [(_, printed)], _ = run("auto", 1, work=told, **settings)
    assert "\ndata.packing: off: BloomForCausalLM (bloom) is not among the archi" in f"\n{printed}"
    [(_, printed)], _ = run("off", 1, work=told, **settings, data__packing=False)
    assert "data.packing" not in printed
    [(_, printed)], _ = run("llama", 1, work=told, train__max_steps=1)
    assert "data.packing" not in printed


@pytest.mark.usefixtures("no_weights_are_read")
def test_layers_of_another_kind_are_refused(saved_models: Any, tmp_path: Path) -> None:
    """A type that packs, with layers that do not."""
    directory = tmp_path / "base"
    directory.mkdir()
    for file in Path(saved_models("windows")).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = directory / "config.json"
    text = config.read_text()
    assert '"sliding_attention"' in text
    config.write_text(text.replace('"sliding_attention"', '"linear_attention"', 1))
    with pytest.raises(UsageError, match="linear_attention"):
        refusals.preparation(command(directory, tmp_path, data__packing=True), check=True)


@pytest.mark.usefixtures("no_weights_are_read")
def test_a_task_that_cannot_is_refused(saved_models: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    settings = {"train__task": "classification", "data__train": str(texts)}
    argv = command(saved_models("llama"), tmp_path, data__packing=True, **settings)
    with pytest.raises(UsageError, match="^data.packing: train.task: classification"):
        refusals.preparation(argv, check=True)
    argv = command(saved_models("llama"), tmp_path, **settings)
    assert not refusals.preparation(argv, check=True).dealing.packs
