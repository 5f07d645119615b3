"""`state_dict()` of a model whose A and B are views of the replica's flat tensor."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ranks import Pools
from run_training import same_bits
from safetensors.torch import load_file, load_model, save_model
from tiny import whole
from torch import Tensor, nn

from dlora import LoraConfig, attach, shard
from dlora.lora.attach import trainable_parameters

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])


def sharded(path: str, seed: int) -> Any:
    """A replica with other values for each seed; A, B and the trained head: 9 tensors."""
    torch.manual_seed(seed)
    model = attach(whole(path), CONFIG)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter)
    shard(model, base="none")
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def test_savers_of_safetensors_keep_every_tensor(saved_models: Any, tmp_path: Path) -> None:
    path = saved_models("llama")
    model, other = sharded(path, 0), sharded(path, 1)
    save_model(model, str(tmp_path / "model.safetensors"))
    stored = load_file(tmp_path / "model.safetensors")
    wanted = trained(model)
    assert same_bits({name: stored[name] for name in wanted}, wanted)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert same_bits(trained(other), wanted)
    assert other.state_dict().keys() == model.state_dict().keys()


def accelerated(path: str, directory: str) -> dict[str, Any]:
    """Saved by accelerate, changed by a step, loaded again."""
    model = sharded(path, 0)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    before = trained(model)
    accelerator.save_state(directory)
    accelerator.wait_for_everyone()
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1)
    accelerator.load_state(directory)
    return {"before": before, "after": trained(model), "trained": len(before)}


def test_accelerate_saves_and_loads(pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    for result in pools(2).run(accelerated, saved_models("llama"), str(tmp_path / "state")):
        assert result["trained"] == 9
        assert same_bits(result["after"], result["before"])


def test_a_loaded_state_is_what_is_trained(saved_models: Any) -> None:
    """With `assign=True` as well: the optimizer steps the tensors that the model computes with."""
    model, other = sharded(saved_models("llama"), 0), sharded(saved_models("llama"), 1)
    replica = other.dlora_replica
    optimizer = torch.optim.SGD(replica.parameter_groups(lr=0.1), lr=0.1)
    state = copy.deepcopy(model.state_dict())
    other.load_state_dict(state, assign=True)
    assert same_bits(trained(other), trained(model))
    ids = torch.arange(12)[None]
    other(input_ids=ids, labels=ids).loss.backward()
    replica.reduce_gradients()
    optimizer.step()
    changed = trained(other)
    assert all(not torch.equal(changed[name], value) for name, value in trained(model).items())


def test_a_state_dict_shows_the_adapter_itself(saved_models: Any) -> None:
    """As torch's does: what is written into it is the adapter's."""
    model = sharded(saved_models("llama"), 0)
    shown, kept = model.state_dict(), model.state_dict(keep_vars=True)
    for name, parameter in trainable_parameters(model).items():
        assert kept[name] is parameter
        shown[name].fill_(2.0)
        assert bool((parameter == 2).all()), name
        assert shown[name].untyped_storage().nbytes() == parameter.nbytes
