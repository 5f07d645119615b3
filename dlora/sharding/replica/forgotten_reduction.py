"""A loop that forgets `reduce_gradients` on several ranks: reduced at the optimizer's step.

    backward … reduce_gradients … step      as meant
    backward … step                         the step begins with the reduction, and warns once
    step(closure)                           the closure ends with it
    backward … scaler.step                  refused: a rank may skip what others would wait for

Otherwise each rank would step with its own gradients, and adapters would differ without a word.
torch calls one hook before the steps of all optimizers, so that those are found that the replica
was never connected with. Of these it keeps weak references.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dlora.errors import UsageError

_OF_TRAINER = "_replicated_grad_hook_registered"  # Trainer's mark on what it reduces by itself
_MOST_FRAMES = 12  # between a hook of an optimizer and the scaler that calls its step
_SCALER_CODES = {GradScaler.step.__code__, GradScaler._maybe_opt_step.__code__}


class Reducible(Protocol):
    """What a guard needs of a replica."""

    named: dict[str, nn.Parameter]
    reductions: int
    unreduced: bool

    @property
    def optimized(self) -> dict[str, nn.Parameter]: ...

    def reduce_gradients(self) -> Any: ...


class StepGuard:
    """Sees to it that the steps of one replica's optimizers follow a reduction.

    Args:
        replica: of several ranks; no reference to it is kept.
    """

    def __init__(self, replica: Reducible) -> None:
        self._replica = weakref.ref(replica)
        self._stepped: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._wrapped: bool | None = None  # in DDP, which reduces; unknown before it matters
        self._warned = False
        _guards.add(self)
        _watch_steps()

    def has(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps what the replica trains."""
        replica = self._replica()
        if replica is None:
            return False
        own = {id(p) for p in (*replica.optimized.values(), *replica.named.values())}
        return any(id(p) in own for p in _parameters(optimizer))

    def before_step(self, optimizer: Optimizer) -> None:
        """Reduce the gradients if the loop did not. Collective where it does.

        Raises:
            UsageError: a GradScaler steps, which each rank's own gradients may stop.
        """
        replica = self._replica()
        assert replica is not None  # `has` was asked
        if self._needs_reduction(replica, optimizer) and not self._is_reduced_elsewhere(replica):
            if _scaler_steps():
                raise UsageError(
                    "replica.reduce_gradients() was not called: with a GradScaler it must be, "
                    "before scaler.unscale_(optimizer) and scaler.step(optimizer), since a rank "
                    "whose own gradients overflow would skip the step that others wait in"
                )
            replica.reduce_gradients()
            self._warn()
        self._stepped[optimizer] = replica.reductions

    def _needs_reduction(self, replica: Reducible, optimizer: Optimizer) -> bool:
        """Whether gradients came since the last reduction; or, on a rank that had no batch, whether
        there was none since this optimizer's last step, as the others wait for this rank's part.
        """
        if replica.unreduced:
            return True
        if self._stepped.get(optimizer, 0) != replica.reductions:
            return False
        return not any(p.grad is not None and p.grad.any() for p in _parameters(optimizer))

    def _is_reduced_elsewhere(self, replica: Reducible) -> bool:
        """Whether torch's DDP reduces, or transformers' Trainer of a base that it sharded."""
        first = next(iter(replica.named.values()))
        if getattr(first, _OF_TRAINER, False):
            return True
        if self._wrapped is None:
            self._wrapped = _is_in_ddp(first)
        return self._wrapped

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                "replica.reduce_gradients() was not called before optimizer.step(), so the step "
                "began with it: the gradients are means over ranks, and were not clipped; call it "
                "after backward()",
                stacklevel=6,
            )
        self._warned = True


_guards: weakref.WeakSet[StepGuard] = weakref.WeakSet()
_watching = False


def _watch_steps() -> None:
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_before_any_step)
        _watching = True


def _before_any_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Torch's hook; it returns other arguments where a closure makes the gradients."""
    guards = [guard for guard in list(_guards) if guard.has(optimizer)]
    if not guards:
        return None
    _, *given = args
    closure = kwargs.get("closure", given[0] if given else None)
    if closure is None:
        for guard in guards:
            guard.before_step(optimizer)
        return None
    guarded = _guarded(closure, guards, optimizer)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": guarded}
    return (args[0], guarded, *given[1:]), dict(kwargs)


def _guarded(
    closure: Callable[[], Any], guards: Iterable[StepGuard], optimizer: Optimizer
) -> Callable[[], Any]:
    def closed() -> Any:
        loss = closure()
        for guard in guards:
            guard.before_step(optimizer)
        return loss

    return closed


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_in_ddp(parameter: nn.Parameter) -> bool:
    """Whether torch's DDP has wrapped the model of a parameter, and so reduces its gradients."""
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return any(parameter is own for wrapper in wrappers for own in wrapper.parameters())


def _scaler_steps() -> bool:
    """Whether a step that is about to begin was called by a GradScaler that is enabled."""
    frame: Any = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return False
        if frame.f_code in _SCALER_CODES:
            return frame.f_locals["self"].is_enabled()
        frame = frame.f_back
    return False
