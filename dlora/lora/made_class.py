"""Classes that are made at run time: a mix-in in front of the class that an object had.

    class made(Linear)  =  (AdaptedLinear, Linear)

They are found by no name, so an object of one is pickled as (mix-in, original class, its state).
"""

from __future__ import annotations

import functools
from typing import Any

from dlora.errors import UsageError
from dlora.quant.made_class import class_of_spec, class_spec

REPLICA = "dlora_replica"  # what dlora.shard leaves on a model


@functools.cache
def made_class(mixin: Any, base: Any, name: str) -> type:
    """The subclass of `base` that computes as `mixin` says. Cached: equal objects share one."""
    namespace = {
        "__module__": base.__module__,
        "__reduce_ex__": _reduce,
        "_made_of": (mixin, base, name),
    }
    return type(name, (mixin, base), namespace)


def original_class(cls: type) -> type:
    """The class before a mix-in was put in front of it; others as they are."""
    made = cls.__dict__.get("_made_of")
    return made[1] if made else cls


def _reduce(self: Any, protocol: int) -> Any:
    # Where fully_shard put its own class in front, this class is not the object's any more.
    if REPLICA in self.__dict__ or "_made_of" not in type(self).__dict__:
        raise UsageError(
            f"{type(self).__name__} is sharded, so it cannot be pickled or copied; do that before "
            "dlora.shard, or save the adapter (dlora.save_adapter) and load it into another model"
        )
    mixin, base, name = self._made_of
    _, (_, *arguments), *state = super(type(self), self).__reduce_ex__(max(protocol, 2))
    return _remade, (mixin, class_spec(base), name, *arguments), *state


def _remade(mixin: Any, base: Any, name: str, *arguments: Any) -> Any:
    cls: Any = made_class(mixin, class_of_spec(base), name)
    return cls.__new__(cls, *arguments)
