"""Whether a run compiles its blocks: `train.compile`, and what `auto` makes of it.

`auto` weighs what compiling costs against what it saves (`dlora.plan.graphs`) at the speed that a
matrix product has here.
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
from dlora.plan.graphs import no_graphs, no_graphs_of, too_short
from dlora.training.compile_cache import check_cache

KEY = "train.compile"
# Of the matrices that the speed is measured with.
_SIZES = {"cpu": 256}
_SIZE_ELSEWHERE = 4096


@dataclass(frozen=True)
class Compiler:
    """What ranks have for compiling.

    Attributes:
        missing: what is missing of a compiler; "" if nothing is.
        cache: why `train.compile_cache` cannot be used, where `auto` decides; "" if it can.
        speed: operations per second in matrix products.
    """

    missing: str = ""
    cache: str = ""
    speed: float = 1e12


def find_compiler(device: torch.device, dtype: torch.dtype) -> Compiler:
    """What this rank has, for products in a dtype."""
    return Compiler(_missing(device.type), speed=_speed(device, dtype))


def _missing(device: str) -> str:
    if device != "cpu" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if device != "cpu":  # Triton's launchers are C
        names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names if name):
        return f"there is no compiler ({', '.join(name for name in names[1:])})"
    return ""


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZES.get(device.type, _SIZE_ELSEWHERE)
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


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
    reason = no_graphs_of(config) or why_not(decision, compiler)
    if reason and setting is True:
        raise UsageError(f"{KEY}: true: {reason}; set {KEY}: auto or false")
    if not reason and setting == "auto":
        if earlier is None:
            reason = too_short(decision.plan, steps, compiler.speed)
        elif not earlier:
            reason = "as in the run that is resumed"
        reason = reason or compiler.cache
    if reason:
        announce(f"{KEY}: off: {reason}")
        return False
    check_cache(config.train.compile_cache, config.output.directory)
    return True


def why_not(decision: Decision, compiler: Compiler) -> str:
    """Why a run cannot compile, however long it is; "": it can."""
    return no_graphs(decision.plan) or compiler.missing


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
