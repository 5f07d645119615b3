"""An exponential moving average of A and B, for evaluation and saving.

    Ā ← d·Ā + (1 − d)·A     after each optimizer step, in float32, and so for every trained tensor

A and B are the same on every rank, whatever the optimizer's state is divided into, so each rank
computes the same average without a collective.

Source: Polyak and Juditsky 1992; the update is `torch.optim.swa_utils.get_ema_multi_avg_fn`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.methods.trained_replica import TrainedReplica


def ema(replica: TrainedReplica, decay: float) -> AdapterAverage:
    """Start an average of the replica's A and B, at their present values.

        average = dlora.ema(replica, 0.999)
        …                                        # optimizer.step()
        average.update()                         # after each step
        with average.applied():                  # the model computes with the average
            save_adapter(model, "out/average")

    Args:
        decay: d, in [0, 1): the share of the average that an update leaves.

    Raises:
        UsageError: `decay` is out of range, or nothing is attached.
    """
    return AdapterAverage(replica, decay)


class AdapterAverage:
    """The average, beside the model, or in it while it is applied; see `ema`.

    Attributes:
        decay: may be changed between updates, as a warm-up does.
        is_applied: whether the model computes with the average.
    """

    def __init__(self, replica: TrainedReplica, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"decay: expected a number in [0, 1), got {decay!r}")
        if not replica.named:
            raise UsageError("ema: there is nothing to average; call dlora.attach first")
        self.decay, self.is_applied = decay, False
        self._replica = replica
        self._other = {name: _wide(p.detach()) for name, p in replica.named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present A and B into the average; call it after each optimizer step.

        Raises:
            UsageError: the average is applied, or the adapters were resized.
        """
        if self.is_applied:
            raise UsageError("ema: the average is applied, so there is nothing to take into it")
        averages, values = self._pairs()
        torch._foreach_lerp_(averages, [_wide(v, copy=False) for v in values], 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange A and B for the average, or back; the same on every rank."""
        averages, values = self._pairs()
        for average, value in zip(averages, values, strict=True):
            present = _wide(value)
            value.copy_(average)
            average.copy_(present)
        self.is_applied = not self.is_applied

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the average, and `save_adapter` writes it.

        Raises:
            UsageError: it is applied already, or the adapters were resized.
        """
        if self.is_applied:
            raise UsageError("ema: the average is applied already")
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the parameters, to be saved and loaded; not copies."""
        self._check_not_applied("state_dict")
        return dict(self._other)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with an average that was saved.

        Raises:
            UsageError: it is of other adapters.
        """
        self._check_not_applied("load_state_dict")
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != {name: tensor.shape for name, tensor in self._other.items()}:
            raise UsageError("ema: this state is of adapters with other names or shapes")
        for name, tensor in state.items():
            self._other[name].copy_(tensor)

    def _check_not_applied(self, call: str) -> None:
        if self.is_applied:
            raise UsageError(f"ema: {call} needs the average beside the model, not applied")

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, values), the averages beside the values, which may have been moved."""
        values = {name: p.detach() for name, p in self._replica.named.items()}
        for name, value in values.items():
            if value.shape != self._other[name].shape:
                raise UsageError(
                    f"ema: {name} was resized from {list(self._other[name].shape)} to "
                    f"{list(value.shape)}; start a new dlora.ema from here"
                )
            self._other[name] = self._other[name].to(value.device)
        return list(self._other.values()), list(values.values())


def _wide(tensor: Tensor, *, copy: bool = True) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)
