"""A model of four small tensors under a replica, and batches of unequal size for four ranks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology

ROWS = [5, 2, 9, 4]  # of each rank
STEPS, MAX_NORM = 3, 0.5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ALL, SOME, NONE = "on all ranks", "on rank 0 only", "on no rank"
Zero = Callable[[Replica, torch.optim.Optimizer], None]
ZEROING: dict[str, Zero] = {
    "replica": lambda replica, optimizer: replica.zero_grad(),
    "to none": lambda replica, optimizer: optimizer.zero_grad(set_to_none=True),
    "to zero": lambda replica, optimizer: optimizer.zero_grad(set_to_none=False),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": functools.partial(torch.optim.AdamW, fused=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}


class Toy(nn.Module):
    """3 → 5 → 2, with vectors and matrices; `spare` takes part only where it is asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in {"A": (5, 3), "b": (5,), "B": (2, 5), "spare": (7,)}.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(drawn))

    def losses(self, x: Tensor, y: Tensor, spare: bool) -> Tensor:
        """One loss for each row."""
        errors = (torch.tanh(x @ self.A.t() + self.b) @ self.B.t() - y).square().sum(-1)
        return errors + (self.spare * x.sum(-1, keepdim=True)).sin().sum(-1) if spare else errors


def batch(step: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(x, y) of each of four ranks."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(sum(ROWS), 5, generator=generator, dtype=torch.float64).to(dtype)
    return [(part[:, :3], part[:, 3:]) for part in rows.split(ROWS)]


def replicated(dtype: torch.dtype = torch.float64, *, divided: bool = False) -> tuple[Toy, Replica]:
    model, replica = Toy(dtype), Replica(Topology.current(), divided=divided)
    replica.own(dict(model.named_parameters()))
    return model, replica


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two rates, two decays."""
    return [
        {"params": [named["A"], named["spare"]], "lr": 0.05, "weight_decay": 0.1},
        {"params": [named["b"], named["B"]], "lr": 0.2, "weight_decay": 0.0},
    ]


def divided(
    optimizer: str = "AdamW", dtype: torch.dtype = torch.float64
) -> tuple[Toy, Replica, torch.optim.Optimizer]:
    model, replica = replicated(dtype, divided=True)
    chosen = OPTIMIZERS[optimizer](groups(replica.optimized))
    return model, replica, replica.attach_optimizer(chosen)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradients(named: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


def takes_part(where: str, step: int, rank: int) -> bool:
    """Whether `spare` does: in the first step always."""
    return step == 0 or where == ALL or (where == SOME and rank == 0)


def reduced(
    model: Toy, replica: Replica, step: int, *, spare: bool, by_tokens: bool, pieces: int
) -> Any:
    """The gradients of this rank's batch in micro-batches, reduced."""
    x, y = batch(step, model.A.dtype)[own_rank()]
    for some_x, some_y in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
        loss = model.losses(some_x, some_y, spare).sum()
        (loss if by_tokens else loss / len(x)).backward()
    return replica.reduce_gradients(**({"tokens": len(x)} if by_tokens else {}))


def backward_of_all(model: Toy, step: int, world: int, *, spare: bool, by_tokens: bool) -> None:
    """The same of all rows at once, by autograd alone."""
    parts = [model.losses(x, y, spare) for x, y in batch(step, model.A.dtype)[:world]]
    means = torch.stack([part.mean() for part in parts])
    (torch.cat(parts).mean() if by_tokens else means.mean()).backward()


def backward_of_some(model: Toy, step: int, world: int, where: str) -> None:
    """Of all rows, where `spare` takes part on some ranks only."""
    for rank, (x, y) in enumerate(batch(step, model.A.dtype)[:world]):
        losses = model.losses(x, y, takes_part(where, step, rank))
        (losses.sum() / sum(ROWS[:world])).backward()


def moved(
    model: Any, replica: Replica, optimizer: torch.optim.Optimizer, when: str, **how: Any
) -> dict[str, Tensor]:
    """Three steps; in the second all tensors move at some time, as `.to(device)` moves them."""
    for step in range(3):
        acts = {when: lambda: model._apply(torch.clone)} if step == 1 else {}
        replica.zero_grad()
        x, y = batch(step, torch.float64)[own_rank()]
        acts.get("before backward", int)()
        model.losses(x, y, **how).sum().backward()
        acts.get("after backward", int)()
        replica.reduce_gradients(len(x))
        acts.get("before the step", int)()
        optimizer.step()
        acts.get("after the step", int)()
    replica.audit()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
