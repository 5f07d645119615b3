"""A mixture of LoRA experts: its formulas written out token by token, and its balance loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_models import randomize_trainable, relative_error
from refusals import refusal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dlora import LoraConfig, MolaConfig, UsageError, activate, attach, merge, shard
from dlora.lora.balance import balance_loss
from dlora.lora.dropout import SampleKeys
from dlora.lora.functional_experts import chosen_of, gates_of
from dlora.lora.variants.mola import MolaAdapter

M, N, E, K = 5, 6, 4, 2
# Sizes of every expert: equal ones, and others.
SIZES: dict[str, list[dict[str, Any]]] = {
    "alike": [{}] * E,
    "different": [{"r": 1}, {"r": 3, "lora_alpha": 2}, {"r": 2, "use_rslora": True}, {"r": 3}],
}
GOLDEN = torch.tensor([[2, 1, 0, -1], [0, -1, 3, 1], [1, 0, -1, 4]], dtype=torch.float64)


def layer(
    sizes: str = "alike", dtype: torch.dtype = torch.float64, seed: int = 3, **settings: Any
) -> nn.Sequential:
    """One adapted layer with random experts and a random router."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(N, M)).to(dtype)
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["0"], "experts": E, "top_k": K}
    attach(model, MolaConfig(**given | {"expert_settings": SIZES[sizes]} | settings))
    randomize_trainable(model)
    return model


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*(shape or (2, 7)), N, dtype=dtype)


def adapter_of(model: nn.Module) -> MolaAdapter:
    adapter = model[0].adapter  # type: ignore[index]
    assert isinstance(adapter, MolaAdapter)
    return adapter


