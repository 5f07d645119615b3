"""Several adapters of one layer by their names: the sum of the active ones, or one for each row.

    y = W0 x + Σ Δᵢ(x)      Δᵢ(x): what adapter i, alone, adds to W0 x

    q_proj.weight             W0, of all of them
    q_proj.adapter.lora_A     of the one that was attached without a name
    q_proj.adapters.a.lora_A  of the one named a

The first adapter computes with W0, as it does alone. The others add their update: of a LoRA of a
linear layer its low-rank product, of others their own product less that of W0.

Source of the sum and of the rows: PEFT's `set_adapter([…])` and `adapter_names=[…]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.layers import CHILD, NAMED
from dlora.lora.made_class import made_class, original_class
from dlora.lora.own_storage import OwnStorage
from dlora.lora.segments import Segments
from dlora.quant.linear import Weight, product

DEFAULT = "default"  # the name of what is attached without one, as in PEFT
BASE = "__base__"  # in `adapter_names`: a row without an adapter, as in PEFT


@dataclass
class Rows:
    """Which adapter each row of a batch uses.

    Attributes:
        names: of the rows, in their order.
        repeated: how often a generation repeats each row, beside once.
    """

    names: list[str]
    repeated: int = 1

    def of(self, count: int, place: str) -> list[str]:
        """The names of the `count` rows that a layer gets.

        Raises:
            UsageError: they are no rows of the batch.
        """
        if count == len(self.names):
            return self.names
        if count == len(self.names) * self.repeated:
            return [name for name in self.names for _ in range(self.repeated)]
        raise UsageError(
            f"adapter_names: {place.rpartition('.')[0]} gets an input of {count} rows for "
            f"{len(self.names)} names, so they cannot be told apart there"
        )


@dataclass
class Names:
    """The adapters of a model by name, shared by its layers.

    Attributes:
        attachments: what `attach` recorded of each.
        active: whose updates are summed, in this order.
        rows: of the batch that is computed now; None: every row uses the active ones.
        segments: of a batch that several train on together; None: no batch is shared.
    """

    attachments: dict[str, Any] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    rows: Rows | None = None
    segments: Segments | None = None

    @property
    def meant(self) -> list[str]:
        """The names that some row uses."""
        if self.segments is not None:
            return self.segments.names
        return self.active if self.rows is None else list(dict.fromkeys(self.rows.names))


class NamedAdapters(OwnStorage):
    """What stands in the place of a layer's adapter once adapters have names; never called.

    Attributes:
        place: its path in the model.
        names: of the whole model.
    """

    def __init__(self, names: Names, place: str) -> None:
        super().__init__()
        self.names, self.place = names, place

    def put(self, name: str, child: Any) -> None:
        """Take in an adapter; the default one stays the layer's own child."""
        if name == DEFAULT:
            self.__dict__[DEFAULT] = child
        else:
            self.add_module(name, child)

    def find(self, name: str) -> Any:
        """The adapter of that name in this layer, or None."""
        return self.__dict__.get(DEFAULT) if name == DEFAULT else self._modules.get(name)

    def take(self, name: str) -> None:
        """Forget an adapter."""
        (self.__dict__ if name == DEFAULT else self._modules).pop(name)

    @property
    def acting(self) -> list[Any]:
        """The adapters that the layer computes with now."""
        found = map(self.find, self.names.meant)
        return [child for child in found if child is not None and child.active]

    @property
    def active(self) -> bool:
        """Whether the layer computes with more than its weight."""
        return bool(self.acting)

    # -- of each kind of layer: as one adapter has it ---------------------------------------------

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """As `LoraAdapter.linear`."""
        if self.names.segments is not None:
            return self.names.segments.linear(self, x, weight, bias)
        return self._computed(
            x,
            lambda adapter: adapter.linear(x, weight, bias),
            lambda: product(x, weight, bias),
            lambda adapter, x: adapter.linear_update(x, weight),
        )

    def embedding(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """As `LoraAdapter.embedding`."""
        if self.names.segments is not None:
            return self.names.segments.embedding(self, ids, weight, padding_idx)

        def update(adapter: Any, ids: Tensor) -> Tensor:
            return adapter.embedding(ids, weight, padding_idx) - F.embedding(ids, weight)

        return self._computed(
            ids,
            lambda adapter: adapter.embedding(ids, weight, padding_idx),
            lambda: F.embedding(ids, weight),
            update,
        )

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, convolve: Callable[..., Tensor]
    ) -> Tensor:
        """As `LoraAdapter.convolution`."""
        if self.names.segments is not None:
            self._check_alike("the convolutions")

        def update(adapter: Any, x: Tensor) -> Tensor:
            return adapter.convolution(x, weight, None, convolve) - convolve(x, weight, None)

        return self._computed(
            x,
            lambda adapter: adapter.convolution(x, weight, bias, convolve),
            lambda: convolve(x, weight, bias),
            update,
        )

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """As `ParameterAdapters.weights`: W0 + Σ ΔWᵢ of every adapted parameter."""
        self._check_alike("target_parameters")
        summed: dict[str, Any] = {}
        for adapters in self.acting:
            for name, weight in adapters.weights(module).items():
                summed[name] = summed[name].plus(weight) if name in summed else weight
        return summed

    def cast(self) -> dict[str, Tensor]:
        """As `ModulesToSaveCopy.cast`: of the one that is active."""
        self._check_alike("modules_to_save")
        return self.acting[0].cast()

    def _computed(
        self,
        x: Tensor,
        whole: Callable[[Any], Tensor],
        base: Callable[[], Tensor],
        update: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        """The layer's output.

        Args:
            whole: of an adapter: W0's product and its update in one.
            base: W0's product alone.
            update: of an adapter, for some rows: its update alone.
        """
        if self._rows_differ:
            return self._by_rows(x, base(), update)
        first, *others = self.acting
        y = whole(first)
        for adapter in others:
            y = y + update(adapter, x)
        return y

    def _by_rows(self, x: Tensor, y: Tensor, update: Callable[[Any, Tensor], Tensor]) -> Tensor:
        assert self.names.rows is not None
        rows = self.names.rows.of(len(x), self.place)
        for name in self.names.meant:
            adapter = self.find(name)
            if adapter is not None and adapter.active:
                own = [index for index, other in enumerate(rows) if other == name]
                at = torch.tensor(own, device=x.device)
                y = y.index_add(0, at, update(adapter, x[at]).to(y.dtype))
        return y

    @property
    def _rows_differ(self) -> bool:
        return self.names.rows is not None and len(self.names.meant) > 1

    def _check_alike(self, key: str) -> None:
        if self.names.segments is not None:
            raise UsageError(
                f"adapters: {self.place.rpartition('.')[0]} is one of {key}, which act on all "
                "tokens of a batch alike; train one adapter at a time"
            )
        if self._rows_differ:
            raise UsageError(
                f"adapter_names: {self.place.rpartition('.')[0]} is one of {key}, which act on all "
                "rows of a batch alike; compute a batch for each adapter"
            )


def adapt_(module: nn.Module, kind: type, child: Any, path: str, name: str, names: Any) -> None:
    """Give `module`, at `path`, an adapter of that name and the class that computes with it.

    Args:
        names: the model's, or None where the default adapter is the only one.
    """
    child.place = f"{path}.{CHILD}" if name == DEFAULT else f"{path}.{NAMED}.{name}"
    for inner_name, inner in child.named_children():  # of single parameters
        inner.place = f"{child.place}.{inner_name}"
    if name == DEFAULT:
        module.add_module(CHILD, child)
    if names is not None:
        share(module, path, names)
        module.get_submodule(NAMED).put(name, child)  # type: ignore[operator]
    if not isinstance(module, kind):
        base: Any = type(module)
        module.__class__ = made_class(kind, base, f"Adapted{base.__name__}")


def share(module: nn.Module, path: str, names: Names) -> None:
    """Let an adapted module compute by the names of its model; once is enough."""
    if NAMED not in module._modules:
        several = NamedAdapters(names, f"{path}.{NAMED}")
        module.add_module(NAMED, several)
        if CHILD in module._modules:
            several.put(DEFAULT, module.get_submodule(CHILD))


def take_(module: nn.Module, name: str) -> Any:
    """Take the adapter of that name out of a module, which keeps its class."""
    child = child_of(module, name)
    if name == DEFAULT:
        del module._modules[CHILD]
    if NAMED in module._modules:
        several: Any = module.get_submodule(NAMED)
        several.take(name)
        if not several._modules and several.find(DEFAULT) is None:
            del module._modules[NAMED]
    return child


def release_(module: nn.Module, name: str) -> None:
    """Take the adapter of that name out of a module; with the last one it gets its class back."""
    take_(module, name)
    if not is_adapted(module):
        module.__class__ = original_class(type(module))


def child_of(module: nn.Module, name: str) -> Any:
    """The adapter of that name in a module that has one."""
    children: Any = module._modules
    return children[CHILD] if name == DEFAULT else children[NAMED]._modules[name]


def module_at(model: nn.Module, path: str) -> Any:
    """`model.get_submodule(path)`, at a tenth of its cost: a swap asks thousands of times."""
    module: Any = model
    for name in path.split("."):
        module = module._modules[name]
    return module


def is_adapted(module: nn.Module) -> bool:
    """Whether a module has an adapter of any name."""
    return CHILD in module._modules or NAMED in module._modules
