"""The reference of preference training: the trained model with its adapters off, so one W0."""

from __future__ import annotations

from typing import Any

from torch import nn

from dlora import disabled


class AdapterOff(nn.Module):
    """A model as its base: each call computes with the same gathered W0, without adapters.

    It has no parameters of its own, so that whoever moves, wraps or freezes it changes nothing.

    Args:
        model: with adapters of dlora.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that it is no child
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        with disabled(self._model[0]):
            return self._model[0](*args, **kwargs)
