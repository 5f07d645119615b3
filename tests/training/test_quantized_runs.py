"""Training runs on a packed base: results, bytes on the wire and at rest, saves, refusals."""

import contextlib
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_runs import check_last_step, check_sent, counted, last_step
from peft import PeftModel
from refusals import preparation, refusal
from run_training import Runs, check_near, prepared_run
from sampling import full
from tiny import whole

from dlora.checkpoint.format import read
from dlora.export.command import main as export
from dlora.io.safetensors import stored_tensors

STEPS = 3


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, train__max_steps=STEPS)


@pytest.mark.parametrize(
    ("model", "name", "engine", "base", "world", "per_node"),
    [
        ("blocks", "nf4", "fsdp2", "world", 3, 3),
        ("ragged", "nf4-dq", "fsdp2", "node", 4, 2),
        # 3 s each: every format and engine is in the others
        full("tied_blocks", "int8", "fsdp2", "none", 2, 2),
        full("blocks", "nf4-dq", "zero3", "world", 3, 3),
        ("gpt2_blocks", "int8", "zero3", "node", 4, 2),
        # 3 to 7 s each: the same formats on fewer ranks
        full("blocks", "nf4", "fsdp2", "world", 2, 2),
        full("blocks", "nf4", "zero3", "world", 2, 2),
    ],
)
def test_training_is_that_of_one_process(
    run: Runs, model: str, name: str, engine: str, base: str, world: int, per_node: int
) -> None:
    packed = {"model__quantization": name}
    where = {"sharding__engine": engine, "sharding__base": base}
    one = run("one", 1, model, **packed)
    check_near(run("run", world, model, per_node=per_node, **packed, **where), one)


# -- what they send --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "base", "world", "per_node", "accumulation"),
    [
        # 2 s: the same format as on 4 ranks below
        full("blocks", "nf4", "world", 2, 2, 1),
        ("blocks", "nf4-dq", "world", 3, 3, 2),
        full("tied_blocks", "int8", "world", 3, 3, 1),
        ("gpt2_blocks", "nf4", "node", 4, 2, 1),
        full("ragged", "nf4", "world", 2, 2, 2),
    ],
)
def test_what_is_sent_is_packed_and_planned(
    run: Runs, model: str, name: str, base: str, world: int, per_node: int, accumulation: int
) -> None:
    """Collectives, sockets and what stays between steps are what the plan says, of packed bytes."""
    settings = {
        "model__quantization": name,
        "sharding__base": base,
        "train__micro_batch_size": 1,
        "train__global_batch_size": world * accumulation,
    }
    results, _ = run("run", world, model, work=counted, per_node=per_node, **settings)
    for result in results:
        planned = STEPS * (result["gathers"] + result["reduction"]) + 8 * (world - 1)
        check_sent(result, planned, rounding=STEPS)


@pytest.mark.parametrize(
    ("model", "name", "base", "world", "per_node", "recomputed"),
    [
        # 3 s: packed alike as on 3 ranks, with nothing recomputed as on 4
        full("blocks", "nf4", "world", 2, 2, False),
        ("blocks", "nf4-dq", "world", 3, 3, True),
        full("gpt2_blocks", "int8", "node", 4, 2, False),
    ],
)
def test_zero3_sends_what_is_packed_and_planned(
    run: Runs, model: str, name: str, base: str, world: int, per_node: int, recomputed: bool
) -> None:
    settings = {
        "model__quantization": name,
        "sharding__engine": "zero3",
        "sharding__base": base,
        "sharding__activation_checkpointing": recomputed,
        "train__max_steps": 4,
        "train__micro_batch_size": 1,
        "train__global_batch_size": world,
    }
    for result in run("run", world, model, work=last_step, per_node=per_node, **settings)[0]:
        check_last_step(result, rounding=1)


