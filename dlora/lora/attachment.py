"""The record of what was attached to a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from dlora.lora.config import LoraConfig
from dlora.lora.dropout import DropoutStream
from dlora.lora.init import INITS, Initialisation
from dlora.lora.step_values import StepValues


@dataclass
class Attachment:
    """What `attach` did to a model; stored on the model as `model.dlora`.

    Attributes:
        adapted: paths of the modules with an adapter, then those of adapted parameters.
        parameters: the latter alone.
        saved: paths of the modules that are trained whole.
        left: lines for the user about what `all-linear` left alone.
        stream: where the adapters' dropout masks come from.
        values: what the adapters make once for all passes of a step.
    """

    config: LoraConfig
    adapted: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stream: DropoutStream = field(default_factory=DropoutStream)
    values: StepValues = field(default_factory=StepValues)

    @property
    def init(self) -> type[Initialisation]:
        """How A and B start."""
        return INITS[self.config.init_lora_weights]
