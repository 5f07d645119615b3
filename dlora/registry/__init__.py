"""What one file adds to dlora: a method, a start, an objective, a format, an optimizer, an engine.

    dlora/ROOM/NAME.py                                   ──room──>  {name: Part}, nothing imported
      class Gated(LoraAdapter):
          name = "gated"                                 what the user writes in YAML
          requires = {"deepspeed": "'dlora[zero3]'"}     packages, and how each is installed
      class GatedConfig(LoraConfig):
          gate: float = option(1.0, "…", gt=0)           an option, for the section's dataclass too

The files import torch, and a configuration must not. So the declarations are read from the syntax
tree: a class at the top of a file with a literal `name` is a part, its other literal attributes are
what the part declares, and every annotated `option(...)` of the file's classes is an option
of the file's parts. `Part.load` imports the class.
"""

from dlora.registry.options import Option, option, plain, required
from dlora.registry.parts import ROOMS, Part, carries, check_options, options_of, room

__all__ = [
    "ROOMS",
    "Option",
    "Part",
    "carries",
    "check_options",
    "option",
    "options_of",
    "plain",
    "required",
    "room",
]
