"""How every rank gets from the same command line to the same preparation, or to one error line."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable
from dataclasses import asdict

from dlora.config.load import SCHEMA, Config, Options, parse
from dlora.errors import UsageError
from dlora.plan.capacity import free_bytes
from dlora.quant.dequantize import bitsandbytes_kernel
from dlora.runtime.ranks import Runtime
from dlora.sharding.topology import Topology
from dlora.training.find_checkpoint import ResumePoint, find_start
from dlora.training.prepare import Preparation, Surroundings, prepare


def enter(argv: list[str], prog: str, first: Callable[[], None]) -> tuple[Runtime, Options | None]:
    """Understand the command line, join the other ranks, and see that all of them understood it.

    Args:
        first: called before; what it raises counts as what the command line does.

    Returns:
        The runtime and the options; None in their place where the command only printed something
        (`--help`, `--print_config`), which rank 0 has done.

    Raises:
        UsageError: on every rank, if a command line or a configuration file is wrong on any.
    """
    printed, options, failure = io.StringIO(), None, None
    try:
        first()
        with contextlib.redirect_stdout(printed):
            options = parse(argv, prog)
    except UsageError as error:
        failure = error
    except SystemExit:
        pass
    timeout = SCHEMA["sharding.timeout_seconds"].default
    runtime = Runtime.from_environment(
        options.config.sharding.timeout_seconds if options else timeout
    )

    def work() -> tuple[Options | None, str]:
        if failure is not None:
            raise failure
        return options, ""

    options = runtime.agree("command line", work)
    if options is None:
        runtime.say(printed.getvalue().rstrip("\n"))
        runtime.leave()
    return runtime, options


def prepared(config: Config, runtime: Runtime) -> Preparation:
    """What `prepare` finds out, the same on every rank, from the checkpoint that rank 0 sees.

    Raises:
        UsageError: on every rank, with the first failing rank's message.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world))
    everywhere = runtime.gather("ranks of a node", here)
    topology = Topology.over(runtime.rank, everywhere, config.sharding.ranks_per_node)

    def find() -> tuple[ResumePoint | None, str]:
        return (find_start(config, runtime.say) if runtime.main else None), ""

    found = runtime.agree("start", find)
    told = runtime.broadcast("start/found", found and asdict(found))
    start = ResumePoint(**told) if told else None
    free = runtime.gather("free", free_bytes(runtime.device, here))
    around = Surroundings(runtime.device.type, None if None in free else min(free))

    def work() -> tuple[Preparation, str]:
        found = prepare(config, topology, runtime.say, start, around)
        return found, found.fingerprint

    return runtime.agree("preparation", work)


def import_late_ones(config: Config) -> None:
    """What would be imported while a run's memory is counted."""
    importlib.import_module("transformers.models.auto.modeling_auto")
    if config.model.quantization.startswith("nf4"):
        bitsandbytes_kernel()
