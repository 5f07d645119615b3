"""Checks of what has to fit together, before a weight is read; a failure is a `UsageError`.

They see what `prepare` has: the configuration, data sets, and the model on the meta device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dlora.adapters.base_copies import base_names
from dlora.adapters.layouts import in_layout_of
from dlora.adapters.mixture import frozen_experts, is_mixture, read_experts
from dlora.adapters.peft_names import peft_slots
from dlora.adapters.save_load import check_numbers, check_shapes
from dlora.adapters.write import WEIGHTS
from dlora.config.adapters import configs_of
from dlora.config.load import Config
from dlora.data import Dataset
from dlora.data.stream import Stream
from dlora.errors import UsageError
from dlora.io.files import inside
from dlora.io.safetensors import stored_tensors
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.layers import AdaptedLayer
from dlora.objectives.router_loss import find_router_loss
from dlora.sharding.topology import Topology, resolve_placement
from dlora.tasks import Task
from dlora.tasks.generation import learned_positions


def check_output(config: Config) -> None:
    """Check, on the rank that writes, that `output.dir` is writable and no stop file exists.

    So it is of the directories in it that several adapters have.
    """
    stop = config.output.stop_path
    if stop is not None and stop.exists():
        raise UsageError(f"output.stop_file: {stop} already exists; remove it to start the run")
    own = [one.output.directory for one in configs_of(config).values()]
    for directory in (config.output.directory, *own):
        wanted = directory.absolute()
        existing = next(path for path in (wanted, *wanted.parents) if path.exists())
        if not existing.is_dir():
            raise UsageError(f"output.dir: {existing} is a file, so {directory} cannot be made")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"output.dir: {existing} cannot be written to")


def check_ranks_per_node(config: Config, world: int) -> None:
    """Check that `sharding.ranks_per_node` is at most the number of ranks."""
    wanted = config.sharding.ranks_per_node
    if wanted is not None and wanted > world:
        raise UsageError(f"sharding.ranks_per_node: {wanted} is more than the {world} rank(s)")


def check_placement(config: Config, topology: Topology) -> None:
    """Check that the placement, if the user set one, fits the ranks."""
    section = config.sharding
    if section.base != "auto":
        resolve_placement(section.engine, section.base, topology, offload=section.cpu_offload)


def check_attention(config: Config, device: str) -> None:
    """Check that `model.attn_implementation` can train on a type of device in `model.dtype`.

    What the model's class supports and which packages are installed is checked with the skeleton.
    """
    chosen, dtype = config.model.attn_implementation, config.model.dtype
    if chosen == "flex_attention" and device == "cpu":
        raise UsageError(
            "model.attn_implementation: flex_attention has no backward pass on a CPU; leave it at "
            "auto"
        )
    if chosen.startswith("flash") and dtype not in ("bfloat16", "float16"):
        raise UsageError(
            f"model.attn_implementation: {chosen} computes in bfloat16 or float16, and model.dtype "
            f"is {dtype}"
        )


def check_dropout(model: nn.Module) -> None:
    """Check that `adapter.lora_dropout` can act: it does not apply to embeddings."""
    dropout = attachment_of(model).config.lora_dropout
    layers = [layer for _, layer, _ in named_adapters(model)]
    if dropout and all(isinstance(layer, AdaptedLayer) and layer.is_embedding for layer in layers):
        raise UsageError(
            f"adapter.lora_dropout: {dropout} cannot act: it drops inputs of linear layers, but "
            "none of them is adapted"
        )


def check_gradients(model: nn.Module, task: Task) -> None:
    """Check that every adapted weight has a gradient, if adapters start from gradients."""
    if attachment_of(model).init.needs != "gradient":
        return
    head = task.in_chunks(model)
    for path, layer, _ in named_adapters(model):
        if layer is head:
            raise UsageError(
                f"adapter.target_modules: {path} is the output head, whose loss is computed in "
                "chunks, so lora_ga gets no gradient of it; leave it out"
            )


def check_adapter(model: nn.Module, directory: Path) -> None:
    """Check, as `load_adapter` does, that an adapter's file fits a model and is finite."""
    path = inside(directory, WEIGHTS)
    _, tensors = in_layout_of(model, attachment_of(model).config, stored_tensors(path))
    slots = peft_slots(model)
    copies = base_names(model, tensors.keys() - slots.keys())
    own = {key: stored for key, stored in tensors.items() if key not in copies}
    check_shapes(path, {key: stored.shape for key, stored in own.items()}, slots)
    check_numbers(own)


def check_experts(model: nn.Module) -> None:
    """Check a mixture of experts: its files, and that the base has no such loss of its own."""
    if is_mixture(model) and find_router_loss(model) is not None:
        raise UsageError(
            "adapter.method: mola has an aux_loss of its routers, and the base asks for one of its "
            "own; set output_router_logits to false in the base's config.json"
        )
    if places := frozen_experts(model):
        read_experts(model, places)


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        rows: of its embedding.
        positions: that it has learned; None: any.
        whose: it, in words.
    """

    tokenizer: Any
    rows: int
    positions: int | None
    whose: str = "the model"

    def beside(self, other: Limits) -> Limits:
        """The tighter of two models, where the other one takes fewer tokens or positions."""
        limit = [n for n in (self.positions, other.positions) if n is not None]
        tighter = other.rows < self.rows or (limit and min(limit) != self.positions)
        whose = other.whose if tighter else self.whose
        rows = min(self.rows, other.rows)
        return Limits(self.tokenizer, rows, min(limit, default=None), whose)

    def check(self, key: str, largest_id: int, longest: int) -> None:
        """Check that the model has an embedding for every token, and learned every position.

        Args:
            key: of the data set, whose largest token and most tokens of a sequence these are.
        """
        if largest_id >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest_id)
            raise UsageError(
                f"{key}: contains the token {largest_id} ({token!r}), but {self.whose}'s embedding "
                f"has {self.rows} rows; its tokenizer knows tokens that model.path does not"
            )
        if self.positions is not None and longest > self.positions:
            raise UsageError(
                f"data.max_length: {key} contains a sequence of {longest} tokens, but {self.whose} "
                f"has learned {self.positions} positions; set data.max_length to {self.positions} "
                "or less"
            )


def limits_of(tokenizer: Any, model: Any, whose: str = "the model") -> Limits:
    """The limits of a model; it may be on the meta device."""
    return Limits(tokenizer, embedding_rows(model), learned_positions(model), whose)


def check_sequences(data: Mapping[str, Dataset | Stream | None], limits: Limits) -> None:
    """Check data sets, by their keys; of a stream, the first window."""
    for key, dataset in data.items():
        if dataset is not None:
            limits.check(key, dataset.largest_id, dataset.report.longest)


def pad_token(tokenizer: Any, model: Any) -> int:
    """The token of padded positions: any that has an embedding, since they have no target."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(t for t in candidates if t is not None and t < embedding_rows(model))


def embedding_rows(model: Any) -> int:
    """Tokens that the model has an embedding for."""
    return model.get_input_embeddings().num_embeddings
