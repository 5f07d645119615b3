"""What AdaLoRA did in a run: watched inside the worker processes of `ranks.py`."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from run_training import prepared_run
from stopped_runs import Crash
from torch.optim.optimizer import register_optimizer_step_post_hook

from dlora.checkpoint.host_copy import capture

STEPS = 60  # in three phases: 8 of warm-up, 42 in which masks fall, 10 on what is left
ADALORA = {
    "adapter__r": None,
    "adapter__method": "adalora",
    "adapter__init_r": 4,
    "adapter__target_r": 2,
    "adapter__tinit": 8,
    "adapter__tfinal": 10,
    "adapter__deltaT": 2,
    "train__max_steps": STEPS,
    "train__global_batch_size": 5,  # divides by no number of ranks; on 4, three run short
    "output__save_every": STEPS,
}
LAST = 50  # the step of the last mask
MASKS = range(10, LAST + 1, 2)  # 8 is the last step of the warm-up
MODULES, INITIAL, FINAL = 14, 56, 28  # of the tiny llama; triplets


@contextmanager
def after_each_step(see: Callable[[], None]) -> Any:
    """Inside, `see` is called after every step of an optimizer and all that hangs on it."""
    handle = register_optimizer_step_post_hook(lambda *_: see())
    try:
        yield
    finally:
        handle.remove()


def budget(step: int) -> int:
    """The cubic schedule, in the integers of its definition."""
    if step <= 8:
        return INITIAL
    return FINAL + (INITIAL - FINAL) * max(LAST - step, 0) ** 3 // (LAST - 8) ** 3


def watched(argv: list[str], crash_in: int | None = None) -> dict[str, Any]:
    """A run, and the triplets that each of its masks left.

    Args:
        crash_in: the run dies in this step, as soon as its optimizer and AdaLoRA have made it.

    Returns:
        status, trained tensors, what a checkpoint would hold beside them (on rank 0 where saves are
        collective), and of the steps made by this start: `masks`, how many λ were not 0 after each
        mask, and bytes of averages kept here.
    """
    run = prepared_run(argv)
    replica, allocator = run.replica, run.replica.method
    seen: dict[str, Any] = {"masks": {}, "nonzero": {}, "averages": {}, "step": 0}

    def see() -> None:
        seen["step"] = step = allocator.step
        if step in allocator.masks:
            seen["masks"][step] = allocator.record()["kept"]
            values = [p for name, p in replica.named.items() if name.endswith("lora_E")]
            seen["nonzero"][step] = sum(int(value.count_nonzero()) for value in values)
        kept = [
            average
            for slots in allocator.tensors()["scorer"].values()
            for average in slots.values()
        ]
        seen["averages"][step] = 4 * sum(average.numel() for average in kept)
        if step == crash_in:
            raise Crash

    try:
        with after_each_step(see):
            seen["status"] = run.train()
    except Crash:
        return seen | {"status": "crashed"}
    held = capture(replica, replica.states(run.optimizer), {})
    return seen | {
        "tensors": {name: p.detach().clone() for name, p in replica.named.items()},
        "states": held and held.states,
        "shrunk": allocator.is_shrunk,
    }
