"""Blocks of a model as graphs of torch's compiler, their adapters inside (`train.compile`).

    hooks of the engine, checkpointing     outside, as without a compiler
    what changes of an adapter             in front of the graph (`dlora.lora.given`)
    block(x, …)                            one graph for all blocks of a kind, without a break

A pass that the graphs are not made for runs as without them: one with a cache of keys and values,
as answers are generated, and one with adapters that are switched off or merged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlora.base.recomputation import CACHES
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import key_of
from dlora.lora.layers import CHILD, NAMED, AdaptedConv1D, AdaptedLinear
from dlora.lora.states import AdapterState
from dlora.lora.variants import LoraAdapter
from dlora.objectives import packed_operator
from dlora.objectives.packed_row import row_of
from dlora.quant.linear import frozen_weight
from dlora.runtime.console import console
from dlora.sharding.engines.gather_groups import block_lists

_SHOWN = 300  # characters of a compiler's message
GRAPHS_OF_A_BLOCK = 16  # more than there are of any: modes, gradients of its input, one row or more


class CompiledBlocks:
    """The blocks of a model; until they are `on` they run as without a compiler.

    To be made before activation checkpointing is installed, which belongs around them.

    Args:
        packs: whether the sequences of a micro-batch share a row.
        backend: of `torch.compile`.

    Attributes:
        on: whether blocks run as graphs.
        used: whether any block has run as one.
        settled: whether training has begun.
        failed: why graphs cannot be used; "" if they can. Blocks run on without them then.
    """

    def __init__(self, model: nn.Module, *, packs: bool, backend: str = "inductor") -> None:
        self.on, self.used, self.settled, self.failed = False, False, False, ""
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._backend, self._model, self._packs = backend, model, packs
        self._blocks = [
            block for path in block_lists(model) for block in model.get_submodule(path).children()
        ]
        for block in self._blocks:
            block.forward = _Forward(self, block)

    def start(self) -> None:
        """Switch graphs on. The model has its adapters and its loss by then."""
        limit = GRAPHS_OF_A_BLOCK * max(1, len(self._blocks))
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.accumulated_recompile_limit = 8 * limit
        # What a graph is given hangs on modules, and the hashes of tokens are as many as these.
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        # Else an error would come in the middle of a backward pass.
        torch._functorch.config.force_non_lazy_backward_lowering = True
        for block in self._blocks if self._packs else ():
            for module in block.modules():
                packed_operator.give_handle(module)
        self._before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.switch(True)

    def switch(self, on: bool) -> None:
        """Let blocks run as graphs, once these have been started, or as without a compiler."""
        self.on = on
        if (row := row_of(self._model)) is not None:
            row.compiled = on and self._packs

    def fail(self, block: nn.Module, error: Exception) -> None:
        """Note that a block does not compile, and go on without graphs."""
        said = " ".join(str(error).split()) or type(error).__name__
        self.distrust(f"{plain_class(block)} does not compile: {said[:_SHOWN]}")
        if self.settled:  # until then the ranks decide together
            console.warning(f"train.compile: off on this rank from here on: {self.failed}")

    def distrust(self, reason: str) -> None:
        """Note why graphs cannot be used, and go on without."""
        self.failed = self.failed or reason
        self.switch(False)

    @property
    def made(self) -> int:
        """Graphs that there are."""
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"] - self._before

    def __len__(self) -> int:
        return len(self._blocks)

    def graph(self, block: nn.Module) -> Callable[..., Any]:
        """What computes a block: (block, *args, **kwargs) → what its forward returns."""
        own = inspect.unwrap(type(block).forward)
        if own not in self._graphs:
            self._graphs[own] = torch.compile(
                own, fullgraph=True, dynamic=True, backend=self._backend
            )
        return self._graphs[own]


class _Forward:
    """The forward of a block."""

    def __init__(self, owner: CompiledBlocks, block: Any) -> None:
        self._owner, self._block, self._own = owner, block, block.forward
        self._adapters: list[tuple[Any, LoraAdapter, int, Tensor]] | None = None
        self._as_graph = False  # of the last forward pass: what recomputes it has to do the same
        functools.update_wrapper(self, self._own)  # models look at the arguments of a forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        cached = any(kwargs.get(name) is not None for name in CACHES)
        if torch._C._current_graph_task_id() < 0:  # not in a backward pass
            self._as_graph = self._owner.on
        if not self._as_graph or not isinstance(x, Tensor) or cached:
            return self._own(*args, **kwargs)
        try:
            adapters = self._found(x.device)
        except _failures() as error:
            self._give_up(error)
            return self._own(*args, **kwargs)
        if not all(a.active or a.state is AdapterState.EMPTY for _, a, _, _ in adapters):
            return self._own(*args, **kwargs)
        block = self._block
        if getattr(block, "gradient_checkpointing", False) and block.training:
            run = functools.partial(self._compute, **kwargs)
            return block._gradient_checkpointing_func(run, *args)
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        try:
            with self._given(x):
                y = self._owner.graph(self._block)(self._block, *args, **kwargs)
            self._owner.used = True
            return y
        except _failures() as error:  # before anything was computed
            self._give_up(error)
            return inspect.unwrap(type(self._block).forward)(self._block, *args, **kwargs)

    def _give_up(self, error: Exception) -> None:
        self._as_graph = False
        self._owner.fail(self._block, error)

    @contextmanager
    def _given(self, x: Tensor) -> Iterator[None]:
        adapters = self._found(x.device)
        try:
            for layer, adapter, r, key in adapters:
                weight = frozen_weight(layer)
                adapter.given = adapter.give(x, weight.t() if layer.transposed else weight, r, key)
            yield
        finally:
            for _, adapter, _, _ in adapters:
                adapter.given = None

    def _found(self, device: torch.device) -> list[tuple[Any, LoraAdapter, int, Tensor]]:
        """(layer, adapter, LoRA rank of the graph, key of dropout)."""
        if self._adapters is None:
            config = attachment_of(self._owner._model).config
            found = []
            for layer in self._block.modules():
                if NAMED in layer._modules:
                    raise NotImplementedError(f"a layer ({type(layer).__name__}) of named adapters")
                adapter = getattr(layer, CHILD, None)
                if not isinstance(adapter, LoraAdapter):
                    continue
                if not isinstance(layer, AdaptedLinear | AdaptedConv1D):
                    raise NotImplementedError(f"the adapter of {adapter.path}, which is no product")
                r = config.r if adapter.prunes else adapter.factors()[0].shape[0]
                key = torch.tensor(key_of(adapter.path), dtype=torch.int32, device=device)
                found.append((layer, adapter, r, key))
            self._adapters = found
        return self._adapters


def _failures() -> tuple[type[Exception], ...]:
    """What is raised where a block cannot become a graph."""
    errors: Any = torch._dynamo.exc
    return errors.TorchDynamoException, errors.FailOnRecompileLimitHit, NotImplementedError


def plain_class(block: nn.Module) -> str:
    """The name of its class, without those that engines and adapters put in front."""
    own = next(k for k in type(block).__mro__ if not k.__name__.startswith(("FSDP", "Adapted")))
    return own.__name__
