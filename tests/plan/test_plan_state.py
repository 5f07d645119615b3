"""Optimizer state of Llama-7B's adapters against hand arithmetic."""

from dataclasses import replace

import pytest
from llama_shapes import FLOAT32, R, block_shapes, subject
from torch import nn

from dlora.config.load import OptimizerConfig
from dlora.config.recompute import Recompute
from dlora.plan.choose import decide
from dlora.plan.plan import Subject
from dlora.plan.state import modes, state_of
from dlora.plan.workload import Workload
from dlora.sharding.topology import Topology

ONE_NODE, TWO_NODES = Topology(0, 8, 8), Topology(0, 16, 8)
LORA_PRO = OptimizerConfig(name="lora_pro")
FULL = OptimizerConfig(name="lora_pro", lora_pro_moments="full")


def trained() -> dict[str, nn.Parameter]:
    return dict(subject("7B").trained)


def adapters() -> int:
    return 32 * sum(R * (m + n) for m, n in block_shapes("7B"))


@pytest.mark.parametrize("topology", [ONE_NODE, TWO_NODES])
def test_lora_pro_has_the_state_of_adamw_spread_over_ranks(topology: Topology) -> None:
    whole = state_of(OptimizerConfig(), trained(), topology, divided=False)
    spread = state_of(LORA_PRO, trained(), topology, divided=True)
    assert spread.whole == whole.whole == whole.held == 2 * FLOAT32 * adapters()
    assert whole.held / topology.world <= spread.held < 1.05 * whole.held / topology.world
    assert state_of(LORA_PRO, trained(), topology, divided=False).held == whole.held


def test_full_moments_are_two_tensors_of_every_adapted_weight() -> None:
    """51.8 GB for the linear layers of LLaMA-2-7B."""
    weights = 32 * sum(m * n for m, n in block_shapes("7B"))
    state = state_of(FULL, trained(), ONE_NODE, divided=True)
    assert state.whole == 2 * FLOAT32 * weights == pytest.approx(51.8e9, rel=1e-3)
    assert state.whole / 8 <= state.held < 1.05 * state.whole / 8
    assert state.stepping >= 4 * FLOAT32 * 11008 * 4096  # g̃, u and what they are made with


def test_what_was_stepped_is_gathered_once() -> None:
    """Half the bytes of a reduction, and what uneven shares add."""
    nbytes = FLOAT32 * adapters()
    state = state_of(LORA_PRO, trained(), ONE_NODE, divided=True)
    assert 7 / 8 * nbytes <= state.wire < 1.05 * 7 / 8 * nbytes
    assert state_of(LORA_PRO, trained(), ONE_NODE, divided=False).wire == 0
    across = state_of(LORA_PRO, trained(), TWO_NODES, divided=True)
    inside, between = 7 / 8 * nbytes, 1 / 2 * nbytes / 8
    assert inside + between <= across.wire < 1.05 * (inside + between)


def test_8_bit_moments_are_a_quarter() -> None:
    eight = state_of(OptimizerConfig(name="adamw8bit"), trained(), ONE_NODE, divided=False)
    assert eight.held == pytest.approx((2 + 8 / 256) * adapters(), rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "setting", "ranks", "expected"),
    [
        ("adamw", "auto", 8, [False, True]),
        ("adamw", "divided", 8, [True]),
        ("lora_pro", "auto", 8, [True]),
        ("lora_pro", "auto", 1, [False]),
        ("lora_pro", "replicated", 8, [False]),
        ("adamw8bit", "auto", 8, [False]),
    ],
)
def test_what_may_be_divided(
    optimizer: str, setting: str, ranks: int, expected: list[bool]
) -> None:
    workload = Workload(1, 8, 1, OptimizerConfig(name=optimizer), Recompute())
    assert modes(workload, setting, ranks) == expected


def test_the_chosen_plan_spreads_lora_pro() -> None:
    found = subject("small")
    workload = replace(found.workload, optimizer=LORA_PRO)
    pro = Subject(found.skeleton, found.trained, workload, device="cuda")
    where = {"engine": "fsdp2", "base": "none", "optimizer_state": "auto", "capacity": None}
    decision, adamw = (decide(one, ONE_NODE, **where) for one in (pro, found))  # type: ignore
    assert decision.plan.divided and not adamw.plan.divided
    assert decision.plan.memory.adapters == adamw.plan.memory.adapters
    assert decision.plan.memory.state < adamw.plan.memory.state / 7
    assert decision.plan.reduction == pytest.approx(1.5 * adamw.plan.reduction, rel=0.05)
