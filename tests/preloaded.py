"""What the server holds that `ranks.py` and `programs.py` fork processes from; it imports this.

What is done here once costs each of a thousand forked processes 0.2 s otherwise.
"""

import gc
from importlib import import_module

MODULES = [
    "transformers.models.llama.modeling_llama",
    "dlora.train",
    "dlora.sharding.engines.zero3",
    "dlora.quant.formats",
    "dlora.integrations.trl",
    "dlora.integrations.lightning",
    "peft",  # with bitsandbytes: longer than all others, and many test files import it
    "pytest",
]

gc.disable()  # looking for garbage takes a fifth of the time of imports, which make none
for module in MODULES:
    import_module(module)
# Compiles the patterns of all architectures' files, which transformers keeps.
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
gc.freeze()  # none of it is garbage, which a run looks for
gc.enable()
