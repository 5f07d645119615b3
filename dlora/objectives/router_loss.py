"""The auxiliary loss of a mixture of experts, where the base's configuration asks for one.

    L = CE + c·aux      aux: how unevenly the class's own function finds the tokens routed

`output_router_logits: true` in the base's `config.json` asks for it, as in transformers, and c is
`router_aux_loss_coef` there. It is taken over the tokens of a micro-batch together, without the
padded ones, so unlike the cross entropy it depends on which sequences share a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError

_RECORD = "dlora_router_loss"
_FUNCTION = "load_balancing_loss_func"  # of a class's module, called by its forward
_KNOWN = {"gate_logits", "num_experts", "top_k", "attention_mask"}
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class RouterLoss:
    """The auxiliary loss of a model's last pass.

    Args:
        function: the class's own; see `_KNOWN` for its parameters.
        settings: those that do not change.
        coefficient: c.
    """

    def __init__(
        self, function: Callable[..., Any], settings: dict[str, int], coefficient: float
    ) -> None:
        self._function, self._settings, self.coefficient = function, settings, coefficient
        self._last: Tensor | None = None

    def begin(self) -> dict[str, bool]:
        """Begin a pass: the arguments that let the decoder return the logits of its routers."""
        if not torch.is_grad_enabled():
            return {}
        self._last = None
        return {"output_router_logits": True}

    def compute(self, outputs: Any, shape: torch.Size, lengths: Sequence[int] | None) -> None:
        """Compute it from the decoder's `outputs` for rows of `lengths` tokens, padded to `shape`.

        Without lengths, as in a pass of weight zero, every token counts.
        """
        logits, mask = outputs.router_logits, None
        if not logits:  # none of the layers has experts
            self._last = torch.zeros((), device=outputs[0].device)
            return
        if lengths:
            ends = torch.tensor(lengths).to(logits[0].device, non_blocking=True)
            mask = (torch.arange(shape[1], device=ends.device) < ends[:, None]).long()
        self._last = self._function(gate_logits=logits, attention_mask=mask, **self._settings)

    def add_to(self, loss: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """(`loss` summed over `tokens` targets of the last pass + c·aux·tokens, aux·tokens)."""
        last, self._last = self._last, None
        if last is None:
            raise RuntimeError("router_loss: the model was not called with targets")
        weighted = last.to(loss.device) * tokens
        return loss + self.coefficient * weighted, weighted.detach()


def router_loss_of(model: nn.Module) -> RouterLoss | None:
    """The auxiliary loss of a model that `chunked_loss.install` extended; None: it has none."""
    return model.__dict__.get(_RECORD)


def whole_loss(model: nn.Module, loss: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What is minimised in a pass, and what is reported of it, each a sum over target tokens.

    The auxiliary loss is a mean over the tokens of a micro-batch. It counts once for each target,
    so that a step has the mean of the class's own losses, weighted by their targets.

    Args:
        loss: of the objective, summed over the micro-batch's `tokens` targets.
    """
    router, reported = router_loss_of(model), {"loss": loss.detach()}
    if router is not None:
        loss, reported["aux_loss"] = router.add_to(loss, tokens)
    return loss, reported


def install_router_loss(model: nn.Module) -> RouterLoss | None:
    """`find_router_loss`, recorded for `router_loss_of`."""
    model.__dict__[_RECORD] = found = find_router_loss(model)
    return found


def find_router_loss(model: nn.Module) -> RouterLoss | None:
    """The auxiliary loss that a model's configuration asks for; None: it asks for none.

    Raises:
        UsageError: it asks for one that is not known here.
    """
    own: Any = inspect.unwrap(type(model).forward)
    asks = getattr(getattr(model, "config", None), "output_router_logits", False)
    if not asks or "aux_loss" not in own.__code__.co_varnames:
        return None  # a class without such a loss ignores the setting
    function = own.__globals__.get(_FUNCTION)
    coefficients = [getattr(model, name) for name in _COEFFICIENTS if hasattr(model, name)]
    experts: Any = getattr(model, "num_experts", None)
    takes = {*inspect.signature(function).parameters} if function is not None else set()
    if takes != _KNOWN or not coefficients or not experts:
        raise UsageError(
            f"model.path: output_router_logits is set, but how {type(model).__name__} computes its "
            "auxiliary loss is not known; set it to false in the base's config.json"
        )
    if function is None or not coefficients[0]:
        return None
    known = {"num_experts": experts, "top_k": model.num_experts_per_tok}
    return RouterLoss(function, known, float(coefficients[0]))
