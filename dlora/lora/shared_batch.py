"""Passes over a batch that several adapters of a model share, and over what one of them has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dlora.lora.names import names_of
from dlora.lora.segments import Segments


@contextmanager
def shared_by(model: nn.Module, segments: Segments) -> Iterator[None]:
    """Inside, a pass of `model` is over a batch with these segments; backward belongs inside."""
    names = names_of(model)
    before, names.segments = names.segments, segments
    try:
        yield
    finally:
        names.segments = before


@contextmanager
def only(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model computes with the adapters of one name, whatever the batch."""
    names = names_of(model)
    before = names.active, names.segments
    names.active, names.segments = [name], None
    try:
        yield
    finally:
        names.active, names.segments = before
