"""bitsandbytes' AdamW: moments in 8 bits, each block of 256 of them with a scale of its own.

State of a tensor of N elements: two codes of one byte each, and two float32 scales for each 256 of
them, 2.03 bytes a parameter where AdamW has 8. Tensors below 4096 elements keep float32 moments.
With `paged` the codes are in memory that CUDA moves to the host and back as needed.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim import Optimizer

from dlora.optim.rule import Groups

WHOLE_BELOW = 4096  # elements
BLOCK = 256
MAP_BYTES = 2 * 256 * 4  # the values of the codes of both moments


def state_bytes(numel: int) -> int:
    """Bytes of state of a tensor of `numel` elements, without the maps that all tensors share."""
    if numel < WHOLE_BELOW:
        return 8 * numel
    return 2 * numel + 8 * -(-numel // BLOCK)


def adamw8bit(groups: list[dict[str, Any]], *, paged: bool) -> Optimizer:
    """Build the optimizer, with its state allocated, so that a checkpoint can be loaded into it.

    Its rule is that of `bitsandbytes.optim.AdamW8bit` or `PagedAdamW8bit`; only the count of steps
    is a tensor, as in torch's optimizers.
    """
    # It reports which kernels of other packages are not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    class Counted(PagedAdamW8bit if paged else AdamW8bit):  # type: ignore[misc]
        def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            super().init_state(group, p, gindex, pindex)
            self.state[p]["step"] = torch.tensor(self.state[p]["step"])

        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            state = self.state[p]
            state["step"] = int(state["step"])
            super().update_step(group, p, gindex, pindex)
            state["step"] = torch.tensor(state["step"])

    optimizer = Counted(groups, betas=(0.9, 0.999), eps=1e-8)
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, g, i)
    return optimizer


class AdamW8bit:
    """The rule `adamw8bit`."""

    name = "adamw8bit"
    moments = 2
    divides = "nothing"
    requires = {"bitsandbytes": "'dlora[quant]'"}
    clashes = (
        (
            "sharding.optimizer_state",
            "==",
            "divided",
            "whose moments share scales block by block, and are a quarter of adamw's anyway",
        ),
        (
            "adapter.method",
            "==",
            "adalora",
            "whose moments share scales block by block, and cannot be cut where adalora prunes",
        ),
    )

    @staticmethod
    def build(groups: Groups, *_: Any) -> Optimizer:
        """Its state is on the device of the parameters."""
        return adamw8bit(groups, paged=False)


class PagedAdamW8bit(AdamW8bit):
    """The rule `paged_adamw8bit`."""

    name = "paged_adamw8bit"

    @staticmethod
    def build(groups: Groups, *others: Any) -> Optimizer:
        """Its state moves between device and host as CUDA needs."""
        *_, device, say = others
        if device.type == "cpu":
            say("warning: optimizer.name: without a GPU paged_adamw8bit works as adamw8bit")
        return adamw8bit(groups, paged=device.type != "cpu")
