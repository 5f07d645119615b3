"""Bytes of Llama shapes on 8 to 1024 devices, from a config file alone, against hand arithmetic."""

import pytest
from llama_shapes import BF16, FLOAT32, SHAPES, R, block_shapes, planned, subject

from dlora.sharding.topology import Topology, resolve_placement

PARAMETERS = {"7B": 6_738_415_616, "70B": 70_553_706_496, "405B": 405_853_388_800}  # published
MACHINES = [(1, 8), (2, 8), (16, 8), (128, 8)]


@pytest.mark.parametrize(("nodes", "per_node"), MACHINES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_fsdp2_bytes_are_those_of_the_shapes(name: str, nodes: int, per_node: int) -> None:
    hidden, layers, _, _, _, vocabulary = SHAPES[name]
    ranks = nodes * per_node
    world = planned(name, nodes, per_node, "world")
    node = planned(name, nodes, per_node, "node")

    block = sum(m * n for m, n in block_shapes(name)) + 2 * hidden
    table = vocabulary * hidden
    total = layers * block + 2 * table + hidden
    assert total == PARAMETERS[name]
    trained = layers * sum(R * (m + n) for m, n in block_shapes(name))
    assert world.trainable == node.trainable == trained
    assert world.base_total == BF16 * total
    for plan, size in ((world, ranks), (node, per_node)):
        padding = 0 if size <= 128 else 0.015  # rows that do not divide over 1024 ranks
        assert plan.base_held == pytest.approx(BF16 * total // size, rel=padding, abs=0)
        # Blocks twice (the last, which waits for backward, once) and the embedding once per
        # micro-batch, head and last norm once per step.
        gathered = BF16 * (2 * ((2 * layers - 1) * block + table) + table + hidden)
        assert plan.gathers == pytest.approx(gathered * (size - 1) / size, rel=padding, abs=1)
        assert plan.memory.adapters == pytest.approx(2 * FLOAT32 * trained, rel=1e-3)
        assert plan.memory.state == 2 * FLOAT32 * trained
        inside = 2 * (per_node - 1) / per_node * FLOAT32 * trained
        link = 2 * (nodes - 1) / nodes * FLOAT32 * trained
        assert plan.traffic.reduction.inside == pytest.approx(inside, rel=1e-3)
        assert plan.traffic.reduction.between == pytest.approx(link, rel=1e-3)
    assert node.traffic.gathers.between == 0
    crossing = world.gathers if nodes > 1 else 0
    assert world.traffic.gathers.between == pytest.approx(crossing, abs=1)


def test_zero3_gathers_modules_and_holds_vectors() -> None:
    hidden, layers, ffn, _, _, vocabulary = SHAPES["7B"]
    plan = planned("7B", 1, 8, "world", "zero3")
    matrices = layers * sum(m * n for m, n in block_shapes("7B"))
    gathered = BF16 * (2 * (2 * matrices + vocabulary * hidden) + vocabulary * hidden)
    assert plan.gathers == round(gathered * 7 / 8)
    vectors = BF16 * (2 * layers + 1) * hidden
    assert plan.base_held == BF16 * PARAMETERS["7B"] // 8 + vectors
    # Recomputation gathers a block's matrices once more, but for its last one.
    again = subject("7B", checkpointing=True).plan(plan.placement, plan.topology)
    more = 2 * BF16 * (matrices - layers * hidden * ffn) * 7 / 8
    assert again.gathers - plan.gathers == pytest.approx(more, abs=1)


@pytest.mark.parametrize(
    ("quantization", "bits"), [("nf4", 4.25), ("nf4-dq", 4.125), ("int8", 8.0)]
)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_packed_bytes_are_those_of_the_shapes(engine: str, quantization: str, bits: float) -> None:
    """At rest, gathered, and on the wire; and one layer that is de-quantised."""
    hidden, layers, ffn, _, _, vocabulary = SHAPES["7B"]
    shapes, table, ranks = block_shapes("7B"), vocabulary * hidden, 8
    rows = {"nf4": 0, "nf4-dq": 4, "int8": 4}[quantization]  # bytes of each, beside the bits
    matrices = layers * sum(m * n * bits / 8 + m * rows for m, n in shapes)
    vectors = BF16 * 2 * layers * hidden
    placement = resolve_placement(engine, "world", topology := Topology(0, ranks, ranks))
    packed = subject("7B", quantization=quantization)
    plan, plain = packed.plan(placement, topology), subject("7B").plan(placement, topology)
    assert plan.base_total == matrices + vectors + BF16 * (2 * table + hidden)
    last_norm = BF16 * hidden
    if engine == "zero3":  # which holds all vectors, beside its parts of them
        assert plan.base_held == plan.base_total // ranks + vectors + last_norm
        vectors = last_norm = 0
    else:
        assert plan.base_held == plan.base_total // ranks
    once = (matrices + vectors) / layers if engine == "fsdp2" else 0  # the last block
    gathered = 2 * (2 * (matrices + vectors) - once + BF16 * table) + BF16 * table + last_norm
    assert plan.gathers == pytest.approx(gathered * (ranks - 1) / ranks, abs=1)
    assert plan.trainable == plain.trainable and plan.flops == plain.flops
    more = plan.memory.activations.blocks - plain.memory.activations.blocks
    assert 0 < more <= BF16 * hidden * ffn
    assert plan.memory.activations.saved == plain.memory.activations.saved


def test_a_divided_state_is_one_part_and_no_more_bytes() -> None:
    whole = planned("70B", 2, 8, "node")
    divided = subject("70B").plan(whole.placement, whole.topology, divided=True)
    assert divided.memory.state == pytest.approx(whole.memory.state / 16, rel=1e-4)
    assert divided.reduction == pytest.approx(whole.reduction, rel=1e-3)