def written_out(model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """y by a loop over tokens and experts in float64, and autograd's gradients of Σ sin(y)."""
    host, adapter = model[0], adapter_of(model)
    parts = {n: p.detach().double().requires_grad_() for n, p in adapter.named_parameters()}
    A = parts["lora_A"].split(adapter.experts.ranks)
    B = parts["lora_B"].split(adapter.experts.ranks, dim=1)
    x = x.detach().double().requires_grad_()
    rows = []
    for token in x.reshape(-1, N):
        y = host.weight.double() @ token + host.bias.double()
        p = torch.softmax(parts["lora_router"] @ token, 0)
        values = p.tolist()
        best = sorted(range(len(p)), key=lambda e: (-values[e], e))[: adapter.experts.top_k]
        for e in best:
            gate = p[e] / sum(p[j] for j in best)
            y = y + gate * adapter.experts.scalings[e] * (B[e] @ (A[e] @ token))
        rows.append(y)
    y = torch.stack(rows).view(*x.shape[:-1], M)
    y.sin().sum().backward()
    assert x.grad is not None
    return y.detach(), {name: part.grad for name, part in parts.items()}, x.grad  # type: ignore[misc]


# -- the definition -------------------------------------------------------------------------------


def test_the_golden_router() -> None:
    chosen = chosen_of(GOLDEN, 2)
    gates = gates_of(GOLDEN, chosen)
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for row, (experts, values) in enumerate(
        [
            ((0, 1), (0.73105858, 0.26894142)),
            ((2, 3), (0.88079708, 0.11920292)),
            ((3, 0), (0.95257413, 0.04742587)),
        ]
    ):
        wanted[row, list(experts)] = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(gates, wanted, rtol=0, atol=1e-8)
    p = GOLDEN.softmax(1)
    loss, f, count = balance_loss(torch.stack([chosen.double().sum(0), p.sum(0), gates.sum(0)]), 2)
    torch.testing.assert_close(f, torch.tensor([2, 1, 1, 2], dtype=torch.float64) / 3)
    assert float(loss) == pytest.approx(2.136218514, abs=1e-9) and float(count) == 3


def test_of_equal_logits_the_first_are_chosen() -> None:
    chosen = chosen_of(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_a_loop_over_tokens(sizes: str) -> None:
    model, x = layer(sizes), tokens().requires_grad_()
    wanted, gradients, dx = written_out(model, x)
    y = model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad, dx, rtol=1e-10, atol=1e-12)
    for name, parameter in adapter_of(model).named_parameters():
        assert gradients[name].any()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_update_alone_is_what_is_added(sizes: str) -> None:
    """As it is summed beside adapters with names."""
    model, x = layer(sizes), tokens()
    host, adapter = model[0], adapter_of(model)
    update = adapter.linear_update(x, host.weight)
    base = nn.functional.linear(x, host.weight, host.bias)
    torch.testing.assert_close(base + update, model(x), rtol=1e-12, atol=1e-12)
    given = list(adapter.parameters())
    loops = torch.autograd.grad(model(x).sin().sum(), given)
    found = torch.autograd.grad((base + adapter.linear_update(x, host.weight)).sin().sum(), given)
    for one, other in zip(found, loops, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_expert_is_a_lora(dtype: torch.dtype, dropout: float) -> None:
    """Bit for bit, from its start through training steps."""

    def trained(config: LoraConfig) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(N, 8), nn.Tanh(), nn.Linear(8, M)).to(dtype)
        attach(model, config)
        replica = shard(model)
        optimizer = torch.optim.AdamW(replica.parameter_groups(lr=0.1))
        for step in range(3):
            torch.manual_seed(step)
            model(tokens(9, dtype=dtype, seed=step)).float().square().sum().backward()
            replica.reduce_gradients()
            optimizer.step()
            replica.zero_grad()
        return {n: p.detach().clone() for n, p in replica.named.items() if "router" not in n}

    common: dict[str, Any] = {"r": 3, "lora_alpha": 6, "lora_dropout": dropout}
    common["target_modules"] = ["0", "2"]
    lora, mola = LoraConfig(**common), MolaConfig(**common, experts=1, top_k=1)
    wanted, found = trained(lora), trained(mola)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_equal_experts_do_not_depend_on_the_router() -> None:
    model, x = layer(), tokens()
    adapter = adapter_of(model)
    with torch.no_grad():
        for A, B in adapter.of_each()[1:]:
            A.copy_(adapter.of_each()[0][0])
            B.copy_(adapter.of_each()[0][1])
        before = model(x)
        adapter.lora_router.normal_(0, 3)
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_order_of_experts_does_not_matter(sizes: str) -> None:
    order = [2, 0, 3, 1]
    model, x = layer(sizes), tokens()
    other = layer(sizes, expert_settings=[SIZES[sizes][e] for e in order])
    mine, theirs = adapter_of(model), adapter_of(other)
    with torch.no_grad():
        for (A, B), e in zip(theirs.of_each(), order, strict=True):
            A.copy_(mine.of_each()[e][0])
            B.copy_(mine.of_each()[e][1])
        theirs.lora_router.copy_(mine.lora_router[order])
        torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


def test_it_starts_at_the_base_with_another_a_for_each_expert() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 30))
    before = model(torch.ones(2, 400))
    attach(model, MolaConfig(r=4, target_modules=["0"], experts=5))
    assert torch.equal(model(torch.ones(2, 400)), before)
    adapter = adapter_of(model)
    As = [A for A, _ in adapter.of_each()]
    assert all(not torch.equal(one, As[0]) for one in As[1:]) and not adapter.lora_B.any()
    assert all(float(A.abs().max()) <= 400**-0.5 for A in As)
    assert float(adapter.lora_router.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_logits_are_of_the_masters_precision() -> None:
    """A router in bfloat16 would choose other experts for some tokens."""
    model, x = layer(dtype=torch.float32), tokens(500, dtype=torch.float32).bfloat16()
    adapter = adapter_of(model)
    with torch.no_grad():
        adapter.lora_router[1] = adapter.lora_router[0] * (1 + 2**-12)
        whole = x.float() @ adapter.lora_router.t()
        model[0].to(torch.bfloat16)
        adapter.float()
        with torch.no_grad():
            adapter.lora_router.copy_(layer(dtype=torch.float32)[0].adapter.lora_router)
            adapter.lora_router[1] = adapter.lora_router[0] * (1 + 2**-12)
        sums = adapter.balance(0.0)
    model.train()(x).sum().backward()
    assert torch.equal(sums.totals[0], chosen_of(whole, K).float().sum(0))
    rounded = (x @ adapter.lora_router.bfloat16().t()).float()
    assert not torch.equal(sums.totals[0], chosen_of(rounded, K).float().sum(0))


# -- the balance loss -----------------------------------------------------------------------------


def after_passes(model: nn.Module, passes: list[Callable[[], Tensor]], tokens: int) -> Any:
    """The replica after backward passes and their reduction."""
    replica = shard(model)
    for each in passes:
        each().backward()
    replica.reduce_gradients(tokens=tokens)
    return replica


def test_it_is_transformers_loss_and_its_gradient_by_the_router() -> None:
    """With padding, in one pass and in several: the mean over routers, and what it adds to R."""
    x, lengths, c = tokens(3, 8), [8, 5, 3], 0.3
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()

    def made(coefficient: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, M)).double()
        config = {"r": 3, "target_modules": ["0", "1"], "experts": E, "top_k": K}
        attach(model, MolaConfig(**config, balance_coef=coefficient))
        randomize_trainable(model)
        return model

    def part(model: nn.Module, rows: list[int]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            keys = SampleKeys(0, 0, rows, [lengths[row] for row in rows])
            width = max(keys.lengths)
            with model.dlora.stream.keyed(keys):  # type: ignore[union-attr]
                y = model(x[rows, :width])
                return (y.sin() * mask[rows, :width, None]).sum()

        return run

    none = made(0.0)
    after_passes(none, [part(none, [0, 1, 2])], 16)
    for split in ([[0, 1, 2]], [[2], [0], [1]], [[1], [0, 2]]):
        model = made(c)
        replica = after_passes(model, [part(model, rows) for rows in split], 16)
        with torch.no_grad():
            inputs = [x, made(0.0)[0](x)]  # type: ignore[index]
        routers = [layer.adapter.lora_router for layer in model]  # type: ignore[union-attr]
        total = theirs = torch.zeros((), dtype=torch.float64)
        leaves = [router.detach().clone().requires_grad_() for router in routers]
        for given, R in zip(inputs, leaves, strict=True):
            logits = (given @ R.t()).view(-1, E)
            theirs = theirs + load_balancing_loss_func((logits,), E, K, mask) / 2  # type: ignore[operator]
            counted = logits[mask.view(-1).bool()]
            f = chosen_of(counted.detach(), K).double().mean(0)
            total = total + E * (f * counted.softmax(1).mean(0)).sum() / 2
        asked = torch.autograd.grad(c * theirs, leaves, retain_graph=True)
        (c * total).backward()
        assert total.item() == pytest.approx(theirs.item(), rel=1e-6)  # which is float32
        replica.method.after_step(torch.optim.SGD(routers, lr=0.1))
        assert replica.method.metrics() == {"aux_loss": pytest.approx(total.item(), rel=1e-12)}
        for layers in zip(model, none, leaves, asked, strict=True):  # type: ignore[call-overload]
            own, other, leaf, theirs_of = layers
            added = own.adapter.lora_router.grad - other.adapter.lora_router.grad
            torch.testing.assert_close(added, leaf.grad, rtol=1e-9, atol=1e-13)
            assert relative_error(added, theirs_of) < 1e-6
            for name in ("lora_A", "lora_B"):  # nothing but routers gets a gradient of it
                mine, theirs = (getattr(each.adapter, name).grad for each in (own, other))
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_passes_count_once(reentrant: bool) -> None:
    model, x = layer(), tokens().requires_grad_()
    sums = adapter_of(model).balance(1.0)
    model(x).sum().backward()
    wanted = [sums.totals.clone(), sums.pairs.clone()]  # type: ignore[union-attr]
    sums.zero_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(sums.totals, wanted[0]) and torch.equal(sums.pairs, wanted[1])  # type: ignore[arg-type]
    assert float(sums.totals[0].sum()) == K * 14


def test_passes_without_gradients_and_in_eval_mode_do_not_count() -> None:
    model, x = layer(), tokens()
    sums = adapter_of(model).balance(1.0)
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    assert not sums.totals.any()


def test_an_attention_mask_says_what_is_padding() -> None:
    """In a loop of the user's own, where no keys do."""

    class Masked(nn.Sequential):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Masked(nn.Linear(N, M))
    attach(model, MolaConfig(r=2, target_modules=["0"], experts=E, top_k=K))
    replica, x = shard(model), tokens(2, 7, dtype=torch.float32)
    mask = (torch.arange(7) < torch.tensor([[7], [3]])).long()
    model(x, attention_mask=mask).sum().backward()
    sums = adapter_of(model).sums
    assert sums is not None and float(sums.totals[0].sum()) == K * 10
    model(x).sum().backward()
    assert float(sums.totals[0].sum()) == K * 24
    replica.reduce_gradients()
    assert not sums.totals.any() and not sums.pairs.any()  # type: ignore[union-attr]


def test_packed_rows_and_passes_without_sequences() -> None:
    model = layer()
    sums, stream = adapter_of(model).balance(1.0), model.dlora.stream  # type: ignore[union-attr]
    with stream.keyed(SampleKeys(0, 0, [1, 2], [5, 6], row=16)):  # type: ignore[union-attr]
        model(tokens(1, 16)).sum().backward()
    assert float(sums.totals[0].sum()) == K * 11
    with stream.keyed(SampleKeys(0, 0, [], [])):  # type: ignore[union-attr]
        model(tokens(1, 8)).sum().backward()
    assert float(sums.totals[0].sum()) == K * 11


def test_total_collapse_and_equal_use() -> None:
    """All tokens on 2 of 4 experts: 4; all experts alike: k."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert float(balance_loss(torch.stack([torch.tensor([1.0, 1, 0, 0]), p[0], p[0]]), 2)[0]) == 4
    alike = torch.full((3, 4), 2.0, dtype=torch.float64)
    assert float(balance_loss(alike * torch.tensor([[2.0], [1], [1]]), 2)[0]) == 2
    assert float(balance_loss(torch.zeros(3, 4), 2)[0]) == 0


# -- beside others, and what it is not -----------------------------------------------------------


def test_adapters_with_names_are_added() -> None:
    model, x = layer(), tokens()
    before = model(x)
    attach(model, LoraConfig(r=2, target_modules=["0"]), name="more")
    randomize_trainable(model[0].adapters)  # type: ignore[arg-type]
    activate(model, ["default", "more"])
    host: Any = model[0]
    more = host.adapters.more
    wanted = before + more.scaling * (x @ more.lora_A.t()) @ more.lora_B.t()
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_what_it_is_not_is_refused_in_one_line() -> None:
    assert refusal(MolaConfig, experts=2, top_k=3) == "top_k: 3 is more than the 2 experts"
    for settings, name in (
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"modules_to_save": ["0"]}, "modules_to_save"),
        ({"target_parameters": ["0"]}, "target_parameters"),
        ({"experts_from": ["a", "b"], "experts": 3}, "experts"),
        ({"balance_coef": -1.0}, "balance_coef"),
        ({"expert_settings": [{}], "experts": 2}, "expert_settings"),
    ):
        assert refusal(MolaConfig, **settings).startswith(f"{name}: ")
    named = refusal(attach, nn.Sequential(nn.Linear(3, 3)), MolaConfig(), "a")
    assert named == "attach: a mola adapter cannot have a name, such as 'a'"
    for host, what in (
        (nn.Embedding(4, 3), "an embedding"),
        (nn.Conv1d(3, 3, 2), "a convolution"),
    ):
        config = MolaConfig(target_modules=["0"])
        said = refusal(attach, nn.Sequential(host), config)
        assert said == f"target_modules: 0 is {what}, and mola adapts linear layers alone"
    with pytest.raises(UsageError, match="^merge: a mola adapter"):
        merge(layer())
