"""AdaLoRA in a loop of one's own, against its formulas in plain torch: one process, all rows.

A rank's batch is its part of the same rows; parts differ in size, and one is empty. The reference
has parameters P, λ, Q of its own, lets autograd differentiate the loss and the regulariser, and
keeps averages and masks by the definitions of methods.md, section 11.
"""

import copy
import sys
from typing import Any

import pytest
import torch
from allocations import after_each_step
from ranks import Pools
from run_training import same_bits
from sampling import sampled
from torch import Tensor, nn
from toy import own_rank

from dlora import AdaLoraConfig, attach, shard

ROWS = [5, 0, 9, 4]  # of each rank
STEPS, TINIT, TFINAL, LAST = 14, 3, 3, 11
R, TARGET, ALPHA, BETA1, BETA2 = 4, 2, 8, 0.7, 0.8
MODULES = ("first", "side", "last")
SETTINGS = {"lr": 0.03, "weight_decay": 0.05}
# Whether the side branch takes part in a step, by rank; always in the first steps.
ALWAYS, NOWHERE, SOMEWHERE = "always", "on no rank for a while", "on rank 2 only for a while"


class Branches(nn.Module):
    """6 → 5 → 3, and a branch beside the middle that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (n, m) in {"first": (6, 5), "side": (5, 5), "last": (5, 3)}.items():
            layer = nn.Linear(n, m, bias=False)
            layer.weight.data = torch.randn(m, n, generator=generator) / n**0.5
            self.add_module(name, layer)

    def losses(self, x: Tensor, y: Tensor, side: bool) -> Tensor:
        """One loss for each row."""
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.side(h)) if side else h
        return (self.last(h) - y).square().sum(-1)


def batch(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randn(sum(ROWS), 9, generator=generator)
    return [(part[:, :6], part[:, 6:]) for part in rows.split(ROWS)]


def takes_part(when: str, step: int, rank: int) -> bool:
    if when == ALWAYS or not 5 <= step <= 8:
        return True
    return when == SOMEWHERE and rank == 2


def adapted(gamma: float, unit: str) -> Branches:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=R,
        target_r=TARGET,
        lora_alpha=ALPHA,
        target_modules=list(MODULES),
        total_step=STEPS,
        tinit=TINIT,
        tfinal=TFINAL,
        beta1=BETA1,
        beta2=BETA2,
        orth_reg_weight=gamma,
        budget_unit=unit,
    )
    model = attach(Branches(), config)
    assert isinstance(model, Branches)
    return model


def train(when: str, gamma: float, unit: str, divided: bool) -> dict[str, Any]:
    """What the allocator did on this rank, and what each step left."""
    model, rank = adapted(gamma, unit), own_rank()
    state = "divided" if divided else "replicated"
    replica = shard(model, base="none", optimizer_state=state)
    optimizer = replica.attach_optimizer(
        torch.optim.AdamW(replica.parameter_groups(lr=SETTINGS["lr"]))
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = SETTINGS["weight_decay"]
    allocator = replica.method
    assert allocator is not None
    seen: dict[str, Any] = {"values": [], "averages": [], "masks": {}, "orth": []}

    def see() -> None:
        seen["values"].append({n: p.detach().clone() for n, p in replica.named.items()})
        gathered = replica.strategy.gather_full(allocator.tensors()["scorer"], everywhere=True)
        seen["averages"].append({f"{name}.{kind}": a.clone() for name, kind, a in gathered})
        if allocator.step in allocator.masks:
            seen["masks"][allocator.step] = allocator.record()["kept"]

    with after_each_step(see):
        for step in range(1, STEPS + 1):
            x, y = batch(step)[rank]
            if len(x):  # a rank without rows makes no pass at all
                model.losses(x, y, takes_part(when, step, rank)).sum().backward()
            replica.reduce_gradients(len(x))
            seen["orth"].append(float(allocator.orth_loss))
            replica.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
    replica.audit()
    return seen


class Reference:
    """The same steps by the formulas."""

    def __init__(self, when: str, gamma: float, unit: str, world: int) -> None:
        self.when, self.gamma, self.world = when, gamma, world
        found = {
            n.replace(".adapter.lora_", "."): p for n, p in adapted(gamma, unit).named_parameters()
        }
        self.base = {m: found[f"{m}.weight"].detach() for m in MODULES}
        self.p = {
            f"{m}.{letter}": nn.Parameter(found[f"{m}.{letter}"].detach().clone())
            for m in MODULES
            for letter in "ABE"
        }
        self.cost = {m: sum(self.base[m].shape) + 1 if unit == "params" else 1 for m in MODULES}
        self.averages = {n: [torch.zeros_like(p), torch.zeros_like(p)] for n, p in self.p.items()}
        self.optimizer = torch.optim.AdamW(self.p.values(), **SETTINGS)
        self.kept: dict[str, list[int]] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        q, p, e = (self.p[f"{name}.{letter}"] for letter in "ABE")
        return x @ (self.base[name] + ALPHA / R * p @ torch.diag(e.view(-1)) @ q).t()

    def losses(self, x: Tensor, y: Tensor, side: bool) -> Tensor:
        h = torch.tanh(self.linear("first", x))
        h = h + torch.tanh(self.linear("side", h)) if side else h
        return (self.linear("last", h) - y).square().sum(-1)

    def regulariser(self) -> Tensor:
        norms = []
        for m in MODULES:
            q, p = self.p[f"{m}.A"], self.p[f"{m}.B"]
            norms += [torch.dist(g, torch.eye(len(g))) for g in (q @ q.t(), p.t() @ p)]
        return self.gamma * sum(norms) / len(norms)

    def step(self, step: int) -> float:
        rows = enumerate(batch(step)[: self.world])
        losses = [self.losses(x, y, takes_part(self.when, step, r)) for r, (x, y) in rows if len(x)]
        orth = self.regulariser()
        loss = torch.cat(losses).mean()
        (loss + orth if self.gamma else loss).backward()
        nn.utils.clip_grad_norm_(self.p.values(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if step < LAST:
                self.follow()
            if TINIT < step <= LAST:
                self.mask(step)
        self.optimizer.zero_grad()
        return float(orth.detach())

    def follow(self) -> None:
        for m in MODULES:
            if self.p[f"{m}.E"].grad is None:
                continue
            for name in (f"{m}.{letter}" for letter in "ABE"):
                ipt, unc = self.averages[name]
                importance = (self.p[name] * self.p[name].grad).abs()
                ipt.copy_(BETA1 * ipt + (1 - BETA1) * importance)
                unc.copy_(BETA2 * unc + (1 - BETA2) * (importance - ipt).abs())

    def mask(self, step: int) -> None:
        costs = [self.cost[m] for m in MODULES]
        first, final = R * sum(costs), TARGET * sum(costs)
        left, length = LAST - step, LAST - TINIT
        budget = final + (first - final) * left**3 // length**3
        scored = []
        for m in MODULES:
            s = {letter: self.averages[f"{m}.{letter}"] for letter in "ABE"}
            a, b, e = (s[letter][0] * s[letter][1] for letter in "ABE")
            scores = e.view(-1) + a.mean(1) + b.mean(0)
            scored += [(float(score), m, i) for i, score in enumerate(scores)]
        self.kept = {m: [] for m in MODULES}
        for _, m, i in sorted(scored, key=lambda triplet: -triplet[0]):  # stable, so by place
            if self.cost[m] <= budget:
                budget -= self.cost[m]
                self.kept[m].append(i)
        for m in MODULES:
            self.kept[m].sort()
            pruned = [i for i in range(R) if i not in self.kept[m]]
            self.p[f"{m}.E"][pruned] = 0.0
            if step == LAST:
                self.cut(m)

    def cut(self, m: str) -> None:
        """New parameters of what is left, with their part of AdamW's state."""
        for name, dim in {f"{m}.A": 0, f"{m}.B": 1, f"{m}.E": 0}.items():
            old, keep = self.p[name], torch.tensor(self.kept[m], dtype=torch.int64)
            self.p[name] = nn.Parameter(old.detach().index_select(dim, keep))
            state = self.optimizer.state.pop(old, {})
            self.optimizer.state[self.p[name]] = {
                slot: value.index_select(dim, keep) if value.ndim else value
                for slot, value in state.items()
            }
        self.optimizer.param_groups[0]["params"] = list(self.p.values())


