"""Methods beside a packed base: over ranks what they are on one process, exported to PEFT."""

from typing import Any

import pytest
from packed_runs import check_method
from run_training import Runs
from sampling import sampled

METHODS: dict[str, dict[str, Any]] = {
    "adalora": {
        "adapter__method": "adalora",
        "adapter__r": None,
        "adapter__init_r": 6,
        "adapter__target_r": 2,
        "adapter__tfinal": 1,
    },
    "rslora, lora+": {"adapter__use_rslora": True, "optimizer__loraplus_lr_ratio": 4},
    "flora": {"adapter__method": "flora", "adapter__flora_r_out": 3},
}


PACKED = (("fsdp2", "nf4", 3), ("zero3", "int8", 2))


@pytest.mark.parametrize(
    ("engine", "name", "world", "method"),
    sampled(  # 6 s each
        [("fsdp2", "nf4", 3, "adalora"), ("zero3", "int8", 2, "rslora, lora+")],
        [(*packed, method) for packed in PACKED for method in METHODS],
    ),
)
def test_a_method_beside_a_packed_base(
    run: Runs, saved_models: Any, engine: str, name: str, world: int, method: str
) -> None:
    settings = METHODS[method] | {"train__max_steps": 6}
    check_method(run, saved_models("blocks"), engine, name, world, **settings)
