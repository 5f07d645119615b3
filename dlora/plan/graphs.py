"""Whether blocks run as graphs of torch's compiler (`train.compile`), as far as a plan knows.

Compiling costs minutes once and saves a share of every step, so `auto` weighs them:

    seconds saved = SAVED · steps · operations of a step / speed  >  COST_SECONDS
"""

from __future__ import annotations

from dlora.config.load import Config
from dlora.plan.plan import Plan
from dlora.plan.speed import Speeds
from dlora.registry import room

COST_SECONDS = 180.0  # about what the graphs of a block take on a few cores, in all modes
SAVED = 0.1  # of the time of a step


def no_graphs(plan: Plan) -> str:
    """Why a placement cannot have graphs; "": it can."""
    if plan.placement.engine == "zero3" and plan.placement.shard_size > 1:
        return (
            "sharding.engine: zero3 gathers weights by hooks inside of blocks, which a graph "
            "cannot have; fsdp2 has them outside"
        )
    return ""


def no_graphs_of(config: Config) -> str:
    """Why the adapters' method or the objective cannot have graphs; "": it can."""
    if config.train.objective == "distill":
        return "train.objective: distill runs without graphs"
    method = room("lora.variants")[config.adapter.method]
    can = method.says.get("compiles", True)
    return "" if can else f"adapter.method: {method.name} has no graphs"


def too_short(plan: Plan, steps: int, speed: float) -> str:
    """Why graphs do not pay in so many steps; "": they do.

    Args:
        speed: operations per second of a rank.
    """
    seconds = steps * plan.flops / speed
    if SAVED * seconds > COST_SECONDS:
        return ""
    return (
        f"{steps} steps are estimated to take {max(1, round(seconds / 60))} min, too few to earn "
        "the time of compiling"
    )


def graphs_in_words(config: Config, plan: Plan, speeds: Speeds) -> str:
    """Whether a run with this plan compiles; what machines that are elsewhere have is not known."""
    setting, train = config.train.compile, config.train
    if setting is False:
        return "none (train.compile: false)"
    if reason := no_graphs_of(config) or no_graphs(plan):
        return f"none: {reason}"
    if setting is True:
        return "of each block, made before the first step"
    if speeds.flops is None or train.governed_by == "epochs":
        return (
            "of each block, where there is a compiler, the run is long enough to earn it and they "
            "prove faster"
        )
    if reason := too_short(plan, train.max_steps, speeds.flops):
        return f"none: {reason}"
    return "of each block, where there is a compiler and they prove faster"
