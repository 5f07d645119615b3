"""An adapter from a file under a name, in the place of another one, on a running, sharded model.

    rank 0     reads and checks everything, beside what the model has
    the store  takes its verdict and the settings to the other ranks, which read nothing
    broadcast  one, of the values; then the new adapter takes the name, and the old one goes

Nothing of W0 is wrapped, gathered or sent. Of a DoRA each weight that it adapts is gathered once,
for its row norms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlora.adapters.save_load import StoredAdapter, read_stored, slots_for
from dlora.lora.attach import attach, named_adapters
from dlora.lora.config import LoraConfig
from dlora.lora.names import (
    attached,
    by_name,
    check_name,
    check_unmerged,
    names_of,
    remove,
    rename,
)
from dlora.lora.parameters import shape_of
from dlora.lora.whole_weights import show_weights
from dlora.methods.trained_replica import TrainedReplica, replica_of

_FRESH = "__new__"  # before the name of an adapter that has not taken its place yet


def load_named(model: nn.Module, directory: str | Path, name: str, is_trainable: bool) -> None:
    """Load an adapter under a name, attaching it where the name is new. Collective after `shard`.

    One broadcast of the values is all that is sent. Where the name is that of a frozen adapter,
    which may be of other shapes, the new one takes its place, active or not as it was. One that is
    trained keeps its parameters, which the file has to fit. Nothing has changed after an error.

    Args:
        directory: as of `load_adapter`; read by rank 0 alone.
        is_trainable: whether an adapter that is attached by this call is trained.

    Raises:
        UsageError: see `load_adapter`; the same on every rank.
    """
    old, replica = attached(model).get(name), replica_of(model)
    check_unmerged(model, "load_adapter")
    if old is not None and old.trained:
        with by_name(model, name):
            found = _on_first(replica, lambda: read_stored(model, directory))
            found.fill(_slots(model, found, replica))
        if replica is not None:
            replica.share(name)
        return
    if old is None:
        check_name(model, name, "load_adapter")
    fresh = _FRESH + name
    try:
        _attach_fresh(model, directory, fresh, is_trainable)
    except BaseException:
        if fresh in attached(model):
            remove(model, fresh)
        raise
    active = names_of(model).active
    if old is not None:
        remove(model, name)
    rename(model, fresh, name)
    names_of(model).active = [name if other == fresh else other for other in active]
    if replica is not None and is_trainable:
        replica.join(name, equal=True)


def _attach_fresh(model: nn.Module, directory: str | Path, fresh: str, is_trainable: bool) -> None:
    """Attach the adapter of a directory, with the same values on every rank."""
    replica = replica_of(model)

    def read() -> StoredAdapter:
        stored = read_stored(model, directory)
        stored.check_ranks(model)
        return stored

    found = _on_first(replica, read)
    attach(
        model,
        found.config,
        name=fresh,
        trained=is_trainable,
        whole_weights=None if replica is None else _unread_weights,
        started=False,
    )
    for line in attached(model)[fresh].left:
        warnings.warn(line, stacklevel=5)  # of the caller of `dlora.load_adapter`
    with by_name(model, fresh):
        slots = _slots(model, found, replica)
        gathered = None if replica is None else replica.engine.gather_module
        show_weights(named_adapters(model), gathered)
        found.fill(slots)
    if replica is not None:
        replica.share(fresh)


class _Found(NamedTuple):
    """What all ranks know of an adapter's files, and the files on the rank that reads them."""

    config: LoraConfig
    stored: StoredAdapter | None

    def fill(self, slots: dict[str, Tensor]) -> None:
        """Read the values, where the files are."""
        if self.stored is not None:
            self.stored.fill(slots)


def _on_first(replica: TrainedReplica | None, read: Callable[[], StoredAdapter]) -> _Found:
    stored: list[StoredAdapter] = []

    def settings() -> dict[str, Any]:
        stored.append(read())
        return asdict(stored[0].config)

    config = LoraConfig(**(settings() if replica is None else replica.from_first(settings)))
    return _Found(config, stored[0] if stored else None)


def _slots(model: nn.Module, found: _Found, replica: TrainedReplica | None) -> dict[str, Tensor]:
    """The tensors to be filled, where the files are; checked for all ranks that they fit."""
    slots: dict[str, Tensor] = {}

    def check() -> None:
        assert found.stored is not None
        slots.update(slots_for(model, found.stored))

    check() if replica is None else replica.from_first(check)
    return slots


@contextmanager
def _unread_weights(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """In the place of W0, memory of its shapes, for trained copies whose values are to be read."""
    yield {
        path: torch.empty(shape_of(parameter), dtype=parameter.dtype, device=parameter.device)
        for path, parameter in module.named_parameters()
    }
