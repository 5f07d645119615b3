"""LoraPro against torch's AdamW: on least-squares updates, and on W itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_models import causal_model, token_ids
from least_squares import best
from refusals import refusal
from torch import Tensor, nn

from dlora import LoraConfig, UsageError, attach, shard
from dlora.lora.attach import trainable_parameters
from dlora.optim.lora_pro import LoraPro

BETAS, EPS = (0.9, 0.999), 1e-8
Loss = Callable[[Tensor], Tensor]


def drawn_pair(m: int, n: int, r: int, *, zero_b: bool = False) -> tuple[nn.Parameter, ...]:
    draw = torch.Generator().manual_seed(m + n + r)
    A, B = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((r, n), (m, r)))
    return nn.Parameter(A), nn.Parameter(torch.zeros_like(B) if zero_b else B)


def quadratic(m: int, n: int) -> Loss:
    """A loss of W [m, n] with its least value away from zero."""
    draw = torch.Generator().manual_seed(1)
    to, left = (torch.randn(m, k, generator=draw, dtype=torch.float64) for k in (n, m))
    return lambda W: (left @ (W - to)).square().mean()


class Twin:
    """torch's AdamW, given the updates to make; `of` what it moves."""

    def __init__(self, like: list[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.of = [nn.Parameter(t.detach().clone()) for t in like]
        self._optimizer = torch.optim.AdamW(
            self.of, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay
        )

    def step(self, *gradients: Tensor) -> None:
        for parameter, gradient in zip(self.of, gradients, strict=True):
            parameter.grad = gradient.detach().clone()
        self._optimizer.step()


def step_on(loss: Loss, A: nn.Parameter, B: nn.Parameter, s: float) -> Tensor:
    """Gradients of A and B; returns G."""
    W = (s * B @ A).detach().requires_grad_()
    [G] = torch.autograd.grad(loss(W), W)
    A.grad, B.grad = torch.autograd.grad(loss(s * B @ A), (A, B))
    return G


@pytest.mark.parametrize("zero_b", [False, True])
@pytest.mark.parametrize("s", [0.5, 5.657])
def test_low_moments_are_adamw_on_the_closed_form(s: float, zero_b: bool) -> None:
    """The closed form by least squares, the moments by torch."""
    A, B = drawn_pair(7, 5, 2, zero_b=zero_b)
    loss, decay, lr = quadratic(7, 5), 0.1, 1e-2
    twin = Twin([A, B], lr, decay)
    optimizer = LoraPro([A, B], [(A, B, s)], lr=lr, weight_decay=decay)
    for _ in range(6):
        G = step_on(loss, A, B, s)
        twin.step(*best(*(t.detach() for t in twin.of), G, s))
        optimizer.step()
        torch.testing.assert_close([A, B], twin.of, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("zero_b", [False, True])
@pytest.mark.parametrize("s", [0.5, 5.657])
def test_full_moments_are_those_of_the_equivalent_gradient(s: float, zero_b: bool) -> None:
    """g̃ by pseudo-inverses, its moments by torch on a tensor [m, n], the closed form by least
    squares: the paper's algorithm, with the true scale and steps counted from 1.
    """
    A, B = drawn_pair(7, 5, 2, zero_b=zero_b)
    a, b = A.detach().clone(), B.detach().clone()
    loss, decay, lr = quadratic(7, 5), 0.1, 1e-2
    moments = Twin([torch.zeros(7, 5, dtype=torch.float64)], lr=1.0)
    optimizer = LoraPro([A, B], [(A, B, s)], lr=lr, weight_decay=decay, moments="full")
    for _ in range(6):
        G = step_on(loss, A, B, s)
        optimizer.step()

        P_B, P_A = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
        before = moments.of[0].detach().clone()
        moments.step(G - (torch.eye(7) - P_B) @ G @ (torch.eye(5) - P_A))
        h_A, h_B = best(a, b, before - moments.of[0].detach(), s)
        a, b = a * (1 - lr * decay) - lr * h_A, b * (1 - lr * decay) - lr * h_B
        torch.testing.assert_close([A.detach(), B.detach()], [a, b], rtol=1e-7, atol=1e-9)
    assert optimizer.state[A]["exp_avg"].shape == (7, 5) and B not in optimizer.state


def distance_from_full_fine_tuning(lr: float, steps: int) -> float:
    """‖W − W of torch.optim.AdamW‖ after some steps of an invertible pair."""
    A, B = drawn_pair(6, 6, 6)
    s, loss = 1.5, quadratic(6, 6)
    W = Twin([(s * B @ A).detach()], lr)
    optimizer = LoraPro([A, B], [(A, B, s)], lr=lr, moments="full")
    for _ in range(steps):
        step_on(loss, A, B, s)
        optimizer.step()
        of = W.of[0].detach().requires_grad_()
        W.step(*torch.autograd.grad(loss(of), of))
    return float((s * B @ A - W.of[0]).detach().norm())


def test_an_invertible_pair_with_full_moments_is_full_fine_tuning() -> None:
    """T5: to O(η²) a step, so a tenth of η is a hundredth of the distance."""
    distances = [distance_from_full_fine_tuning(lr, 5) for lr in (1e-3, 1e-4, 1e-5)]
    assert distances[0] < 1e-2 * 5 * 1e-3 * 6  # of the way that W went
    for one, other in zip(distances, distances[1:], strict=False):
        assert 50 < one / other < 200


@pytest.mark.parametrize("moments", ["low", "full"])
def test_what_is_in_no_pair_gets_adamw(moments: str) -> None:
    A, B = drawn_pair(7, 5, 2)
    others = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3,), (2, 4))]
    twin = Twin(others, 1e-2, 0.1)
    optimizer = LoraPro([*others, A, B], [(A, B, 2.0)], lr=1e-2, weight_decay=0.1, moments=moments)
    for _ in range(5):
        step_on(quadratic(7, 5), A, B, 2.0)
        for parameter in others:
            parameter.grad = torch.randn_like(parameter)
        twin.step(*(p.grad for p in others))  # type: ignore[misc]
        optimizer.step()
    torch.testing.assert_close(others, twin.of, rtol=1e-10, atol=0)


