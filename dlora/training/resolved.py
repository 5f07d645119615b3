"""The configuration as a run resolves it: what `config.yaml` says."""

from __future__ import annotations

from dataclasses import replace

from dlora.config.load import SCHEMA, Config, dump_yaml
from dlora.training.prepare import Preparation


def resolved_yaml(config: Config, prepared: Preparation, compiles: bool) -> str:
    """The configuration with the placement, the micro-batches and graphs that were chosen."""
    sharding = replace(
        config.sharding,
        engine=prepared.placement.engine,
        base=prepared.placement.base,  # type: ignore[arg-type]
        optimizer_state="divided" if prepared.divided else "replicated",
    )
    train = replace(config.train, compile=compiles)
    if not compiles:  # where it cannot act
        train = replace(train, compile_cache=SCHEMA["train.compile_cache"].default)
    if train.tokens_per_micro_batch == "auto":
        train = replace(train, tokens_per_micro_batch=prepared.dealing.tokens)
    return dump_yaml(replace(config, sharding=sharding, train=train))
