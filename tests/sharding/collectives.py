"""What a rank really sends: the collectives that torch dispatches, the bytes on its sockets."""

import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Times (p − 1)/p · bytes of the whole tensor: of a ring, and as gloo really does it.
RING = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}
GLOO = RING | {"_reduce_scatter_base_": 2}  # an all-reduce, of which each rank keeps its part
# Offset of tcpi_bytes_acked in Linux' struct tcp_info.
_BYTES_ACKED = 120


@dataclass(frozen=True)
class Collective:
    """One call: its operation in torch's c10d library, bytes of the whole tensor, and its ranks.

    Attributes:
        kinds: device, dtype and whether it is contiguous, of each of its tensors.
    """

    op: str
    nbytes: int
    ranks: tuple[int, ...]
    kinds: frozenset[tuple[str, torch.dtype, bool]] = frozenset()

    def sent(self, costs: dict[str, int] = RING) -> float:
        """Bytes that each rank sends."""
        return costs[self.op] * self.nbytes * (len(self.ranks) - 1) / len(self.ranks)

    def crosses(self, ranks_per_node: int) -> bool:
        """Whether ranks of several nodes take part."""
        return len({rank // ranks_per_node for rank in self.ranks}) > 1


class CollectiveLog(TorchDispatchMode):
    """Inside, all collectives of this process are written down in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            tensors = _tensors(args)
            kinds = frozenset((t.device.type, t.dtype, t.is_contiguous()) for t in tensors)
            whole = max(tensor.nbytes for tensor in tensors)  # gathered, or to be scattered
            self.calls.append(Collective(name, whole, _ranks(args), kinds))
        return func(*args, **(kwargs or {}))


def _tensors(args: Any) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _ranks(args: Any) -> tuple[int, ...]:
    for argument in args:
        if "ProcessGroup" in str(getattr(argument, "_type", lambda: "")()):
            group = dist.ProcessGroup.unbox(argument)
            return tuple(dist.get_process_group_ranks(group))
    raise AssertionError("a collective without a process group")


def socket_bytes() -> Counter[str]:
    """Bytes that this process has sent on each of its TCP connections, counted by the kernel."""
    sent: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            name = str(descriptor.readlink())
            copy = os.dup(int(descriptor.name)) if name.startswith("socket:") else -1
        except OSError:  # closed meanwhile
            continue
        if copy >= 0:
            with socket.socket(fileno=copy) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    (sent[name],) = struct.unpack_from("Q", info, _BYTES_ACKED)
    return sent
