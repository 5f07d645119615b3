"""dlora: LoRA-family adapters on models that do not fit one device.

    attach(model, LoraConfig(r=16))                    # in place; W0 keeps its parameter names
    replica = shard(model, engine="fsdp2")             # W0 sharded, A and B the same on every rank
    replica.reduce_gradients(); replica.clip(1.0)      # between backward() and optimizer.step()
    save_adapter(model, "out/adapter")                 # any rank, no collective, stock PEFT format

Importing dlora loads nothing; the first use of one of its names loads torch, and nothing larger, so
that commands that compute nothing start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlora.adapters.save_load import save_adapter
    from dlora.api import (
        activate,
        attach,
        attached,
        load_adapter,
        remove,
        rename,
        replica_of,
        shard,
        start_from_gradients,
    )
    from dlora.base.quantize import quantize
    from dlora.errors import UsageError
    from dlora.lora.attach import disabled
    from dlora.lora.config import LoraConfig
    from dlora.lora.merge import merge, unmerge
    from dlora.lora.variants.adalora import AdaLoraConfig
    from dlora.lora.variants.flora import FloraConfig
    from dlora.lora.variants.mola import MolaConfig
    from dlora.methods.average import ema

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "FloraConfig",
    "LoraConfig",
    "MolaConfig",
    "UsageError",
    "activate",
    "attach",
    "attached",
    "disabled",
    "ema",
    "load_adapter",
    "merge",
    "quantize",
    "remove",
    "rename",
    "replica_of",
    "save_adapter",
    "shard",
    "start_from_gradients",
    "unmerge",
]

_HOME = {  # name → the file that has it
    "save_adapter": "dlora.adapters.save_load",
    "activate": "dlora.api",
    "attach": "dlora.api",
    "attached": "dlora.api",
    "load_adapter": "dlora.api",
    "remove": "dlora.api",
    "rename": "dlora.api",
    "replica_of": "dlora.api",
    "shard": "dlora.api",
    "start_from_gradients": "dlora.api",
    "quantize": "dlora.base.quantize",
    "UsageError": "dlora.errors",
    "disabled": "dlora.lora.attach",
    "LoraConfig": "dlora.lora.config",
    "merge": "dlora.lora.merge",
    "unmerge": "dlora.lora.merge",
    "AdaLoraConfig": "dlora.lora.variants.adalora",
    "FloraConfig": "dlora.lora.variants.flora",
    "MolaConfig": "dlora.lora.variants.mola",
    "ema": "dlora.methods.average",
}


def __getattr__(name: str) -> Any:
    """A public name, when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
