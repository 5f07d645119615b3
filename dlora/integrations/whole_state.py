"""An optimizer whose `state_dict()` is whole, and may be loaded on any number of ranks.

    state_dict()        own state ─ gathered from ranks ─> whole tensors on rank 0, as without dlora
    load_state_dict()   whole tensors ─> the part that this rank's optimizer stores

Both through torch's own hooks, so that whoever saves an optimizer (Trainer, Accelerate, Lightning,
`torch.save` in a loop) saves all of it, and no rank is given another rank's part. What the method
of the adapters stores beside them (AdaLoRA's averages) is in the same dictionary, as `"dlora"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dlora import UsageError
from dlora.api import TrainedReplica

KEY = "dlora"


class WholeState:
    """Connects an optimizer with the replica whose parameters it has; make it once.

    Where the state is divided over ranks, `state_dict()` is collective from now on: all ranks call
    it. Rank 0 gets all of it, the others their own part, which only they can load.

    Args:
        optimizer: made of `replica.parameter_groups`.

    Raises:
        UsageError: the optimizer has whole tensors while its state is to be divided, or loads
            states in a way of its own.
    """

    def __init__(self, replica: TrainedReplica, optimizer: Optimizer) -> None:
        self._replica, self._optimizer = replica, optimizer
        self._collected: dict[str, Any] | None = None
        replica.attach_optimizer(optimizer)
        own_loader = type(optimizer).load_state_dict is not Optimizer.load_state_dict
        if own_loader and (replica.strategy.collective_saves or replica.method.tensors()):
            raise UsageError(
                f"optimizer: {type(optimizer).__name__} loads its state in a way of its own, so it "
                "cannot be divided over ranks or trained with AdaLoRA; use a torch optimizer"
            )
        optimizer.register_state_dict_post_hook(self._joined)
        optimizer.register_load_state_dict_pre_hook(self._cut)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, `state_dict()` returns what was gathered on entry, and only the entry is
        collective: for libraries that ask for it on one rank alone."""
        self._collected = self._optimizer.state_dict()
        try:
            yield
        finally:
            self._collected = None

    def _joined(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if self._collected is not None:
            return self._collected
        replica = self._replica
        collective, method = replica.strategy.collective_saves, replica.method
        if not (collective or method.tensors()):
            return state
        gathered = {
            file: self._gathered(own)
            for file, own in replica.states(optimizer).items()
            if collective or file != "optimizer"
        }
        is_whole = not collective or replica.topology.rank == 0
        if collective:
            self._check(optimizer)
        if collective and is_whole:
            whole = gathered["optimizer"]
            states = {i: whole[n] for i, n in self._names(optimizer).items() if n in whole}
            state = {**state, "state": {**_others(state, self._names(optimizer)), **states}}
        beside = {
            "whole": is_whole,
            "rank": [replica.topology.rank, replica.topology.world],
            "method": {file: tensors for file, tensors in gathered.items() if file != "optimizer"},
        }
        return {**state, KEY: beside}

    def _cut(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        replica, beside = self._replica, state.get(KEY, {})
        rank = [replica.topology.rank, replica.topology.world]
        state = {key: value for key, value in state.items() if key != KEY}
        if not beside.get("whole", True):
            if beside["rank"] != rank:
                one, of = beside["rank"]
                raise UsageError(f"optimizer state: this is the part of rank {one} of {of} alone")
            return state
        for file, tensors in beside.get("method", {}).items():
            flat = [(f"{n}.{slot}", t) for n, slots in tensors.items() for slot, t in slots.items()]
            replica.method.load_tensors(file, flat)
        if not replica.strategy.collective_saves:
            return state
        names, states = self._names(optimizer), _others(state, self._names(optimizer))
        for index, name in names.items():
            slots = state["state"].get(index, {})
            own = {slot: self._part(name, slot, value) for slot, value in slots.items()}
            if own := {slot: value for slot, value in own.items() if value is not None}:
                states[index] = own
        return {**state, "state": states}

    def _names(self, optimizer: Optimizer) -> dict[int, str]:
        """The replica's tensors by their number in the optimizer."""
        known = {id(part): name for name, part in self._replica.optimized.items()}
        every = [p for group in optimizer.param_groups for p in group["params"]]
        return {i: known[id(p)] for i, p in enumerate(every) if id(p) in known}

    def _gathered(self, own: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by name and slot, in host memory; on rank 0 alone where divided."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, slot, value in self._replica.strategy.gather_full(own):
            found.setdefault(name, {})[slot] = value.detach().to("cpu", copy=True)
        return found

    def _part(self, name: str, slot: str, value: Any) -> Tensor | None:
        whole = self._replica.named[name]
        divided = self._replica.divided and isinstance(value, Tensor) and value.ndim > 0
        if not isinstance(value, Tensor) or (divided and value.numel() != whole.numel()):
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise UsageError(f"optimizer state: {slot} of {name} is not whole: {shape}")
        part = self._replica.strategy.local_part(name, value)
        return None if part is None else part.clone()

    def _check(self, optimizer: Optimizer) -> None:
        """Raise a `UsageError` if the state has what cannot be gathered."""
        for part in self._replica.optimized.values():
            for slot, value in optimizer.state.get(part, {}).items():
                if value is not None and not isinstance(value, Tensor):
                    raise UsageError(
                        f"optimizer state: {type(optimizer).__name__} stores {slot} as a "
                        f"{type(value).__name__}; a state that is divided over ranks has tensors"
                    )


def _others(state: Mapping[str, Any], names: Mapping[int, str]) -> dict[int, Any]:
    """States of parameters that are not the replica's: the same on every rank."""
    return {index: slots for index, slots in state["state"].items() if index not in names}
