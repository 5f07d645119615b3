"""The reference that a policy is compared with: the same base W0, gathered once for both.

    π_ref    a fresh adapter        the adapter off: in dlora that is the untouched base, for
                                    every start (PiSSA's too) and for trained copies of modules
             a continued adapter    copies of its A, B, … as they were then, in place of them

In one pass, a block computes the policy's hidden states, then, without a graph, the reference's
with the adapters in it off; so an engine gathers its weights once for both:

    h ─ block 0 ─ h ─ block 1 ─ h ─ … ─ last block ─ [h; h_ref] ─ norm ─ head
    h ─    off  ─ h_ref ─ off ─ h_ref        [2B, S, H]

What lies before the blocks has no adapters then and what lies between them computes nothing.
Elsewhere the reference has a pass of its own.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; TRL's reference with adapters off.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlora.lora.names import attached
from dlora.lora.states import Stateful, switched_off

_RECORD = "dlora_reference"
_HIDDEN = "hidden_states"  # the argument of a block that transformers passes first


class Reference:
    """How a model computes as its reference.

    Args:
        model: with adapters.
        blocks: those that compute for both in one pass, in their order; empty: the reference has a
            pass of its own.

    Attributes:
        copies: the tensors that stand in for the trained ones, by their full names; None: adapters
            are off instead.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        self._model, self._children = model, adapters_in(model)
        self.copies: Mapping[str, Tensor] | None = None
        self.joined = bool(blocks)
        self._run: _Run | None = None
        for number, block in enumerate(blocks):
            self._join(block, first=number == 0, last=number == len(blocks) - 1)

    @contextmanager
    def acting(self, module: nn.Module | None = None) -> Iterator[None]:
        """Inside, the model (or a module in it) computes as the reference, without a graph."""
        with self._acting(self._children if module is None else adapters_in(module)):
            yield

    @contextmanager
    def in_one_pass(self) -> Iterator[None]:
        """Inside, a forward pass of the model computes both.

        Not in backward, where activation checkpointing computes the policy's blocks again.
        """
        self._run = _Run()
        try:
            yield
        finally:
            self._run = None

    @contextmanager
    def _acting(self, children: Iterable[Any]) -> Iterator[None]:
        with torch.no_grad(), ExitStack() as stack:
            if self.copies is None:
                stack.enter_context(switched_off(children))
            else:
                stack.enter_context(_in_place(children, self.copies))
                for attachment in attached(self._model).values():
                    stack.enter_context(attachment.values.apart())
            yield

    def _join(self, block: Any, *, first: bool, last: bool) -> None:
        """Let a block compute for both."""
        own: Callable[..., Any] = block.forward
        children = adapters_in(block)

        def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None:
                return own(*args, **kwargs)
            if first:  # copied, since a block may write into what it is given
                run.hidden = (args[0] if args else kwargs[_HIDDEN]).detach().clone()
            found = own(*args, **kwargs)
            with self._acting(children):
                given = (run.hidden, *args[1:]) if args else ()
                named = kwargs if args else {**kwargs, _HIDDEN: run.hidden}
                of_reference = own(*given, **named)
            if not last:
                run.hidden = hidden_of(of_reference)
                return found
            both = torch.cat([hidden_of(found), hidden_of(of_reference)])
            return both if isinstance(found, Tensor) else (both, *found[1:])

        block.forward = types.MethodType(forward, block)


def adapters_in(module: nn.Module) -> list[Stateful]:
    """The adapters and trained copies in a module; of a model with fewer blocks, those it has."""
    return [child for child in module.modules() if isinstance(child, Stateful)]


class _Run:
    """The hidden state of the reference on its way through the blocks."""

    hidden: Tensor


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def install_reference(model: nn.Module, blocks: Sequence[nn.Module] = ()) -> Reference:
    """Let a model compute as its reference as well; arguments as of `Reference`."""
    model.__dict__[_RECORD] = reference = Reference(model, blocks)
    return reference


def reference_of(model: nn.Module) -> Reference:
    """What `install_reference` made."""
    found: Reference = model.__dict__[_RECORD]
    return found


@contextmanager
def _in_place(children: Iterable[Any], copies: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these adapters compute with copies in place of what is trained, without dropout."""
    slots: list[tuple[Any, str, Any]] = []
    modes = [(child, child.training) for child in children]
    for child, _ in modes:
        child.training = False
        for path, module in child.named_modules():
            for name, parameter in module._parameters.items():
                key = ".".join(filter(None, (child.place, path, name)))
                if parameter is not None and key in copies:
                    slots.append((module._parameters, name, parameter))
                    module._parameters[name] = copies[key]
    try:
        yield
    finally:
        for parameters, name, parameter in slots:
            parameters[name] = parameter
        for child, mode in modes:
            child.training = mode
