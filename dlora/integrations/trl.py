"""dlora under TRL's trainers. Each takes what TRL's takes, and `DloraTrainerMixin`'s arguments.

`peft_config=` is understood as `dlora=`. Where a trainer compares with a reference, that is the
trained model itself with its adapters off (`reference.py`).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification
from trl import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    RLOOTrainer,
    SFTTrainer,
)
from trl.trainer.utils import create_model_from_path

from dlora import UsageError
from dlora.integrations.reference import AdapterOff
from dlora.integrations.transformers import DloraTrainerMixin

__all__ = [
    "DloraDPOTrainer",
    "DloraGRPOTrainer",
    "DloraKTOTrainer",
    "DloraRLOOTrainer",
    "DloraRewardTrainer",
    "DloraSFTTrainer",
]


class _FromPath(DloraTrainerMixin):
    """Loads the model where it is given as a path or a hub id, as TRL does."""

    def _loaded(self, model: Any, args: Any) -> Any:
        if not isinstance(model, str):
            return model
        settings = dict(getattr(args, "model_init_kwargs", None) or {})
        if getattr(args, "trust_remote_code", False):
            settings.setdefault("trust_remote_code", True)
        return self._from_path(model, {"device_map": None} | settings)

    def _from_path(self, path: str, settings: dict[str, Any]) -> Any:
        return create_model_from_path(path, **settings)


class DloraSFTTrainer(_FromPath, SFTTrainer):
    """TRL's `SFTTrainer`."""


class DloraDPOTrainer(_FromPath, DPOTrainer):
    """TRL's `DPOTrainer`; without `ref_model`, the reference is the model with its adapters off."""


class DloraKTOTrainer(_FromPath, KTOTrainer):
    """TRL's `KTOTrainer`; its reference as under `DloraDPOTrainer`."""


class DloraRewardTrainer(_FromPath, RewardTrainer):
    """TRL's `RewardTrainer`; the head is trained whole, as one of `modules_to_save`."""

    def _from_path(self, path: str, settings: dict[str, Any]) -> Any:
        settings = {"num_labels": 1} | settings
        kind: Any = AutoModelForSequenceClassification
        return create_model_from_path(path, kind, **settings)


class _Online(_FromPath):
    """Trainers that generate, and load a reference where `beta` is not 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = next((a for a in (*args, *kwargs.values()) if hasattr(a, "beta")), None)
        if getattr(settings, "use_vllm", False):
            raise UsageError(
                "use_vllm: vLLM is sent PEFT's or whole models, and W0 is sharded here; generate "
                "with transformers"
            )
        beta = getattr(settings, "beta", 0.0)
        if settings is not None:
            settings.beta = 0.0  # so that it loads no second base
        super().__init__(*args, **kwargs)
        self.args.beta = self.beta = beta
        if beta:
            self.ref_model = AdapterOff(self.model)


class DloraGRPOTrainer(_Online, GRPOTrainer):
    """TRL's `GRPOTrainer`, generating with transformers."""


class DloraRLOOTrainer(_Online, RLOOTrainer):
    """TRL's `RLOOTrainer`, generating with transformers."""
