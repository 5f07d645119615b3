"""Loops of one's own on bases that dlora, or the user, sharded; in the workers of `ranks.py`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from tiny import VOCABULARY, whole
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, attach, shard

ROWS = 4


def place() -> tuple[int, int]:
    """(this rank, the number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sharded_by_user(path: str) -> Any:
    """Blocks and root by torch's own call."""
    model = whole(path)
    if dist.is_initialized():
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def sharded_by_transformers(path: str) -> Any:
    """Shards while it reads."""
    if not dist.is_initialized():
        return whole(path)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config={"fsdp_size": dist.get_world_size()}
    )


def partitioned_by_user(path: str) -> Any:
    """`deepspeed.zero.Init` around the model, and an engine without an optimizer over it."""
    import deepspeed

    model = whole(path)
    settings = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 3}}
    join_deepspeed()
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
    model.requires_grad_(False)
    deepspeed.initialize(model=model, config=settings)
    return model


def join_deepspeed() -> None:
    """DeepSpeed takes the process group that there is, and compiles no part of its own for it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)


BASES: dict[str, Callable[[str], Any]] = {
    "sharded by dlora": whole,
    "sharded by the user": sharded_by_user,
    "sharded by transformers": sharded_by_transformers,
    "partitioned by dlora": whole,
    "partitioned by the user": partitioned_by_user,
}


def started(
    path: str, base: str, config: LoraConfig, attach_first: bool, **options: Any
) -> tuple[Any, Any]:
    """(model, replica), the adapters attached before or after `shard`."""
    model = BASES[base](path)

    def attached() -> None:
        torch.manual_seed(place()[0])
        attach(model, config)

    if attach_first:
        attached()
    engine = "zero3" if base == "partitioned by dlora" else "fsdp2"
    replica = shard(model, engine=engine, base="world", **options)
    if not attach_first:
        attached()
    return model, replica


def batches(steps: int, rows: int = ROWS) -> Iterator[Tensor]:
    """Ids of this rank's part of the same rows."""
    rank, world = place()
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randint(VOCABULARY, (rows, 12), generator=draw).chunk(world)[rank]


def steps(replica: Any, optimizer: Any, losses: Iterable[Tensor]) -> list[Tensor]:
    """A step for each of the losses, which are made when it comes; the norms of the gradients."""
    norms = []
    for loss in losses:
        loss.backward()
        replica.reduce_gradients()
        norms.append(replica.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    return norms