def test_four_bits_and_a_quarter_at_rest_and_on_the_wire(run: Runs, saved_models: Any) -> None:
    """Against the same run in bfloat16, over what is not packed."""
    sent, held = {}, {}
    for name in ("none", "nf4"):
        where = {"sharding__base": "world", "model__quantization": name, "model__dtype": "bfloat16"}
        [result, _], _ = run(name, 2, "blocks", work=counted, **where)
        sent[name], held[name] = result["gathers"], result["holds"][0]
    model = whole(saved_models("blocks"), "bfloat16")
    packed = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n)
    padding = 2 * model.config.hidden_size  # embedding and head have an odd number of rows
    assert held["none"] == (2 * packed + 2 * rest) / 2 + padding
    assert held["nf4"] == (packed * 4.25 / 8 + 2 * rest) / 2 + padding
    assert held["nf4"] - padding - rest <= 0.54 * packed / 2
    # Blocks are gathered for forward and for backward, but for the last, which waits in between; a
    # step of 7 sequences has 2 micro-batches.
    blocks = model.config.num_hidden_layers
    passes = 2 * (2 - 1 / blocks)
    assert sent["none"] - sent["nf4"] == passes * packed * (2 - 4.25 / 8) / 2


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        full("fsdp2", {"sharding__memory_budget_gb": 4}),  # 4 s; the others have each
        ("zero3", {"sharding__memory_budget_gb": 4}),
        ("zero3", {"sharding__cpu_offload": True}),
        ("fsdp2", {"sharding__optimizer_state": "divided"}),
    ],
)
def test_other_settings_of_a_placement_change_nothing(
    run: Runs, engine: str, more: dict[str, Any]
) -> None:
    """Packed layers that stay gathered, or lie in host memory; a divided optimizer state."""
    where = {"sharding__engine": engine, "sharding__base": "world", "model__quantization": "nf4"}
    _, bare = run("bare", 2, "blocks", **where)
    _, lines = run("run", 2, "blocks", **where, **more)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in bare])
    if "sharding__memory_budget_gb" in more:  # from the third step on nothing of W0 is sent
        assert lines[2]["wire_bytes"] < 0.5 * bare[2]["wire_bytes"]


# -- what is saved, and what is refused ------------------------------------------------------------


def test_a_checkpoint_holds_no_base_and_goes_on_elsewhere(
    run: Runs, command: Any, tmp_path: Path
) -> None:
    """Saved under FSDP2 on 2 ranks, resumed under ZeRO-3 on 3, as if nothing had happened."""
    packed = {"model": "blocks", "model__quantization": "nf4", "sharding__base": "world"}
    one = run("one", 1, **packed, train__max_steps=4)
    run("run", 2, **packed, train__max_steps=2, output__save_every=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert all(".adapter.lora_" in name for name in read(checkpoint).tensors)
    keys = [key for file in checkpoint.glob("*.safetensors") for key in stored_tensors(file)]
    assert not any("codes" in key or "scales" in key for key in keys)
    _, lines = run("run", 3, **packed, train__max_steps=4, sharding__engine="zero3")
    for got, expected in zip(lines, one[1], strict=True):
        assert got["step"] == expected["step"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    other = command(tmp_path / "run", **packed | {"model__quantization": "int8"})
    assert "model.quantization was 'nf4' and is 'int8'" in refusal(preparation, other)


def announced(argv: list[str]) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        prepared_run(argv)
    return [line for line in printed.getvalue().splitlines() if "quantization" in line]


def test_a_run_says_what_is_packed_and_what_is_not(run: Runs) -> None:
    [[first], *others], _ = run("run", 2, "ragged", work=announced, model__quantization="nf4")
    assert first.startswith("model.quantization: nf4: 12 linear layers are packed, 0.2 M weights")
    assert "not packed: model.layers.0.mlp.down_proj and 1 more (its rows have 200 weights" in first
    assert others == [[]]


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        ("llama", {}, "model.quantization: nf4 cannot act on any linear layer: model.layers.0."
                      "self_attn.q_proj: its rows have 40 weights, not a multiple of"),
        ("blocks", {"adapter__modules_to_save": ["up_proj"]},
         "adapter.modules_to_save: the weight of model.layers.0.mlp.up_proj is packed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_are_read(
    command: Any, tmp_path: Path, model: str, settings: Any, told: str
) -> None:
    argv = command(tmp_path, model, model__quantization="nf4", **settings)
    assert refusal(preparation, argv).startswith(told)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_base_that_is_quantized_in_its_files_is_refused(
    command: Any, saved_models: Any, tmp_path: Path, engine: str
) -> None:
    model = Path(shutil.copytree(saved_models("blocks"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    settings = {"model__quantization": "nf4", "sharding__engine": engine}
    argv = command(tmp_path / "run", model__path=str(model), **settings)
    said = refusal(preparation, argv)
    assert said.startswith("model.quantization: nf4 needs a floating-point base, but ")
    assert said.endswith("is already quantized; set model.quantization: none")


@pytest.mark.parametrize("source", ["adapter", "checkpoints/step-000003"])
def test_export_merges_into_the_weights_of_the_files(
    run: Runs, saved_models: Any, tmp_path: Path, source: str
) -> None:
    """Not into what the packed weights stand for: as PEFT, given the base in 16 bit or more."""
    run("run", 1, "blocks", model__quantization="nf4", output__save_every=STEPS)
    to = tmp_path / "merged"
    assert export(["--adapter", str(tmp_path / "run" / source), "--to", str(to), "--merge"]) == 0
    merged = dict(whole(to).named_parameters())
    peft = PeftModel.from_pretrained(
        whole(saved_models("blocks")), str(tmp_path / "run" / "adapter")
    )
    wanted = dict(peft.merge_and_unload().named_parameters())
    assert merged.keys() == wanted.keys()
    for name, parameter in wanted.items():
        torch.testing.assert_close(merged[name], parameter)
