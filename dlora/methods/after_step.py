"""A step of any optimizer over a replica's parameters ends with its method's `after_step`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Followed(Protocol):
    """A replica with the state of its method."""

    method: Any

    @property
    def optimized(self) -> Mapping[str, nn.Parameter]: ...


_followed: weakref.WeakSet[Followed] = weakref.WeakSet()
_following = False


def follow_steps(replica: Followed) -> None:
    """Let every step of an optimizer over the replica's parameters end with `after_step`.

    Through torch's hook for all optimizers, since the user may make the optimizer at any time. It
    is one hook for all replicas, and stays: none can be removed while torch goes through them.
    """
    global _following
    _followed.add(replica)
    if not _following:
        register_optimizer_step_post_hook(_after_any_step)
        _following = True


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for replica in list(_followed):
        if any(id(parameter) in stepped for parameter in replica.optimized.values()):
            replica.method.after_step(optimizer)
