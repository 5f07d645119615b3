"""Adapters of a model by their names: which there are, which act, and the base without any."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from dlora.errors import UsageError, and_more
from dlora.lora.attachment import Attachment
from dlora.lora.layers import CHILD, NAMED
from dlora.lora.made_class import original_class
from dlora.lora.several import (
    BASE,
    DEFAULT,
    NamedAdapters,
    Names,
    Rows,
    adapt_,
    is_adapted,
    module_at,
    release_,
    share,
    take_,
)

RECORD = "dlora_names"  # on the model, once adapters have names
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST = 200  # `save_pretrained` makes a folder of the name
T = TypeVar("T")


def attached(model: nn.Module) -> dict[str, Attachment]:
    """What is attached to a model, by name; that without a name is `"default"`."""
    names = model.__dict__.get(RECORD)
    if names is not None:
        return dict(names.attachments)
    own = getattr(model, "dlora", None)
    return {DEFAULT: own} if isinstance(own, Attachment) else {}


def active(model: nn.Module) -> list[str]:
    """The names whose updates are summed, in that order."""
    names = model.__dict__.get(RECORD)
    return list(attached(model)) if names is None else list(names.active)


@contextmanager
def by_name(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, functions of a model's adapters mean those of this name: `model.dlora` is theirs.

    In this thread and in all others.

    Raises:
        UsageError: there is no such name.
    """
    before = model.__dict__.get("dlora")
    model.__dict__["dlora"] = found(model, name)
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["dlora"]
        else:
            model.__dict__["dlora"] = before


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: layers have their own classes, and adapters are no part."""
    taken: list[tuple[Any, type, dict[str, Any]]] = []
    for path in {path for a in attached(model).values() for path in a.modules}:
        module = module_at(model, path)
        if not is_adapted(module):  # inside another `bare`
            continue
        children = {n: c for n, c in module._modules.items() if n in (CHILD, NAMED)}
        taken.append((module, type(module), children))
        for child in children:
            del module._modules[child]
        module.__class__ = original_class(type(module))
    try:
        yield
    finally:
        for module, kind, children in taken:
            module.__class__ = kind
            module._modules.update(children)


def of_base(function: Callable[..., T]) -> Callable[..., T]:
    """A function of a model that sees its base alone, see `bare`."""

    @functools.wraps(function)
    def called(model: nn.Module, *args: Any, **kwargs: Any) -> T:
        with bare(model):
            return function(model, *args, **kwargs)

    return called


def check_name(model: nn.Module, name: str, call: str = "attach") -> None:
    """Raise a `UsageError` unless a new adapter can have this name."""
    if isinstance(name, str) and name in attached(model):
        raise UsageError(
            f"{call}: this model already has adapters"
            + (f" named {name!r}" if name != DEFAULT else "")
        )
    taken = NamedAdapters(Names(), "")
    is_name = isinstance(name, str) and _NAME.fullmatch(name) is not None
    if not is_name or name == BASE or len(name) > _LONGEST or hasattr(taken, name):
        raise UsageError(
            f"{call}: name: {str(name)[:80]!r} cannot be a name: letters, digits, _ and - can, but "
            "no attribute of modules"
        )
    check_unmerged(model, call)


def names_of(model: nn.Module) -> Names:
    """The record that the layers of a model compute by; made where there was no need before.

    Raises:
        UsageError: the base is packed as the residual of its adapters, so it is none without them.
    """
    if RECORD not in model.__dict__:
        own = attached(model)
        paths = {path for attachment in own.values() for path in attachment.modules}
        modules = {path: module_at(model, path) for path in paths}
        if any(getattr(m._modules[CHILD], "residual", False) for m in modules.values()):
            raise UsageError(
                "name: this base is packed as the residual of its adapters (init_lora_weights), so "
                "no others can act on it"
            )
        names = model.__dict__[RECORD] = Names(own, list(own))
        for path, module in modules.items():
            share(module, path, names)
    return model.__dict__[RECORD]


def names_with(model: nn.Module, name: str) -> Names | None:
    """The record for one more adapter; None where the default one would be the only one."""
    return model.__dict__.get(RECORD) if name == DEFAULT else names_of(model)


def record(model: nn.Module, attachment: Attachment) -> None:
    """Note what was attached; the first adapter of a model is active."""
    names: Names | None = model.__dict__.get(RECORD)
    if attachment.name == DEFAULT:
        model.dlora = attachment  # type: ignore[assignment]
    if names is not None:
        if not names.attachments:
            names.active = [attachment.name]
        names.attachments[attachment.name] = attachment


def activate(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let the model compute with the adapters of these names, and no others.

        y = W0 x + Σ Δᵢ(x)

    Nothing is gathered or sent. Each rank has to do the same. Which adapters are trained does not
    change: one that does not compute gets no gradient.

    Args:
        names: one, or several whose updates are summed; none: the model computes as its base.

    Raises:
        UsageError: there is no such name, one is there twice, the model is merged, or two of them
            train a module whole (`modules_to_save`).
    """
    if not isinstance(names, Iterable):
        raise UsageError(f"activate: expected a name or a list of names, got {names!r}")
    wanted = [names] if isinstance(names, str) else list(names)
    check_unmerged(model, "activate")
    saved: dict[str, str] = {}
    for name in wanted:
        for path in found(model, name, "activate").saved:
            if path in saved:
                raise UsageError(
                    f"activate: {saved[path]!r} and {name!r} both have {path} among modules_to_save"
                )
            saved[path] = name
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"activate: {', '.join(wanted)}: a name is there twice")
    if wanted != active(model):
        names_of(model).active = wanted


