"""Adapters by name on a model that may be sharded: taken off and renamed, with their replica."""

from __future__ import annotations

from torch import nn

from dlora.errors import UsageError
from dlora.lora import names
from dlora.methods.trained_replica import replica_of


def remove(model: nn.Module, name: str) -> None:
    """Take the adapters of a name off a model, sharded or not; nothing is sent.

    A layer that has no adapter any more gets its own class back. An optimizer over the removed
    ones has nothing to do any more.

    Raises:
        UsageError: there is no such name, or the model is merged.
    """
    names.remove(model, name)
    if (replica := replica_of(model)) is not None:
        replica.leave(name)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give the adapters `old` of a model the name `new`; `"default"` is the one without a name.

    Nothing is sent; each rank has to do the same. What was active stays so.

    Raises:
        UsageError: there is no such name, the new one is taken or cannot be one, the model is
            merged, or they are trained and sharded: their optimizer's state has their names.
    """
    attachment = names.found(model, old, "rename")
    names.check_name(model, new, "rename")
    if replica_of(model) is not None and attachment.trained:
        raise UsageError(
            f"rename: {old!r} is trained by a replica, whose states have its name; rename it "
            "before dlora.shard, or save it and load it by another name"
        )
    names.rename(model, old, new)
