"""Traces of a plan, each made once in a test run: hundreds of runs are of the same few models.

A run of a tiny model spends as long on the trace of its plan as on twenty steps. The tests of the
trace itself (`tests/plan/test_plan_trace.py`) call it as it is. Traces lie in files, as each rank
of each test file is another process.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlora.lora.names import RECORD, attached
from dlora.plan import plan
from dlora.plan.activations import Trace
from dlora.plan.trace import trace

FOLDER = "DLORA_TEST_TRACES"  # the variable that names it; conftest.py makes one


def remembered(skeleton: Any, *where: Any, task: Any, **how: Any) -> Trace:
    """`trace`, by everything that it is a function of; without a folder each time anew."""
    if FOLDER not in os.environ:  # soak.py
        return trace(skeleton, *where, task=task, **how)
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    known = (
        skeleton.config.to_json_string(use_diff=False),
        skeleton.config._attn_implementation,
        [(name, repr(own.config)) for name, own in attached(skeleton).items()],
        repr(getattr(skeleton.__dict__.get(RECORD), "segments", None)),
        repr(skeleton),
        [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors],
        where,
        (type(task), task.labels),
        sorted(how.items()),
    )
    file = Path(os.environ[FOLDER], hashlib.sha256(repr(known).encode()).hexdigest())
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps(asdict(trace(skeleton, *where, task=task, **how))))
        made.rename(file)
    return Trace(**json.loads(file.read_text()))


plan.trace = remembered  # type: ignore[attr-defined]
