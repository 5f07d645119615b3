"""The moving average of A and B beside torch's own, on several ranks, however state is divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from own_loops import batches, place
from ranks import Pools
from run_training import relative_error, same_bits
from tiny import whole
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dlora import LoraConfig, UsageError, attach, ema, load_adapter, save_adapter, shard
from dlora.lora.attach import trainable_parameters

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
DECAY, STEPS, LR = 0.7, 5, 1e-2


def averaged(path: str, divided: bool, out: str) -> dict[str, Any]:
    """A few steps with an average; what a rank saves of it."""
    torch.manual_seed(0)
    model = attach(whole(path), CONFIG)
    replica = shard(model, base="world", optimizer_state="divided" if divided else "replicated")
    optimizer = replica.attach_optimizer(torch.optim.AdamW(replica.parameter_groups(lr=LR)))
    average = ema(replica, DECAY)
    for ids in batches(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        replica.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    before = {name: p.detach().clone() for name, p in replica.named.items()}
    with average.applied():
        replica.audit()
        save_adapter(model, Path(out) / f"rank-{place()[0]}")
    assert same_bits({n: p.detach() for n, p in replica.named.items()}, before)
    return dict(average.state_dict())


def reference(path: str) -> dict[str, Tensor]:
    """torch's average of a plain module, in one process, of the same rows."""
    torch.manual_seed(0)
    model = attach(whole(path), CONFIG)
    trained = trainable_parameters(model)
    holder = torch.nn.ParameterList(trained.values())
    theirs = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs.update_parameters(holder)  # its first update copies
    optimizer = torch.optim.AdamW(holder, lr=LR, weight_decay=0.0)
    for ids in batches(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update_parameters(holder)
    return dict(zip(trained, (p.detach() for p in theirs.module), strict=True))


@pytest.mark.parametrize("divided", [False, True])
def test_the_average_is_torchs_on_every_rank(
    pools: Pools, saved_models: Any, tmp_path: Path, divided: bool
) -> None:
    path = saved_models("llama")
    results = pools(2).run(averaged, path, divided, str(tmp_path))
    wanted = reference(path)
    assert same_bits(results[0], results[1])
    for name, tensor in wanted.items():
        assert results[0][name].dtype == torch.float32
        assert relative_error(results[0][name], tensor) < 1e-5, name
    for rank in range(2):
        loaded = trainable_parameters(load_adapter(whole(path), tmp_path / f"rank-{rank}"))
        assert same_bits({n: p.detach() for n, p in loaded.items()}, results[0])


def test_it_is_resumed_and_misuse_is_refused(saved_models: Any) -> None:
    model = attach(whole(saved_models("llama")), CONFIG)
    replica = shard(model)
    average, other = ema(replica, 0.5), ema(replica, 0.5)
    with torch.no_grad():
        replica.values.add_(1)
    average.update()
    state = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    other.load_state_dict(state)
    assert same_bits(other.state_dict(), state)
    with pytest.raises(UsageError, match="^ema: this state is of adapters with other names"):
        other.load_state_dict({})
    with average.applied():
        for call in (average.update, average.state_dict, average.applied().__enter__):
            with pytest.raises(UsageError, match="^ema: "):
                call()
    with pytest.raises(UsageError, match=r"^decay: expected a number in \[0, 1\), got 1.0"):
        ema(replica, 1.0)
    with pytest.raises(UsageError, match="^ema: there is nothing to average"):
        ema(shard(torch.nn.Linear(2, 2)), 0.9)
    index = torch.tensor([0])
    name = next(iter(replica.named))
    replica.resize({name: (0, index)})
    with pytest.raises(UsageError, match="^ema: .* was resized from"):
        average.update()
