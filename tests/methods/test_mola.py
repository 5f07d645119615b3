"""Runs of a mixture of experts: what one process computes, whatever the ranks; resumed exactly."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_json
from refusals import preparation, refusal
from run_training import Runs, check_near, prepared_run, same_bits
from safetensors import safe_open
from safetensors.torch import load_file
from sampling import full
from stopped_runs import crashed
from tiny import whole as loaded

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.export.command import main as export
from dlora.lora.attach import named_adapters
from dlora.plan.measured import measure, stored

MOLA = {
    "adapter__method": "mola",
    "adapter__experts": 4,
    "adapter__r": 2,
    "adapter__balance_coef": 0.1,
    "train__max_steps": 6,
}


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, **MOLA)


def losses(run: Any) -> list[float]:
    return [line["aux_loss"] for line in run[1]]


def check_one_process(run: Any, one: Any) -> None:
    """Within the bounds of invariant 3, the balance loss of the global batch too."""
    check_near(run, one)
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


def compared(argv: list[str]) -> dict[str, Any]:
    """A run to its end, with what it measured beside what its plan says."""
    run = prepared_run(argv)
    status = run.train()
    run.checkpoints.close()
    now = stored(run.model, run.replica, run.optimizer)
    found = measure(run.replica, run.records, now)
    tensors = {name: p.detach().clone() for name, p in run.replica.named.items()}
    plan = run.context.residents.plan
    sent = plan.traffic.gathers.rank + plan.traffic.reduction.rank
    own = [run.replica.method.working_bytes, plan.memory.replica, found.replica]
    return {"status": status, "tensors": tensors, "sent": (sent, found.wire), "own": own}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_runs_are_those_of_one_process_and_of_one_micro_batch(run: Runs, tmp_path: Path) -> None:
    """Both engines, padded and packed rows, recomputed blocks, offloaded and divided state."""
    one = run("one", 1, train__micro_batch_size=7)
    assert losses(one)[0] > 2  # of k = 2; uneven, as routers start at random
    assert max(losses(one)) - min(losses(one)) > 1e-3
    check_one_process(run("accumulated", 1, train__micro_batch_size=1), one)
    fsdp2 = run("fsdp2", 2, sharding__base="world", work=compared)
    check_one_process(fsdp2, one)
    for result in fsdp2[0]:
        assert result["sent"][1] == pytest.approx(result["sent"][0], rel=0.02)
        working, planned, measured = result["own"]
        assert working and measured == pytest.approx(planned, rel=0.01)
    others: dict[str, Any] = {"sharding__engine": "zero3", "sharding__base": "world"}
    recomputed = {"sharding__activation_checkpointing": True, "data__packing": True}
    check_one_process(run("zero3", 2, **others, **recomputed), one)
    check_one_process(run("divided", 2, sharding__optimizer_state="divided"), one)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("fsdp2", {"model__quantization": "nf4", "data__packing": True}),
        full("zero3", {"model__quantization": "int8"}),
        full("zero3", {"data__packing": True}),
        full("fsdp2", {"sharding__memory_budget_gb": 2}),
    ],
)
def test_packed_bases_and_packed_rows_on_three_ranks(
    run: Runs, saved_models: Any, engine: str, settings: dict[str, Any]
) -> None:
    settings = settings | {"model__path": saved_models("blocks"), "train__max_steps": 4}
    one = run("one", 1, **settings)
    check_one_process(run("three", 3, sharding__engine=engine, **settings), one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_dies_is_resumed_exactly(run: Runs, tmp_path: Path) -> None:
    """The mean gates of the last steps as well, which the adapter has beside its routers."""
    more = {"output__save_every": 2, "train__max_steps": 5, "adapter__lora_dropout": 0.1}
    whole = run("whole", 2, **more)
    assert run("broken", 2, work=crashed, arguments=(4,), **more)[0] == ["crashed"] * 2
    again = run("broken", 2, **more)
    assert all(same_bits(r["tensors"], whole[0][0]["tensors"]) for r in again[0])
    assert again[1] == whole[1]
    last = max((tmp_path / "whole/checkpoints").glob("step-*"))
    assert export(["--adapter", str(last), "--to", str(tmp_path / "exported")]) == 0
    files = [path.name for path in (tmp_path / "whole/adapter").rglob("*.safetensors")]
    assert len(files) == 5
    for directory in ("broken/adapter", "exported"):
        for path in (tmp_path / "whole/adapter").rglob("*.safetensors"):
            name = path.relative_to(tmp_path / "whole/adapter")
            assert (tmp_path / directory / name).read_bytes() == path.read_bytes(), name
    with safe_open(tmp_path / "whole/adapter/router.safetensors", "pt") as routers:
        gates = [
            routers.get_tensor(key) for key in routers.offset_keys() if key.endswith("mean_gates")
        ]
    assert len(gates) == 14
    assert all(float(mean.sum()) == pytest.approx(1, abs=1e-5) for mean in gates)
    assert max(float(mean.max() - mean.min()) for mean in gates) > 0.05  # they were measured


# -- routers alone, over frozen experts -----------------------------------------------------------


@pytest.fixture(scope="module")
def experts(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Plain LoRAs of different r and scale."""
    root, found = tmp_path_factory.mktemp("experts"), []
    for seed, r in enumerate((2, 3, 1)):
        model = loaded(saved_models("llama"))
        torch.manual_seed(seed)
        attach(model, LoraConfig(r=r, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for _, _, adapter in named_adapters(model):
                adapter.lora_B.normal_(0, 0.3)
        save_adapter(model, root / str(seed))
        found.append(str(root / str(seed)))
    return found


FROZEN: dict[str, Any] = {"adapter__r": None, "adapter__lora_alpha": None, "adapter__experts": None}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_routers_over_frozen_experts(run: Runs, experts: list[str], tmp_path: Path) -> None:
    """They alone are trained and reduced; a resumed run needs the experts' files no more."""
    copies = [str(tmp_path / f"copy-{i}") for i in range(len(experts))]
    for there, copy in zip(experts, copies, strict=True):
        shutil.copytree(there, copy)
    settings = FROZEN | {"adapter__experts_from": copies, "output__save_every": 2}
    one = run("one", 1, **settings)
    settings["sharding__base"] = "world"
    two = run("two", 2, work=compared, **settings)
    check_one_process(two, one)
    assert {name.rpartition(".")[2] for name in one[0][0]["tensors"]} == {"lora_router"}
    for result in two[0]:
        assert result["sent"][1] == pytest.approx(result["sent"][0], rel=0.02)
    for place, there in enumerate(experts):
        written = load_file(tmp_path / f"two/adapter/experts/{place}/adapter_model.safetensors")
        assert same_bits(written, load_file(Path(there) / "adapter_model.safetensors"))
    assert run("broken", 2, work=crashed, arguments=(3,), **settings)[0] == ["crashed"] * 2
    for copy in copies:
        shutil.rmtree(copy)
    again = run("broken", 2, **settings)
    assert same_bits(again[0][0]["tensors"], run_tensors(two))
    assert again[1] == two[1]
    model = load_adapter(loaded(experts_base(tmp_path / "two")), tmp_path / "two/adapter")
    assert len(list(named_adapters(model))) == 4


def run_tensors(run: Any) -> dict[str, torch.Tensor]:
    return run[0][0]["tensors"]


def experts_base(directory: Path) -> str:
    settings = json.loads((directory / "adapter/experts/0/adapter_config.json").read_text())
    return settings["base_model_name_or_path"]


# -- what does not go together --------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_before_weights_are_read(
    words: Any, saved_models: Any, experts: list[str], tmp_path: Path, no_weights_are_read: None
) -> None:
    def said(**settings: Any) -> str:
        return refusal(preparation, words(tmp_path / "run", **(MOLA | settings)))

    for settings, begins in (
        ({"adapter__top_k": 9}, "adapter.top_k: 9 is more than the 4 experts"),
        ({"train__compile": True}, "train.compile: true cannot be combined with adapter.method"),
        ({"optimizer__name": "lora_pro"}, "adapter.method: mola cannot be combined with optimizer"),
        (
            {"adapters": [{"name": "a"}, {"name": "b"}]},
            "adapter.method: mola trains one adapter at a time",
        ),
        ({"adapter__use_dora": True}, "adapter.use_dora: DoRA needs adapter.method: lora"),
        ({"train__task": "classification"}, "train.task: classification cannot be combined"),
        ({"adapter__modules_to_save": ["norm"]}, "adapter.modules_to_save: "),
        ({"adapter__init_lora_weights": "pissa"}, "adapter.init_lora_weights: "),
        ({"adapter__target_modules": ["embed_tokens"]}, "adapter.target_modules: model.embed"),
        ({"adapter__path": experts[0]}, "adapter.path: mola cannot start from an adapter"),
        (
            FROZEN | {"adapter__experts_from": experts[:2], "adapter__experts": 4},
            "adapter.experts: 4, but experts_from names 2",
        ),
        ({"adapter__method": "lora", "adapter__r": 2}, "adapter.experts: 4 cannot act"),
        (
            FROZEN | {"adapter__experts_from": experts, "adapter__r": 3},
            "adapter.r: 3 cannot act: the experts at adapter.experts_from set it",
        ),
        (
            FROZEN | {"adapter__experts_from": ["nowhere"], "adapter__top_k": 1},
            "nowhere/adapter_config.json: file not found",
        ),
        (
            FROZEN | {"adapter__experts_from": experts, "model__path": saved_models("gpt2")},
            "adapter.target_modules: ",
        ),
    ):
        assert said(**settings).startswith(begins), (settings, said(**settings))
    config = tmp_path / "moe"
    shutil.copytree(saved_models("mixtral"), config)
    edit_json(config / "config.json", output_router_logits=True)
    asked = said(model__path=str(config))
    assert asked.startswith(
        "adapter.method: mola has an aux_loss of its routers, and the base asks"
    )
    words_of_auto = words(tmp_path / "run", **MOLA)
    assert preparation(words_of_auto).compiles is False
