"""Whether a run compiles its blocks: `train.compile`, and what `auto` makes of it.

Compiling costs minutes once and saves a share of every step, so `auto` weighs them:

    seconds saved = SAVED · steps · operations of a step / measured speed  >  COST
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.plan.choose import Decision
from dlora.training.compile_cache import check_cache

KEY = "train.compile"
COST_SECONDS = 180.0  # about what the graphs of a block take on a few cores, in all modes
SAVED = 0.1  # of the time of a step
_SIZE = 256  # of the matrices that the speed is measured with


@dataclass(frozen=True)
class Compiler:
    """What ranks have for compiling.

    Attributes:
        missing: what is missing of a compiler; "" if nothing is.
        speed: operations per second in matrix products.
    """

    missing: str = ""
    speed: float = 1e12


def find_compiler(device: str) -> Compiler:
    """What this rank has."""
    return Compiler(_missing(device), _speed(device))


def _missing(device: str) -> str:
    if device != "cpu" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if device != "cpu":  # Triton's launchers are C
        names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names if name):
        return f"there is no compiler ({', '.join(name for name in names[1:])})"
    return ""


def _speed(device: str) -> float:
    a = torch.ones(_SIZE, _SIZE, device=device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * _SIZE**3 / min(seconds)


def settle_compile(
    config: Config,
    decision: Decision,
    steps: int,
    compiler: Compiler,
    earlier: bool | None,
    announce: Callable[[str], None],
) -> bool:
    """Whether the run compiles; where `auto` does not, `announce` gets a line that says why.

    Args:
        steps: of the whole run.
        earlier: what the run that is resumed did; `auto` does the same.

    Raises:
        UsageError: it is set, and this run cannot; or the cache cannot be used.
    """
    setting = config.train.compile
    if setting is False:
        return False
    reason = why_not(decision, compiler)
    if reason and setting is True:
        raise UsageError(f"{KEY}: true: {reason}; set {KEY}: auto or false")
    if not reason and setting == "auto":
        if earlier is None:
            reason = _too_short(decision, steps, compiler)
        elif not earlier:
            reason = "as in the run that is resumed"
    if reason:
        announce(f"{KEY}: off: {reason}")
        return False
    check_cache(config.train.compile_cache, config.output.directory)
    return True


def why_not(decision: Decision, compiler: Compiler) -> str:
    """Why a run cannot compile, however long it is; "": it can."""
    placement = decision.plan.placement
    if placement.engine == "zero3" and placement.shard_size > 1:
        return (
            "sharding.engine: zero3 gathers weights by hooks inside of blocks, which a graph "
            "cannot have; fsdp2 has them outside"
        )
    return compiler.missing


def _too_short(decision: Decision, steps: int, compiler: Compiler) -> str:
    seconds = steps * decision.plan.flops / compiler.speed
    if SAVED * seconds > COST_SECONDS:
        return ""
    return (
        f"{steps} steps are estimated to take {max(1, round(seconds / 60))} min, too few to earn "
        "the time of compiling"
    )


def earlier_compile(settings: Mapping[str, Any] | None) -> bool | None:
    """What the run with these settings did; None if there was none, or it does not say."""
    found = (settings or {}).get("train", {}).get("compile")
    return found if isinstance(found, bool) else None


def changed_compile(settings: Mapping[str, Any] | None, compiles: bool) -> str:
    """A line where a resumed run computes in another way than before."""
    if settings is None or bool(earlier_compile(settings)) == compiles:
        return ""
    before, now = ("without", "with") if compiles else ("with", "without")
    return (
        f"{KEY}: the checkpoint was computed {before} graphs, the steps from here on {now}: they "
        "agree within rounding"
    )
