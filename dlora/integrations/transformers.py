"""dlora under transformers' `Trainer`: `DloraTrainer`, and the mix-in for trainers made of it.

    trainer = DloraTrainer(model=model, args=args, train_dataset=data)      # after dlora.attach
    class MyTrainer(DloraTrainerMixin, SomeTrainer): ...

W0 is sharded before `Trainer` sees the model, and nothing is wrapped around it. What `Trainer` does
with a model of many ranks is replaced: the reduction (one per optimizer step), the optimizer's
groups, and what is saved and loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME, logger

from dlora import AdaLoraConfig, LoraConfig, UsageError
from dlora.api import TrainedReplica
from dlora.integrations import adapter
from dlora.integrations.loop import DloraCallback
from dlora.integrations.one_step import reduce_gradients
from dlora.integrations.prepared import prepared_model
from dlora.integrations.reference import AdapterOff
from dlora.integrations.whole_state import WholeState

__all__ = ["DloraCallback", "DloraTrainer", "DloraTrainerMixin"]

_Below: Any = object  # the trainer that comes after the mix-in


class DloraTrainerMixin(_Below):
    """Makes a trainer of transformers or TRL train dlora's adapters; to be named before it.

    Args:
        model: with or without adapters, sharded or not; dlora does what has not been done.
        dlora: the adapters to attach, a `dlora.LoraConfig` or a `peft.LoraConfig`; None: the model
            has them.
        sharding: arguments of `dlora.shard` by name, such as `{"engine": "zero3", "base": "node"}`;
            None: the model has been sharded, or its defaults.
        replica: what `dlora.shard` returned; None: the model's own.
        loraplus_lr_ratio: of LoRA+, the learning rate of B over that of A.

    All other arguments are the trainer's own.

    Raises:
        UsageError: a setting would wrap, cast or shard the model a second time.
    """

    optimizer: Any
    ref_model: Any

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        dlora: LoraConfig | None = None,
        sharding: Mapping[str, Any] | None = None,
        replica: TrainedReplica | None = None,
        loraplus_lr_ratio: float = 1.0,
        **kwargs: Any,
    ) -> None:
        given = (*args, *kwargs.values())
        settings = next((a for a in given if isinstance(a, TrainingArguments)), None)
        makes_reference = _lacks_reference(type(self), args, kwargs)
        _check(settings, makes_reference)
        if kwargs.get("model_init") is not None:
            raise UsageError("model_init: dlora shards one model; pass it as model")
        if (config := kwargs.pop("peft_config", None)) is not None:
            if dlora is not None:
                raise UsageError("peft_config: dlora= has named the adapters already")
            dlora = config
        if isinstance(dlora, AdaLoraConfig) and dlora.total_step is None:
            dlora = dlora.for_steps(_steps(settings))
        device = PartialState().device if settings is None else settings.device
        if settings is not None:
            settings._n_gpu = min(1, settings.n_gpu)  # more would be DataParallel
        model = self._loaded(model, settings)
        self.replica = prepared_model(model, device, dlora, sharding, replica)
        if makes_reference and args:
            args = (AdapterOff(model), *args[1:])
        elif makes_reference:
            kwargs["ref_model"] = AdapterOff(model)
        # Whose base transformers has sharded at load; the replica reduces and saves in its place.
        model._is_distributed_loading_by_transformers = False
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._whole_state: WholeState | None = None
        self._has_reduced = False
        super().__init__(model, *args, **kwargs)
        if makes_reference:
            self.ref_model = AdapterOff(self.model)  # without what the trainer has set on the other
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UsageError(
                "accelerate: its configuration wraps the model in FSDP or DeepSpeed, and dlora "
                "shards it by itself; launch with torchrun, or without that configuration"
            )

    # -- set-up -----------------------------------------------------------------------------------

    def _loaded(self, model: Any, args: Any) -> Any:
        """The model, where a trainer loads it from a path."""
        return model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It is where `shard` has put it."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        """Nothing goes around it."""
        return model

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        planned = getattr(self.model.dlora.config, "total_step", None) or 0
        if planned > max_steps:
            raise UsageError(
                f"total_step: AdaLoRA's schedule needs {planned} steps, and this training makes "
                f"{max_steps}, so that its last mask would never fall"
            )
        # As evaluated models are, so that autocast and compilation apply and DDP does not.
        self.model_wrapped = self.accelerator.prepare_model(
            self.model, device_placement=False, evaluation_mode=True
        )
        if self._recomputes_reentrantly():
            self.model.enable_input_require_grads()  # else no gradient would reach the adapters
        return super()._prepare_for_training(max_steps, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """An optimizer by `args.optim` over the replica's groups, or the one that was passed."""
        if self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            if {"params", "model", "optimizer_dict"} & settings.keys() or not (
                isinstance(kind, type) and issubclass(kind, Optimizer)
            ):
                raise UsageError(f"optim: {self.args.optim} chooses parameters by itself")
            groups = self.replica.parameter_groups(
                lr=self.args.learning_rate,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **settings)
        if self._whole_state is None:
            self._whole_state = WholeState(self.replica, self._own_optimizer())
        return self.optimizer

    def _own_optimizer(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _recomputes_reentrantly(self) -> bool:
        args = self.args
        settings = getattr(args, "activation_checkpointing_kwargs", None) or {}
        return bool(args.activation_checkpointing and settings.get("use_reentrant"))

    # -- a step -----------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own, after the last step's gradients are gone from wherever they are."""
        if self._has_reduced:
            self.replica.zero_grad()
            self._has_reduced = False
        return super().training_step(*args, **kwargs)

    def _reduce(self) -> float:
        self._has_reduced = True
        norm = reduce_gradients(self.replica, self._own_optimizer(), self.accelerator.scaler)
        self.accelerator.unscale_gradients()
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> float:
        norm = self._reduce()
        self.replica.clip(self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self._reduce() if grad_norm is None else grad_norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; then W0 is freed, which passes without a reduction leave gathered."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.replica.release()

    # -- files ------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter in PEFT's layout, and beside it what Trainer writes: never W0."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        logger.info(f"Saving the adapter to {directory}")
        adapter.save(self.model, self.replica, directory)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(str(directory))
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self._whole_state is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with self._whole_state.collected():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter.load(self.model, self.replica, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        if adapter.fits(self.model, self.replica, best):
            adapter.load(self.model, self.replica, best)
        else:
            logger.warning(
                f"load_best_model_at_end: the adapters were cut after {best} was saved, so the "
                "last ones stay; the directory has the best"
            )


class DloraTrainer(DloraTrainerMixin, Trainer):
    """transformers' `Trainer` for adapters of dlora; see `DloraTrainerMixin` for its arguments."""


def _steps(args: TrainingArguments | None) -> int:
    """The optimizer steps of a training, for AdaLoRA's schedule."""
    if args is None or args.max_steps <= 0:
        raise UsageError("total_step: AdaLoRA needs the number of steps; set it, or max_steps")
    return args.max_steps


def _lacks_reference(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a trainer compares with a reference model and was given none."""
    below = kind.__mro__[kind.__mro__.index(DloraTrainerMixin) + 1 :]
    takes = any(
        "ref_model" in inspect.signature(each.__dict__["__init__"]).parameters
        for each in below
        if "__init__" in each.__dict__
    )
    return takes and (args[0] if args else kwargs.get("ref_model")) is None


def _check(args: TrainingArguments | None, makes_reference: bool) -> None:
    """Refuse what would wrap, shard or cast the model behind dlora's back."""
    reference = "the reference is the model itself with its adapters off, "
    refused = {
        "fsdp": "dlora shards W0 by itself: sharding={'engine': 'fsdp2'}",
        "deepspeed": "dlora shards W0 by itself: sharding={'engine': 'zero3'}",
        "bf16_full_eval": "it casts the adapters; bf16 evaluates under autocast",
        "fp16_full_eval": "it casts the adapters; fp16 evaluates under autocast",
    }
    if makes_reference:
        refused["sync_ref_model"] = reference + "so nothing is copied into it"
        refused["precompute_ref_log_probs"] = reference + "and TRL cannot tell bases apart by it"
    for name, reason in refused.items():
        if getattr(args, name, None):
            raise UsageError(f"{name}: {reason}")
