"""Adapted models that are pickled, copied and cast."""

import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from run_training import same_bits
from tiny import whole
from torch import Tensor, nn

from dlora import AdaLoraConfig, LoraConfig, UsageError, attach, quantize, shard
from dlora.lora.attach import trainable_parameters

IDS = torch.arange(24).view(2, 12)
CONFIGS: dict[str, LoraConfig] = {
    "lora": LoraConfig(r=4, lora_dropout=0.1, modules_to_save=["lm_head"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=5),
    "parameters": LoraConfig(
        r=2, target_modules=["embed_tokens"], target_parameters=["mlp.experts.down_proj"]
    ),
}


def adapted(path: Any, case: str) -> Any:
    torch.manual_seed(0)
    model = attach(whole(path("mixtral" if case == "parameters" else "llama")), CONFIGS[case])
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def trained_step(model: Any) -> dict[str, Tensor]:
    """The gradients of one pass, and its logits."""
    out = model.eval()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    found = {name: p.grad for name, p in trainable_parameters(model).items()}
    return found | {"logits": out.logits.detach()}


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_copy_computes_the_same_and_is_independent(
    saved_models: Any, case: str, way: str
) -> None:
    model = adapted(saved_models, case)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model)
    wanted = trained_step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same_bits(trained_step(copied), wanted)
    assert copied.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@pytest.mark.parametrize("config", [CONFIGS["lora"], LoraConfig(r=4, target_modules=["q_proj"])])
def test_a_packed_base_is_copied(saved_models: Any, config: LoraConfig) -> None:
    """Its layers' classes are made at run time, with adapters and without."""
    model = whole(saved_models("llama"))
    quantize(model, "int8")
    attach(model, config)
    wanted = trained_step(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in copied.parameters():
            parameter.grad = None
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert same_bits(trained_step(copied), wanted)


def in_another_process(model: Any, file: str) -> None:
    torch.save(trained_step(model), file)


def test_a_model_goes_to_a_spawned_process(saved_models: Any, tmp_path: Path) -> None:
    model = adapted(saved_models, "lora")
    file = str(tmp_path / "out.pt")
    process = multiprocessing.get_context("spawn").Process(
        target=in_another_process, args=(model, file)
    )
    process.start()
    process.join(240)
    assert process.exitcode == 0
    for name, tensor in trained_step(model).items():
        torch.testing.assert_close(torch.load(file)[name], tensor, msg=name)


def sharded_copies(path: str, base: str) -> list[str]:
    """What copying says of a model, and of its layers."""
    model = attach(whole(path), CONFIGS["lora"])
    shard(model, base=base)
    said = []
    for call in (copy.deepcopy, pickle.dumps):
        try:
            call(model)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.parametrize("base", ["none", "world"])
def test_a_sharded_model_is_not_copied(pools: Pools, saved_models: Any, base: str) -> None:
    for said in pools(2).run(sharded_copies, saved_models("llama"), base):
        assert len(said) == 2 and not any("\n" in line for line in said)
        assert "FSDP does not support deepcopy" in said[0] or "is sharded, so it cannot" in said[0]
        assert said[1].startswith("UsageError: ") and "is sharded, so it cannot be pic" in said[1]


@pytest.mark.parametrize("cast", ["to", "half", "double", "inner"])
def test_a_cast_after_shard_is_refused_at_once(saved_models: Any, cast: str) -> None:
    """Nothing is cast then, and what only moves is allowed."""
    model = attach(whole(saved_models("llama")), CONFIGS["lora"])
    shard(model)
    call = {
        "to": lambda: model.to(torch.bfloat16),
        "half": model.half,
        "double": model.double,
        "inner": lambda: model.model.layers[0].self_attn.q_proj.adapter.to(torch.float16),
    }[cast]
    with pytest.raises(UsageError, match="^the adapters are the replica's, in float32, and cannot"):
        call()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.to("cpu").to(torch.float32)


def test_before_shard_a_model_is_cast(saved_models: Any) -> None:
    model = attach(whole(saved_models("llama")), CONFIGS["lora"]).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
