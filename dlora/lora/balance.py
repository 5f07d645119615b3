"""The balance loss of a router, from sums that any number of passes and ranks add to.

    f_e = tokens that chose e / T        Σ_e f_e = k        p = softmax(ℓ) over all E experts
    P_e = mean of p_e over tokens        L = E·Σ_e f_e P_e  k where all experts are used alike

f has no gradient, so that of L is linear in it, and f may come last. With
H_ej = Σ_t p_e p_j xᵀ [n] for every pair e < j of experts, and ∂p_e/∂ℓ_j = p_e(δ_ej − p_j),

    ∂L/∂R_j = E/T·Σ_{e≠j} (f_j − f_e)·H_ej

So the sums H over all tokens of a step, together with the global f and T, give the gradient of the
loss over the whole global batch, exactly, however it was divided into micro-batches and ranks. A
loss for each micro-batch has another value and another gradient: a product of two means is not the
mean of products. What these sums cannot give is a gradient by x, for which f would have to be known
in the pass: L moves routers alone, and neither experts nor layers below.

Source: Fedus et al. 2021 (Switch Transformers), https://arxiv.org/abs/2101.03961, section 2.2;
transformers' `load_balancing_loss_func` for k > 1, here for each router alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.lora.functional import summed


def pairs_of(experts: int) -> int:
    """P = E(E−1)/2, the pairs of experts."""
    return experts * (experts - 1) // 2


class BalanceSums:
    """Sums over the tokens of a router's passes since the last `zero_`.

    Args:
        experts: E.
        n: columns of the router.
        trains: whether the loss has a gradient, for which H is summed.

    Attributes:
        totals: [3, E]: tokens that chose each expert, Σ p_e, and Σ g_e.
        pairs: H [P, n], the pairs (0, 1), (0, 2), …, (E−2, E−1); None where nobody asks for it.
    """

    def __init__(
        self, experts: int, n: int, *, trains: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.totals = torch.zeros(3, experts, dtype=dtype, device=device)
        self.pairs: Tensor | None = None
        if trains and experts > 1:
            self.pairs = self.totals.new_zeros(pairs_of(experts), n)

    def add(
        self,
        x_Tn: Tensor,
        logits_TE: Tensor,
        chosen_TE: Tensor,
        gates_TE: Tensor,
        counted_T: Tensor | None,
    ) -> None:
        """Add the tokens of a pass; `counted_T` is False where one is padding, None: all count."""
        self.to(x_Tn.device)
        p_TE, E = logits_TE.softmax(dim=1), logits_TE.shape[1]
        parts_3TE = torch.stack([chosen_TE.to(p_TE.dtype), p_TE, gates_TE])
        if counted_T is not None:
            parts_3TE = parts_3TE * counted_T[None, :, None]
        self.totals += parts_3TE.sum(1)
        if self.pairs is not None:
            first, second = torch.triu_indices(E, E, 1, device=p_TE.device)
            of_pairs_TP = parts_3TE[1][:, first] * p_TE[:, second]
            self.pairs += summed(of_pairs_TP, x_Tn, self.pairs.dtype, 1.0)

    def gradient(self, f_E: Tensor) -> Tensor:
        """Σ_{e≠j} (f_j − f_e)·H_ej [E, n], from this rank's H; `f_E` may be scaled."""
        assert self.pairs is not None
        count = len(f_E)
        first, second = torch.triu_indices(count, count, 1, device=f_E.device)
        signs_EP = torch.zeros(count, len(first), dtype=f_E.dtype, device=f_E.device)
        place = torch.arange(len(first), device=f_E.device)
        signs_EP[first, place], signs_EP[second, place] = 1.0, -1.0
        return (signs_EP * (f_E[first] - f_E[second])) @ self.pairs

    def zero_(self) -> None:
        """Forget all passes."""
        self.totals.zero_()
        if self.pairs is not None:
            self.pairs.zero_()

    @property
    def nbytes(self) -> int:
        """Of the sums."""
        return self.totals.nbytes + (0 if self.pairs is None else self.pairs.nbytes)

    def to(self, device: torch.device) -> None:
        """Follow the model where `model.to(device)` has moved it."""
        if self.totals.device != device:
            self.totals = self.totals.to(device)
            self.pairs = None if self.pairs is None else self.pairs.to(device)


def balance_loss(totals: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(L, f [E], T) of each router from its `totals` [..., 3, E] of all ranks; 0 without T."""
    counts, p_sums = totals[..., 0, :], totals[..., 1, :]
    tokens = counts.sum(-1, keepdim=True) / top_k
    per_token = tokens.clamp(min=1)
    f = counts / per_token
    loss = counts.shape[-1] * (f * p_sums / per_token).sum(-1)
    return loss, f, tokens.squeeze(-1)
