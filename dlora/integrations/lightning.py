"""dlora under Lightning: a strategy, and the module's own `configure_optimizers`.

attach(self.model, LoraConfig(...))                             # in the module's __init__
AdamW(self.trainer.strategy.replica.parameter_groups(lr=2e-4))  # in configure_optimizers
Trainer(strategy=DloraStrategy(sharding={"base": "world"}))

setup         shard ─> optimizers, nothing wrapped
a step        the last backward pass ─> one reduction ─> hooks, clip ─> optimizer
a checkpoint  NAME.ckpt without W0, and NAME-adapter/ in PEFT's layout
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora import UsageError, save_adapter
from dlora.api import TrainedReplica, replica_of
from dlora.integrations import stored
from dlora.integrations.one_step import reduce_gradients
from dlora.integrations.prepared import prepared_model
from dlora.integrations.whole_state import WholeState

__all__ = ["DloraStrategy"]
KEY = "dlora"


class DloraStrategy(DDPStrategy):
    """Trains adapters in a LightningModule on any number of ranks, without DDP.

    Args:
        sharding: arguments of `dlora.shard` by name; None: `configure_model` has called it, or its
            defaults.
        kwargs: of Lightning's `DDPStrategy`, such as `process_group_backend` and `timeout`.

    Attributes:
        replica: of the adapters, once the strategy is set up; `configure_optimizers` uses it.
        adapted: the module inside the LightningModule that has the adapters.
    """

    replica: TrainedReplica
    adapted: nn.Module

    def __init__(self, sharding: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sharding = dict(sharding or {})
        self._prefix = ""
        self._loaded_from: Path | None = None

    # -- set-up -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """DDP's own, without DDP."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if isinstance(self.precision_plugin, HalfPrecision):
            raise UsageError(
                "precision: it casts the adapters; load W0 in that type, and use bf16-mixed or 32"
            )
        self.model_to_device()
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        if is_fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def model_to_device(self) -> None:
        """Shard the adapted module onto this rank's device; then the rest of the module follows."""
        module = self.lightning_module
        assert module is not None
        found = [(name, m) for name, m in module.named_modules() if hasattr(m, "dlora")]
        if len(found) != 1:
            raise UsageError(
                f"DloraStrategy: expected one module with adapters inside {type(module).__name__}, "
                f"found {len(found)}; call dlora.attach in its __init__ or configure_model"
            )
        self._prefix, self.adapted = f"{found[0][0]}." if found[0][0] else "", found[0][1]
        replica = replica_of(self.adapted)
        if replica is None:
            replica = prepared_model(self.adapted, self.root_device, None, self._sharding)
        self.replica = replica
        module.to(self.root_device)

    def configure_ddp(self) -> None:
        """Nothing goes around the module."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Lightning's own; those of the adapters save and load whole states."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if self._trains(optimizer):
                WholeState(self.replica, optimizer)

    def teardown(self) -> None:
        """DDP's own, but the module stays on its device: its shards and buffers belong together."""
        module, self._lightning_module, self._model = self._lightning_module, None, None
        super().teardown()
        self._lightning_module = module

    # -- a step -----------------------------------------------------------------------------------

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The step's last pass and the reduction; then Lightning's hooks, clip and step."""
        if not self._trains(optimizer):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        result = closure()
        scaler = getattr(self.precision_plugin, "scaler", None)
        reduce_gradients(self.replica, optimizer, scaler)
        return super().optimizer_step(optimizer, lambda: result, model, **kwargs)

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        if self._trains(optimizer):
            self.replica.clip(clip_val)
        else:
            type(self.precision_plugin).clip_grad_by_norm(
                self.precision_plugin, optimizer, clip_val
            )

    def _trains(self, optimizer: Optimizer) -> bool:
        own = {id(p) for p in (*self.replica.named.values(), *self.replica.optimized.values())}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def on_validation_end(self) -> None:
        """Free the W0 that evaluation has left gathered."""
        self.replica.release()

    on_test_end = on_predict_end = on_validation_end

    # -- files ------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Adapters are loaded once they are a replica."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, and what of the module is outside the adapted one: never W0."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        outside = {k: v for k, v in state.items() if not k.startswith(self._prefix)}
        own = {**self.replica.named, **self.replica.frozen} if self._prefix else {}
        if not self._prefix:
            raise UsageError("DloraStrategy: the adapters must be in a module of the module")
        copies = {n: t.detach().to("cpu", copy=True) for n, t in own.items()}
        return outside | {self._prefix + name: tensor for name, tensor in copies.items()}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Lightning's file, and the adapter in PEFT's layout beside it where the path is local."""
        method = self.replica.method
        checkpoint[KEY] = {"step": getattr(method, "step", 0), "record": method.record()}
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if (beside := _beside(filepath)) is not None:
            beside.mkdir(parents=True, exist_ok=True)
            stored.write_random(beside, self.replica.topology.rank)
            if self.is_global_zero:
                save_adapter(self.adapted, beside)

    def remove_checkpoint(self, filepath: Any) -> None:
        """The file and what was written beside it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero and (beside := _beside(filepath)) is not None:
            shutil.rmtree(beside, ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Lightning's own."""
        self._loaded_from = _beside(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put A and B back, and the rest of the module outside the adapted one."""
        assert self.lightning_module is not None
        state, beside = dict(checkpoint["state_dict"]), checkpoint.get(KEY, {})
        if beside.get("record") is not None:
            self.replica.method.load_record(beside["step"], beside["record"])
        with torch.no_grad():
            for name, own in {**self.replica.named, **self.replica.frozen}.items():
                value = state.pop(self._prefix + name, None)
                if not isinstance(value, Tensor) or value.shape != own.shape:
                    raise UsageError(f"checkpoint: it has no {name} of shape {list(own.shape)}")
                own.copy_(value)
        self.replica.audit()
        self.lightning_module.load_state_dict(state, strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Lightning's own; then random states, which come last in a resume."""
        super().load_optimizer_state_dict(checkpoint)
        if self._loaded_from is not None and self._loaded_from.exists():
            topology = self.replica.topology
            stored.read_random(self._loaded_from, topology.rank, topology.world)


def _beside(filepath: Any) -> Path | None:
    """`last.ckpt` → `last-adapter`; None of a remote path."""
    if "://" in str(filepath):
        return None
    path = Path(filepath)
    return path.with_name(f"{path.stem}-adapter")
