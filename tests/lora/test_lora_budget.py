"""AdaLoRA's schedule, choice and averages, against exact fractions and the paper's formulas."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from dlora import AdaLoraConfig
from dlora.lora.adalora import importance
from dlora.lora.adalora.budget import BudgetSchedule, best

GOLDEN = {10: 24, 11: 23, 20: 18, 27: 14, 45: 10, 62: 8, 80: 8}  # methods.md, section 11


def test_golden_schedule() -> None:
    schedule = BudgetSchedule(24, 8, total_step=100, tinit=10, tfinal=20, deltaT=1)
    assert {t: schedule.budget(t) for t in GOLDEN} == GOLDEN
    assert [schedule.budget(t) for t in (0, 1, 9)] == [24] * 3
    assert [schedule.budget(t) for t in (81, 99, 100)] == [8] * 3


@st.composite
def schedules(draw: st.DrawFn) -> BudgetSchedule:
    tinit, tfinal = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    pruning = draw(st.integers(1, 10**6))
    final = draw(st.integers(0, 10**7))
    return BudgetSchedule(
        final + draw(st.integers(0, 10**9)),
        final,
        tinit + pruning + tfinal,
        tinit,
        tfinal,
        draw(st.integers(1, min(pruning, 50))),
    )


@settings(max_examples=200, deadline=None)
@given(schedules(), st.data())
def test_budgets_are_the_formula_s_exact_integers(schedule: BudgetSchedule, data) -> None:
    """Float arithmetic is one off here and there; the same ranks would then keep other triplets."""
    t = data.draw(st.integers(0, schedule.total_step))
    length = schedule.total_step - schedule.tinit - schedule.tfinal
    progress = min(max(Fraction(t - schedule.tinit, length), Fraction(0)), Fraction(1))
    exact = schedule.final + (schedule.initial - schedule.final) * (1 - progress) ** 3
    assert type(schedule.budget(t)) is int
    assert schedule.budget(t) == floor(exact)
    assert schedule.budget(t) >= schedule.budget(t + 1) >= schedule.final


@pytest.mark.parametrize("tfinal", [0, 7])
@pytest.mark.parametrize("deltaT", [1, 3, 4, 20])
@pytest.mark.parametrize("tinit", [0, 5])
def test_masks_fall_on_multiples_of_delta_t_and_at_the_end(
    tinit: int, deltaT: int, tfinal: int
) -> None:
    schedule = BudgetSchedule(24, 8, 40, tinit, tfinal, deltaT)
    masks = [t for t in range(45) if schedule.masks(t)]
    pruning = range(tinit + 1, 40 - tfinal + 1)
    assert masks == sorted({t for t in pruning if t % deltaT == 0} | {40 - tfinal})
    assert schedule.last == masks[-1]
    assert schedule.budget(masks[-1]) == 8
    assert [t for t in range(45) if schedule.scores(t)] == list(range(40 - tfinal))


MISTAKES = {
    "no step left": ({"total_step": 10, "tinit": 6, "tfinal": 4}, "tinit: "),
    "less than none": ({"total_step": 10, "tinit": 0, "tfinal": 11}, "tinit: "),
    "too rare": ({"total_step": 10, "tinit": 2, "tfinal": 2, "deltaT": 7}, "deltaT: 7 "),
    "grows": ({"init_r": 4, "target_r": 5}, "target_r: 5 "),
    "no init_r": ({"init_r": 0}, "init_r: "),
    "half a rank": ({"init_r": 4.5}, "init_r: "),
    "bool": ({"target_r": True}, "target_r: "),
    "no target_r": ({"target_r": 0}, "target_r: "),
    "negative tinit": ({"tinit": -1}, "tinit: "),
    "negative tfinal": ({"tfinal": -1}, "tfinal: "),
    "deltaT 0": ({"deltaT": 0}, "deltaT: "),
    "no steps": ({"total_step": 0}, "total_step: "),
    "beta1": ({"beta1": 1.0}, "beta1: "),
    "beta2": ({"beta2": -0.1}, "beta2: "),
    "nan": ({"orth_reg_weight": float("nan")}, "orth_reg_weight: "),
    "negative weight": ({"orth_reg_weight": -0.5}, "orth_reg_weight: "),
    "importance": ({"importance": "size"}, "importance: expected one of "),
    "unit": ({"budget_unit": "bytes"}, "budget_unit: expected one of "),
    "ranks": ({"rank_pattern": {"q": 3}}, "rank_pattern: "),
    "inherited": ({"lora_dropout": 1.0}, "lora_dropout: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_that_names_the_key(mistake: str) -> None:
    given_, start = MISTAKES[mistake]
    assert refusal(AdaLoraConfig, **given_).startswith(start)


def test_edges_that_are_no_mistakes() -> None:
    AdaLoraConfig(init_r=3, target_r=3, total_step=1)
    AdaLoraConfig(total_step=10, tinit=4, tfinal=5, deltaT=1)
    config = AdaLoraConfig(init_r=6, target_r=2, r=99, beta1=0.0, beta2=0.0, orth_reg_weight=0.0)
    assert config.r == 6
    assert config.scaling_for("a.b") == 32 / 6  # of the initial rank, as in the paper's code


# -- which triplets stay --------------------------------------------------------------------------


def test_ties_go_to_the_first_and_the_number_is_exact() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 0.0])
    kept = {b: best(scores, b).nonzero().view(-1).tolist() for b in range(8)}
    assert kept == {
        0: [],
        1: [1],
        2: [1, 2],
        3: [1, 2, 4],
        4: [0, 1, 2, 4],
        5: [0, 1, 2, 4, 5],
        6: [0, 1, 2, 3, 4, 5],
        7: [0, 1, 2, 3, 4, 5, 6],
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_the_best_are_the_first_of_a_sorted_list(scores: list[int], budget: int) -> None:
    ordered = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    assert best(torch.tensor(scores).float(), budget).nonzero().view(-1).tolist() == sorted(ordered)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(0, 60),
)
def test_costs_never_exceed_the_budget_and_nothing_better_would_fit(
    triplets: list[tuple[int, int]], budget: int
) -> None:
    scores, costs = zip(*triplets, strict=True)
    keep = best(torch.tensor(scores).float(), budget, costs)
    spent = sum(cost for cost, kept in zip(costs, keep.tolist(), strict=True) if kept)
    assert spent <= budget
    for i, (score, cost) in enumerate(triplets):
        before = [j for j in range(len(costs)) if (-scores[j], j) < (-score, i) and keep[j]]
        assert bool(keep[i]) == (sum(costs[j] for j in before) + cost <= budget)


# -- what decides ---------------------------------------------------------------------------------


def test_golden_averages() -> None:
    """I = 1, 2, 0: methods.md, section 11."""
    average, uncertainty, one = torch.zeros(1).double(), torch.zeros(1).double(), torch.ones(1)
    golden = [
        (1.0, 0.15, 0.1275, 0.019125),
        (2.0, 0.4275, 0.34425, 0.147166875),
        (0.0, 0.363375, 0.34711875, 0.12613427578125),
    ]
    for sensitivity, i, u, s in golden:
        w = one.double() * -sensitivity  # the sign does not count
        importance.follow(w, one.double(), average, uncertainty, beta1=0.85, beta2=0.85)
        assert float(average) == pytest.approx(i, rel=1e-12)
        assert float(uncertainty) == pytest.approx(u, rel=1e-12)
        assert float(importance.element_scores(average, uncertainty)) == pytest.approx(s, rel=1e-12)


def test_sensitivity_alone_is_that_of_the_step() -> None:
    w, g, average = torch.randn(3, 50).double().unbind(0)
    importance.follow(w, g, average, None, beta1=0.85, beta2=0.85)
    assert torch.equal(average, (w * g).abs())
    assert importance.element_scores(average, None) is average


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = torch.randn(3, 2, 1000)
    found = []
    for chunk in (1 << 20, 64, 999, 1):
        monkeypatch.setattr(importance, "_CHUNK", chunk)
        averages = torch.zeros(2, 1000)
        for w, g in steps:
            importance.follow(w, g, *averages, beta1=0.85, beta2=0.6)
        found.append(averages)
    assert all(torch.equal(one, found[0]) for one in found)


def test_means_make_wide_and_narrow_matrices_comparable() -> None:
    scores = torch.arange(6.0).view(3, 2)
    assert importance.triplet_means(scores, 0).tolist() == [0.5, 2.5, 4.5]
    assert importance.triplet_means(scores.t(), 1).tolist() == [0.5, 2.5, 4.5]
    assert importance.triplet_means(scores[:, :1], 0).tolist() == [0.0, 2.0, 4.0]
    wide = scores.repeat(1, 8)
    assert torch.equal(importance.triplet_means(wide, 0), importance.triplet_means(scores, 0))
    assert importance.triplet_means(torch.empty(4, 0), 1).shape == (0,)
