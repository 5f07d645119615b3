"""Classes of layers that are made at run time, and their pickles.

    made(Linear)  =  (PackedMixin or FactoredMixin, Linear)

They are found by no name, so an object of one is pickled as (the function that makes its class and
its arguments, its state). Of a class that is put in front of one, as by fully_shard, that is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MADE_BY = "_made_by"


def made_class(
    mixin: Any, base: Any, name: str, maker: Callable[..., type], *arguments: Any, **members: Any
) -> type:
    """The subclass of `base` that computes as `mixin` says.

    Args:
        maker, arguments: the function at the top of a module that made it, and what it was given.
        members: of the class.
    """
    own = {"__module__": base.__module__, "__reduce_ex__": _reduce}
    return type(name, (mixin, base), own | {_MADE_BY: (maker, *arguments)} | members)


def class_spec(cls: Any) -> Any:
    """A class, or what makes it."""
    return cls.__dict__.get(_MADE_BY, cls)


def class_of_spec(spec: Any) -> Any:
    """The class that `class_spec` described."""
    if not isinstance(spec, tuple):
        return spec
    maker, *arguments = spec
    return maker(*arguments)


def _reduce(self: Any, protocol: int) -> Any:
    """Of an object of such a class, for pickle and copy."""
    made: Any = next(cls for cls in type(self).__mro__ if _MADE_BY in cls.__dict__)
    _, (_, *arguments), *state = super(made, self).__reduce_ex__(max(protocol, 2))
    return _remade, (class_spec(type(self)), *arguments), *state


def _remade(spec: Any, *arguments: Any) -> Any:
    cls = class_of_spec(spec)
    return cls.__new__(cls, *arguments)
