"""Traces of a plan, each made once in a process: hundreds of runs are of the same few models.

A run of a tiny model spends as long on the trace of its plan as on twenty steps. The tests of the
trace itself (`tests/plan/test_plan_trace.py`) call it as it is.
"""

from typing import Any

from dlora.lora.attach import attachment_of
from dlora.plan import plan
from dlora.plan.activations import Trace
from dlora.plan.trace import trace

_traces: dict[tuple[Any, ...], Trace] = {}


def remembered(skeleton: Any, *where: Any, **how: Any) -> Trace:
    """`trace`, by everything that it is a function of."""
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    known = (
        skeleton.config.to_json_string(use_diff=False),
        skeleton.config._attn_implementation,
        repr(attachment_of(skeleton).config),
        repr(skeleton),
        tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors),
        where,
        tuple(sorted(how.items())),
    )
    if known not in _traces:
        _traces[known] = trace(skeleton, *where, **how)
    return _traces[known]


plan.trace = remembered  # type: ignore[attr-defined]
