"""What `model.dtype: auto` is in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dlora.base.native import AUTO_DTYPE, NATIVE
from dlora.config.load import Config
from dlora.training.find_checkpoint import ResumePoint


def settle_dtype(
    config: Config, resumed: ResumePoint | None, natively: bool, announce: Callable[[str], None]
) -> Config:
    """The configuration with a dtype in place of `auto`.

    A run that resumes keeps the dtype that its checkpoint records, whatever this machine is, since
    in another one it would be another run.

    Args:
        natively: whether every rank's device multiplies in bfloat16 natively.
    """
    if config.model.dtype != AUTO_DTYPE:
        return config
    dtype = NATIVE[0] if natively else NATIVE[1]
    here = "multiply" if natively else "do not all multiply"
    line = f"auto is {dtype}: the ranks' devices {here} in bfloat16 natively"
    recorded = resumed.settings.get("model", {}).get("dtype") if resumed else None
    if recorded in NATIVE:
        line = f"auto is {recorded}, as in the checkpoint"
        if recorded != dtype:
            line += f"; a fresh run would take {dtype} on these devices"
        dtype = recorded
    announce(f"model.dtype: {line}")
    return replace(config, model=replace(config.model, dtype=dtype))  # type: ignore[arg-type]