def in_full(name: str) -> str:
    module, letter = name.split(".")
    return f"{module}.adapter.lora_{letter}"


CASES = [
    (ALWAYS, 0.5, "triplets"),
    (NOWHERE, 0.5, "triplets"),
    (NOWHERE, 0.0, "triplets"),
    (SOMEWHERE, 0.5, "params"),
    (SOMEWHERE, 0.0, "triplets"),
]


@pytest.mark.parametrize(
    ("world", "per_node", "divided"),
    sampled(
        [(1, 1, False), (3, 3, True), (4, 2, False)],
        [
            (*shape, divided)
            for shape in ((1, 1), (2, 2), (3, 3), (4, 2))
            for divided in (False, True)
        ],
    ),
)
@pytest.mark.parametrize(("when", "gamma", "unit"), CASES)
def test_every_step_follows_the_formulas(
    pools: Pools, world: int, per_node: int, divided: bool, when: str, gamma: float, unit: str
) -> None:
    """promise 2.6: a layer without a gradient keeps its averages.

    promise 2.9: after the last mask what was pruned costs nothing any more.
    """
    results = pools(world).run(train, when, gamma, unit, divided, ranks_per_node=per_node)
    reference = Reference(when, gamma, unit, world)
    still = []
    for step in range(1, STEPS + 1):
        before = copy.deepcopy(reference.averages)
        orth = reference.step(step)
        for got in results:
            values = got["values"][step - 1]
            assert same_bits(values, results[0]["values"][step - 1])
            assert got["orth"][step - 1] == pytest.approx(orth, rel=1e-5)
            if TINIT < step <= LAST:
                assert got["masks"][step] == reference.kept, step
            for name, parameter in reference.p.items():
                torch.testing.assert_close(
                    values[in_full(name)], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name
                )
            averages = got["averages"][step - 1]
            assert (averages != {}) == (step < LAST)
            for name, pair in reference.averages.items() if step < LAST else ():
                for kind, expected in zip(("exp_avg_ipt", "exp_avg_unc"), pair, strict=True):
                    mine = averages[f"{in_full(name)}.{kind}"]
                    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-7)
        if step < LAST and all(
            torch.equal(one, other)
            for name in ("side.A", "side.B", "side.E")
            for one, other in zip(before[name], reference.averages[name], strict=True)
        ):
            still.append(step)
    assert still == ([5, 6, 7, 8] if when == NOWHERE or (when == SOMEWHERE and world < 3) else [])


def calls_of_a_step(modules: int) -> int:
    """Python's and torch's calls in what the allocator does around an optimizer's step."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(modules)))
    config = AdaLoraConfig(
        init_r=2, target_r=1, total_step=10, tinit=7, tfinal=1, target_modules=r"\d+"
    )
    replica = shard(attach(model, config), base="none")
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=0.1))
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    for step in range(2):
        model(torch.ones(1, 4)).sum().backward()
        sys.setprofile(count if step else None)
        replica.method.before_reduce(1)
        sys.setprofile(None)
        replica.reduce_gradients(1)
        optimizer.step()
        sys.setprofile(count if step else None)
        replica.method.after_step(optimizer)
        sys.setprofile(None)
        optimizer.zero_grad()
    return counted


def test_the_work_around_a_step_grows_with_the_modules_alone() -> None:
    """Four times as many take four times as many calls; with the square it would be 16."""
    few, many = (calls_of_a_step(modules) for modules in (4, 16))
    assert 100 < few < many <= 4 * few
