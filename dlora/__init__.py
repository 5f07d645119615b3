"""dlora: LoRA-family adapters on models that do not fit one device.

    attach(model, LoraConfig(r=16))                    # in place; W0 keeps its parameter names
    replica = shard(model, engine="fsdp2")             # W0 sharded, A and B the same on every rank
    replica.reduce_gradients(); replica.clip(1.0)      # between backward() and optimizer.step()
    save_adapter(model, "out/adapter")                 # any rank, no collective, stock PEFT format

Importing dlora loads torch, and nothing larger.
"""

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