def test_a_convolution_is_the_linear_layer_of_its_patches() -> None:
    A, B = drawn_pair(6, 3 * 2 * 2, 2)
    wide = nn.Parameter(A.detach().clone().view(2, 3, 2, 2))
    tall = nn.Parameter(B.detach().clone().view(6, 2, 1, 1))
    plain = LoraPro([A, B], [(A, B, 2.0)], lr=1e-2)
    convolution = LoraPro([wide, tall], [(wide, tall, 2.0)], lr=1e-2)
    for _ in range(3):
        step_on(quadratic(6, 12), A, B, 2.0)
        assert A.grad is not None and B.grad is not None
        wide.grad, tall.grad = A.grad.view_as(wide), B.grad.view_as(tall)
        plain.step()
        convolution.step()
    assert torch.equal(wide.view_as(A), A) and torch.equal(tall.view_as(B), B)


def test_a_pair_without_gradients_is_passed_by() -> None:
    A, B = drawn_pair(7, 5, 2)
    before = A.detach().clone(), B.detach().clone()
    optimizer = LoraPro([A, B], [(A, B, 2.0)], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(A, before[0]) and torch.equal(B, before[1]) and not optimizer.state


def test_what_is_no_number_stays_so() -> None:
    """The run goes on and says so, as with AdamW; LAPACK would refuse."""
    A, B = drawn_pair(7, 5, 2)
    optimizer = LoraPro([A, B], [(A, B, 2.0)], lr=1e-2)
    for _ in range(2):
        A.grad, B.grad = torch.full_like(A, torch.nan), torch.full_like(B, torch.nan)
        optimizer.step()
    assert A.isnan().all() and B.isnan().all()


# -- over a model ---------------------------------------------------------------------------------


def model() -> Any:
    return attach(
        causal_model("llama"),
        LoraConfig(
            r=2,
            target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["norm"],
            use_rslora=True,
            alpha_pattern={"embed_tokens": 7},
        ),
    )


def test_pairs_have_the_scales_of_their_modules() -> None:
    made = model()
    replica = shard(made)
    for pair, path in zip(replica.pairs, made.dlora.adapted, strict=True):
        adapter = made.get_submodule(path).adapter
        assert pair.A is adapter.lora_A and pair.B is adapter.lora_B
        assert pair.scaling == made.dlora.config.scaling_for(path)
    assert len({pair.scaling for pair in replica.pairs}) == 2


@pytest.mark.parametrize("moments", ["low", "full"])
def test_the_loss_goes_down(moments: str) -> None:
    made = model()
    replica = shard(made)
    lr = 1e-2 if moments == "low" else 2e-3
    optimizer = replica.attach_optimizer(
        LoraPro(replica.parameter_groups(lr=lr), replica.pairs, moments=moments)
    )
    ids, losses = token_ids(), []
    for _ in range(12):
        loss = made(ids, labels=ids).loss
        loss.backward()
        replica.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in trainable_parameters(made).values())


def test_refusals() -> None:
    A, B = drawn_pair(7, 5, 2)
    replica = shard(model())
    assert "expected one of low, full, got 'some'" in refusal(
        LoraPro, [A, B], [(A, B, 1.0)], moments="some"
    )
    assert "are not among its parameters" in refusal(LoraPro, [A], [(A, B, 1.0)])
    groups = replica.parameter_groups(lr=1e-3, loraplus_lr_ratio=4.0)
    assert "have the learning rates 0.001 and 0.004" in refusal(LoraPro, groups, replica.pairs)
    wrong = nn.Parameter(torch.zeros(7, 3))
    assert "are not a pair" in refusal(LoraPro, [A, wrong], [(A, wrong, 1.0)])


def test_divided_parts_are_refused() -> None:
    replica = shard(model(), optimizer_state="divided")
    said = refusal(LoraPro, replica.parameter_groups(lr=1e-3), replica.pairs)
    assert 'optimizer_state="replicated"' in said


def test_an_adapter_with_a_third_factor_is_refused() -> None:
    made = model()
    replica = shard(made)
    made.get_submodule(made.dlora.adapted[0]).adapter.lora_E = nn.Parameter(torch.ones(2, 1))
    with pytest.raises(UsageError, match="^LoraPro: the adapter at .* has lora_E beside A and B"):
        _ = replica.pairs