def remove(model: nn.Module, name: str) -> None:
    """Take the adapters of a name off the model; see `dlora.remove`."""
    check_unmerged(model, "remove")
    for path in found(model, name, "remove").modules:
        release_(module_at(model, path), name)
    names: Names | None = model.__dict__.get(RECORD)
    if names is not None:
        del names.attachments[name]
        names.active = [other for other in names.active if other != name]
        if not names.attachments:
            del model.__dict__[RECORD]
    if name == DEFAULT:
        del model.__dict__["dlora"]


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give the adapters of a name another one; see `dlora.rename`."""
    attachment = found(model, old, "rename")
    names = names_of(model)
    for path in attachment.modules:
        module = module_at(model, path)
        adapt_(module, type(module), take_(module, old), path, new, names)
    attachment.name = new
    names.attachments = {a.name: a for a in names.attachments.values()}
    names.active = [new if name == old else name for name in names.active]
    model.__dict__.pop("dlora", None)
    if DEFAULT in names.attachments:
        model.__dict__["dlora"] = names.attachments[DEFAULT]


@contextmanager
def rows(model: nn.Module, names: list[str] | None, repeated: int = 1) -> Iterator[None]:
    """Inside, each row of a batch uses the adapter of its name, as PEFT's `adapter_names` says.

    Args:
        names: of the rows; `"__base__"` is a row without an adapter. None: the active ones act.
        repeated: how often a generation repeats each row.

    Raises:
        UsageError: there is no such name, or the model is in training mode or merged.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise UsageError(
            f"adapter_names: expected a list of names, one for each row, got {names!r}"
        )
    for name in set(names) - {BASE}:
        found(model, name, "adapter_names")
    check_unmerged(model, "adapter_names")
    if model.training:
        raise UsageError("adapter_names: the model is in training mode; call model.eval() first")
    own = names_of(model)
    before, own.rows = own.rows, Rows(list(names), repeated)
    try:
        yield
    finally:
        own.rows = before


def found(model: nn.Module, name: str, call: str = "") -> Attachment:
    """What was attached by that name; a `UsageError` if nothing was."""
    there = attached(model)
    if name not in there:
        known = f"there are {and_more(list(map(repr, there)), 8)}" if there else "there is none"
        raise UsageError(f"{call or 'name'}: the model has no adapters named {name!r}; {known}")
    return there[name]


def check_unmerged(model: nn.Module, call: str) -> None:
    """Raise a `UsageError` where `merge` has written over the W0 that names have in common."""
    if "dlora_originals" in model.__dict__:
        raise UsageError(f"{call}: this model is merged; call dlora.unmerge first")
