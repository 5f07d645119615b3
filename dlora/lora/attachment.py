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
        name: of these adapters, among those of the model.
        trained: whether they have gradients.
    """

    config: LoraConfig
    adapted: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stream: DropoutStream = field(default_factory=DropoutStream)
    values: StepValues = field(default_factory=StepValues)
    name: str = "default"
    trained: bool = True

    @property
    def modules(self) -> list[str]:
        """Paths of all modules that carry something, each once."""
        parameters = set(self.parameters)
        owners = [p.rpartition(".")[0] if p in parameters else p for p in self.adapted]
        return list(dict.fromkeys([*owners, *self.saved]))

    @property
    def init(self) -> type[Initialisation]:
        """How A and B start."""
        return INITS[self.config.init_lora_weights]
