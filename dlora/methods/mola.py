"""The balance of a mixture's routers over the tokens of a step, of all ranks and micro-batches.

    passes                backward adds to each router's sums: counts, Σ p, Σ g, and H of pairs
    before the reduction  one sum over ranks of counts, Σ p and Σ g ─> f, P, L the same everywhere
                          this rank's part of ∂L/∂R, from its own H and the global f, is added to
                          its gradients, so that their one reduction completes it

So L and its gradient are those of the whole global batch, whatever its division into ranks and
micro-batches. See `dlora.lora.balance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.balance import balance_loss
from dlora.lora.method_state import MethodState
from dlora.lora.variants.mola import MolaAdapter, MolaConfig
from dlora.methods.trained_replica import TrainedReplica
from dlora.sharding.replica.frozen import same_on_every_rank

_STEPS = 100  # over which mean gates are averaged, after as many steps


class ExpertBalance(MethodState):
    """The balance loss, and the mean gates of the last steps.

    Args:
        model: attached with a `MolaConfig`.
        replica: owns its routers, and its experts unless these are frozen.

    Attributes:
        step: optimizer steps made.
    """

    def __init__(self, model: nn.Module, replica: TrainedReplica) -> None:
        attachment = attachment_of(model)
        assert isinstance(attachment.config, MolaConfig)
        self.config, self._replica, self.step = attachment.config, replica, 0
        self._routers: list[MolaAdapter] = []
        for _, _, router in named_adapters(model):
            assert isinstance(router, MolaAdapter)
            router.balance(self.config.balance_coef)
            self._routers.append(router)
        if self._routers and all(router.filled for router in self._routers):
            same_on_every_rank(replica.frozen, replica.topology)  # each rank read its own files
        count = len(self._routers)
        self._gates = replica.values.new_zeros(count, self.config.experts)
        # What the host reads: L and the mean gates of every router. Written in front of the
        # reduction, for which the host waits anyway.
        self._told = torch.zeros(
            count, 1 + self.config.experts, dtype=self._gates.dtype, pin_memory=self._gates.is_cuda
        )
        stream = attachment.stream

        def see(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            """Note which tokens of a pass are padding, where a loop of the user's own says so."""
            mask = kwargs.get("attention_mask")
            stream.attended = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

        model.register_forward_pre_hook(see, with_kwargs=True)

    @property
    def working_bytes(self) -> int:
        """Of the sums of all routers."""
        return sum(router.sums.nbytes for router in self._routers if router.sums is not None)

    @torch.no_grad()
    def before_reduce(self, tokens: int) -> None:
        """Add N times the gradient of c·L to the gradients, of which the reduction takes Σ / N.

        N is `tokens` summed over ranks; each rank adds what its own tokens contribute.
        """
        routers = self._routers
        if not routers:
            return
        each = [self._summed(router) for router in routers]
        weight = self._gates.new_full((len(routers), 1), float(tokens))
        own = torch.cat([torch.stack(each).flatten(1), weight], dim=1)
        whole = self._replica.sum_over_ranks(own.flatten()).view_as(own)
        totals = whole[:, :-1].view(len(routers), 3, -1)
        loss, f, counted = balance_loss(totals, self.config.top_k)
        if self.config.balance_coef > 0 and self.config.experts > 1:
            scale = self.config.balance_coef * self.config.experts / len(routers)
            scales = scale * whole[:, -1] / counted.clamp(min=1)
            for router, f_E in zip(routers, f * scales[:, None], strict=True):
                assert router.sums is not None
                gradient = self._replica.gradient(f"{router.place}.lora_router")
                gradient += router.sums.gradient(f_E)
        for router in routers:
            assert router.sums is not None
            router.sums.zero_()
        self._follow(totals[:, 2], counted)
        self._told.copy_(torch.cat([loss[:, None], self._gates], dim=1), non_blocking=True)

    def _summed(self, router: MolaAdapter) -> Tensor:
        assert router.sums is not None
        router.sums.to(self._replica.values.device)
        return router.sums.totals

    def _follow(self, gate_sums: Tensor, counted: Tensor) -> None:
        """Gates ← the mean over the first steps, and a moving one from there on."""
        self._gates = self._gates.to(gate_sums.device)
        means = gate_sums / counted.clamp(min=1)[:, None]
        moved = self._gates + (means - self._gates) / min(self.step + 1, _STEPS)
        self._gates = torch.where(counted[:, None] > 0, moved, self._gates)

    def after_step(self, optimizer: Optimizer, *, skipped: bool = False) -> None:
        self.step += 1
        self._show_gates()

    def _show_gates(self) -> None:
        """Let each adapter have its mean gates, a part of what the host reads."""
        for place, router in enumerate(self._routers):
            router.mean_gates = self._told[place, 1:] if self.step else None

    def metrics(self) -> dict[str, Any]:
        """L, the mean over routers, before its coefficient."""
        return {"aux_loss": float(self._told[:, 0].double().mean())} if self._routers else {}

    def record(self) -> dict[str, Any]:
        """The mean gates of each module; of no step there are none."""
        if not self.step:
            return {"gates": {}}
        gates = self._told[:, 1:].tolist()
        return {"gates": {r.path: own for r, own in zip(self._routers, gates, strict=True)}}

    def load_record(self, step: int, record: Mapping[str, Any]) -> None:
        """Continue with the mean gates of a checkpoint."""
        self.step = step
        for place, router in enumerate(self._routers):
            if (gates := record["gates"].get(router.path)) is not None:
                self._told[place, 1:] = torch.tensor(gates)
        self._gates.copy_(self._told[:, 1:])
        self._show_gates()
