"""From the same command line on every rank to the same preparation, or to one error line.

enter      the command line, parsed on every rank
lock       output.dir is this run's: nothing is written or fetched before
prepared   the checkpoint to resume, then data, model and plan
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from dlora.base.model import DTYPES
from dlora.base.native import AUTO_DTYPE, multiplies_natively
from dlora.config.load import SCHEMA, Config, Options, parse
from dlora.errors import UsageError
from dlora.metrics.trackers import import_trackers
from dlora.plan.capacity import free_bytes
from dlora.quant.dequantize import bitsandbytes_kernel
from dlora.runtime.agreement import agree, broadcast, gather
from dlora.runtime.console import console
from dlora.runtime.determinism import set_environment
from dlora.runtime.memory import use_huge_pages
from dlora.runtime.ranks import Ranks, own_device
from dlora.runtime.run_lock import LEASE_SECONDS, STALE_SECONDS, RunLock
from dlora.sharding.topology import Topology
from dlora.training.checks import check_output
from dlora.training.compile_cache import unusable
from dlora.training.find_checkpoint import ResumePoint, find_checkpoint
from dlora.training.material import Surroundings
from dlora.training.node_data import NodeData
from dlora.training.prepare import prepare
from dlora.training.settle_compile import Compiler, find_compiler
from dlora.training.settle_dtype import settle_dtype


def enter(
    argv: list[str], prog: str, first: Callable[[], None], extra: type | None = None
) -> tuple[Ranks, Options | None]:
    """Parse the command line, join the other ranks, and check that all of them succeeded.

    Args:
        first: called before; a `UsageError` of it counts as one of the command line.
        extra: further options, as of `parse`.

    Returns:
        The ranks and the options; None in their place where the command only printed something
        (`--help`, `--print_config`), which rank 0 has done.

    Raises:
        UsageError: on every rank, if a command line or a configuration file is wrong on any.
    """
    use_huge_pages()
    printed, options, failure, device = io.StringIO(), None, None, torch.device("cpu")
    try:
        device = own_device()
        first()
        with contextlib.redirect_stdout(printed):
            options = parse(argv, prog, extra)
    except UsageError as error:
        failure = error
    except SystemExit:
        pass
    timeout = SCHEMA["sharding.timeout_seconds"].default
    if options is not None:
        timeout = options.config.sharding.timeout_seconds
    ranks = Ranks.from_environment(timeout, device)

    def work() -> tuple[Options | None, str]:
        if failure is not None:
            raise failure
        return options, ""

    options = agree(ranks, "command line", work)
    if options is None:
        console.info(printed.getvalue().rstrip("\n"))
        ranks.leave()
    return ranks, options


def lock_output(config: Config, ranks: Ranks) -> RunLock:
    """The lock of `output.dir`, which rank 0 takes for all ranks.

    Raises:
        UsageError, TransientError: as `check_output` and `RunLock.take`, on every rank.
    """

    def take() -> tuple[RunLock | None, str]:
        if not ranks.main:
            return None, ""
        check_output(config)
        lock = RunLock(config.output.directory)
        lock.take()
        return lock, ""

    lock = agree(ranks, "lock", take, patience_seconds=STALE_SECONDS + LEASE_SECONDS)
    token = broadcast(ranks, "lock/token", lock and lock.token)
    return lock or RunLock(config.output.directory, token)


def prepared(
    config: Config, ranks: Ranks, how: Callable[..., Any] = prepare, *, check: bool = False
) -> Any:
    """What `prepare` finds out, the same on every rank, from the checkpoint that rank 0 sees.

    Args:
        how: that one, or the `prepare_together` of several adapters.
        check: write nothing, so fetch no checkpoint from `output.remote`.

    Raises:
        UsageError: on every rank, with the first failing rank's message.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    everywhere = gather(ranks, "ranks of a node", here)
    topology = Topology.over(ranks.rank, everywhere, config.sharding.ranks_per_node)

    def find() -> tuple[ResumePoint | None, str]:
        if not ranks.main:
            return None, ""
        if check:
            check_output(config)
        return find_checkpoint(config, console.info, fetch=not check), ""

    found = agree(ranks, "checkpoint", find)
    found = broadcast(ranks, "checkpoint/found", found and asdict(found))
    resumed = ResumePoint(**found) if found else None
    free = gather(ranks, "free", free_bytes(ranks.device, here))
    around = Surroundings(
        ranks.device.type,
        None if None in free else min(free),
        not check,
        _compiler(config, ranks),
    )

    if config.model.dtype == AUTO_DTYPE:
        natively = gather(ranks, "bfloat16", multiplies_natively(ranks.device.type))
        config = settle_dtype(config, resumed, all(natively), console.info)

    data = NodeData(ranks, topology, config.sharding.loading_timeout_seconds)

    def work() -> tuple[Any, str]:
        with data.preparing():
            found = how(config, topology, console.info, resumed, around, data.once)
        return found, found.fingerprint

    return agree(ranks, "preparation", work)


def _compiler(config: Config, ranks: Ranks) -> Compiler:
    """What all ranks have for compiling: what is missing on any, and the speed of the slowest."""
    if config.train.compile is False or config.adapters:
        return Compiler()
    set_environment(config.train.deterministic)
    own = find_compiler(ranks.device, DTYPES.get(config.model.dtype, torch.float32))
    if config.train.compile == "auto":
        own = replace(own, cache=unusable(config.train.compile_cache, config.output.directory))
    found = gather(ranks, "compiler", asdict(own))
    return Compiler(
        missing=next((one["missing"] for one in found if one["missing"]), ""),
        cache=next((one["cache"] for one in found if one["cache"]), ""),
        speed=min(one["speed"] for one in found),
    )


def import_late_ones(config: Config) -> None:
    """Import early what would count towards the run's memory if it were imported later."""
    for name in ("transformers.models.auto.modeling_auto", "transformers.modeling_utils"):
        importlib.import_module(name)
    if os.environ.get("RANK", "0") == "0":  # it alone reports
        import_trackers(config.output.report_to)
    if config.model.quantization.startswith("nf4"):
        bitsandbytes_kernel()
    if config.train.compile is True:
        importlib.import_module("torch._inductor.compile_fx")
