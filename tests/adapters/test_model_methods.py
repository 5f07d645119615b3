"""The methods that a model gains by `attach`, beside those of PEFT and transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from ranks import Pools
from run_training import same_bits
from safetensors.torch import load_file
from tiny import whole
from torch import nn
from transformers import Trainer, TrainingArguments

from dlora import LoraConfig, UsageError, attach, disabled, quantize, save_adapter
from dlora import shard as shard_base
from dlora.lora.attach import trainable_parameters

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
FILES = ["adapter_config.json", "adapter_model.safetensors"]
IDS = torch.arange(12)[None]


def adapted(path: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = attach(whole(path), CONFIG)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def saved_twice(path: str, out: str, sharded: bool) -> None:
    """By each rank for itself, without the others."""
    rank = torch.distributed.get_rank()
    model = adapted(path)
    if sharded:
        shard_base(model, base="world")
    if rank == 1:
        model.save_pretrained(f"{out}/method", max_shard_size="1MB", state_dict=model.state_dict())
        save_adapter(model, f"{out}/function")


@pytest.mark.parametrize("sharded", [False, True])
def test_save_pretrained_writes_the_adapter_from_any_rank(
    pools: Pools, saved_models: Any, tmp_path: Path, sharded: bool
) -> None:
    path = saved_models("llama")
    pools(2).run(saved_twice, path, str(tmp_path), sharded)
    assert names(tmp_path / "method") == FILES
    for file in FILES:
        wanted = (tmp_path / "function" / file).read_bytes()
        assert (tmp_path / "method" / file).read_bytes() == wanted
    theirs = PeftModel.from_pretrained(whole(path), tmp_path / "method")
    with torch.no_grad():
        difference = theirs(IDS).logits - adapted(path)(IDS).logits
    assert difference.abs().max() < 1e-5


def test_a_trainer_saves_the_adapter(saved_models: Any, tmp_path: Path) -> None:
    """Trainer knows transformers' class only, and calls its method."""
    model = adapted(saved_models("llama"))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model, arguments).save_model(str(tmp_path / "out"))
    assert set(FILES) <= set(names(tmp_path / "out"))
    assert not {"model.safetensors", "config.json"} & set(names(tmp_path / "out"))


@pytest.mark.parametrize("argument", ["safe_serialization", "variant", "save_peft_format", "foo"])
def test_what_cannot_be_honoured_is_refused(
    saved_models: Any, tmp_path: Path, argument: str
) -> None:
    model = adapted(saved_models("llama"))
    with pytest.raises(UsageError, match=f"^save_pretrained: {argument}=0 cannot act"):
        model.save_pretrained(tmp_path / "out", **{argument: 0})
    model.save_pretrained(tmp_path / "out", is_main_process=False, safe_serialization=True)
    assert not (tmp_path / "out").exists()


PUSHED = """
import sys
from pathlib import Path
from test_model_methods import adapted
from tiny import whole
from dlora import UsageError, load_adapter, save_adapter

path, out = sys.argv[1:]
model = adapted(path)
assert model.push_to_hub("me/adapter", token="hf_none").commit_url.endswith("cafe")
model.save_pretrained(f"{out}/sent", push_to_hub=True, repo_id="me/second", token="hf_none")
save_adapter(load_adapter(whole(path), "me/adapter"), f"{out}/back")
try:
    load_adapter(whole(path), "me/none")
except UsageError as error:
    print(error)
"""


def test_an_adapter_goes_to_the_hub_and_comes_back(saved_models: Any, tmp_path: Path) -> None:
    path = saved_models("llama")
    with Hub(tmp_path / "hub").served() as hub:
        paths = os.pathsep.join(filter(None, sys.path))
        here = os.environ | hub.environment(tmp_path / "cache") | {"PYTHONPATH": paths}
        program = [sys.executable, "-c", PUSHED, path, str(tmp_path)]
        done = subprocess.run(program, env=here, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("load_adapter: me/none is no directory here, and cannot be had")
    assert names(hub.root / "models/me/adapter") == FILES
    for file in FILES:
        wanted = (tmp_path / "sent" / file).read_bytes()
        for name in ("adapter", "second"):
            assert (hub.root / "models/me" / name / file).read_bytes() == wanted
    assert (tmp_path / "back" / FILES[1]).read_bytes() == (
        tmp_path / "sent" / FILES[1]
    ).read_bytes()
    with pytest.raises(UsageError, match="^push_to_hub: me/adapter: "):  # nobody answers
        adapted(path).push_to_hub("me/adapter", token="hf_none")


def counted(path: str) -> str:
    """The line of a base that is divided over ranks."""
    import contextlib
    import io

    model = adapted(path)
    shard_base(model, base="world")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    return printed.getvalue()


def test_counts_are_pefts(
    pools: Pools, saved_models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_models("llama")
    config = PeftLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(whole(path), config).print_trainable_parameters()
    wanted = capsys.readouterr().out
    model = adapted(path)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == wanted
    packed = whole(path)
    quantize(packed, "int8")
    attach(packed, CONFIG)
    assert packed.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert pools(2).run(counted, path) == [wanted] * 2


def test_adapters_are_switched_off_and_on(saved_models: Any) -> None:
    """As transformers' methods do it for PEFT's layers."""
    path = saved_models("llama")
    model, base = adapted(path), whole(path)
    with torch.no_grad():
        on, off = model(IDS).logits, base(IDS).logits
        assert not torch.equal(on, off)
        model.disable_adapters()
        model.disable_adapters()
        assert torch.equal(model(IDS).logits, off)
        with disabled(model):
            assert torch.equal(model(IDS).logits, off)
        assert torch.equal(model(IDS).logits, off)
        model.enable_adapters()
        assert torch.equal(model(IDS).logits, on)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, off)
        assert torch.equal(model(IDS).logits, on)
    assert model.active_adapters() == ["default"]
    model.set_adapter("default")
    with pytest.raises(UsageError, match="^activate: the model has no adapters named 'other'"):
        model.set_adapter("other")


def test_tensors_have_the_keys_of_transformers(saved_models: Any, tmp_path: Path) -> None:
    path = saved_models("llama")
    model = adapted(path)
    model.save_pretrained(tmp_path)
    theirs = whole(path)
    theirs.load_adapter(tmp_path)
    assert same_bits(model.get_adapter_state_dict(), theirs.get_adapter_state_dict())
    stored = load_file(tmp_path / FILES[1])
    assert len(stored) == 8 and json.loads((tmp_path / FILES[0]).read_text())["r"] == 4
    other = adapted(path, seed=1)
    other.load_adapter(tmp_path)
    assert same_bits(trainable_parameters(other), trainable_parameters(model))


def test_the_class_keeps_its_name_and_the_model_its_kind(saved_models: Any) -> None:
    base = whole(saved_models("llama"))
    model = adapted(saved_models("llama"))
    assert isinstance(model, type(base)) and type(model).__name__ == type(base).__name__
    assert type(model).__module__ == type(base).__module__
    assert re.match("LlamaForCausalLM", repr(model))
    assert type(attach(whole(saved_models("llama")), CONFIG)) is type(model)
