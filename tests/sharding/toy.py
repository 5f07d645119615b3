"""A model of four small tensors under a replica, and batches of unequal size for four ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology

ROWS = [5, 2, 9, 4]  # of each rank


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
