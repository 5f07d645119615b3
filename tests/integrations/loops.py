"""One short training in loops of three kinds, for the tests of this folder.

Two epochs of four batches of two sequences, an optimizer step for every two batches; a checkpoint
after the first epoch, from which a run may resume.
"""

from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hugging_face import fresh_state, peft_model, same_start, sequences
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import whole
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

import dlora
from dlora import AdaLoraConfig, LoraConfig
from dlora.integrations.accelerate import prepare
from dlora.integrations.lightning import DloraStrategy
from dlora.integrations.transformers import DloraCallback
from dlora.optim.lora_pro import LoraPro

EPOCHS, EVERY, RATE, CLIP = 2, 2, 0.002, 0.5


class Setting(NamedTuple):
    """What a run trains with."""

    engine: str = "fsdp2"
    state: str = "replicated"
    method: str = "lora"
    dropout: float = 0.0
    precision: str = "no"
    optimizer: str = "adamw"

    @property
    def sharding(self) -> dict[str, Any]:
        return {"engine": self.engine, "base": "world", "optimizer_state": self.state}


class Result(NamedTuple):
    """What a rank saw: its loss of each batch, and how often it reduced."""

    losses: list[float]
    reductions: int


def adapted(base: str, setting: Setting) -> Any:
    model = whole(base)
    if setting.method == "adalora":
        dlora.attach(model, AdaLoraConfig(init_r=6, target_r=2, total_step=4))
        return model
    init = setting.method if setting.method != "lora" else True
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=setting.dropout, init_lora_weights=init)
    dlora.attach(model, config)
    if init is True:
        same_start(model)
    return model


def loader_of(rank: int, world: int) -> DataLoader:
    data = sequences(8, uneven=False)
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    return DataLoader(data, batch_size=2 // world, sampler=sampler)


def rate(step: int) -> float:
    return 1 - step / 8


def by_peft(base: str) -> list[float]:
    """The reference: PEFT, torch, one process."""
    model = peft_model(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = LambdaLR(optimizer, rate)
    found = []
    for _ in range(EPOCHS):
        for index, batch in enumerate(loader_of(0, 1)):
            loss = model(**batch).loss
            (loss / EVERY).backward()
            found.append(loss.item())
            if index % EVERY == EVERY - 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return found


def by_hand(base: str, directory: Path, setting: Setting, resume: bool) -> Result:
    torch.manual_seed(resume)
    model = adapted(base, setting)
    replica = dlora.shard(model, **setting.sharding)
    groups = replica.parameter_groups(lr=RATE)
    optimizer: Any = torch.optim.AdamW(groups)
    if setting.optimizer == "lora_pro":
        optimizer = LoraPro(groups, replica.pairs)
    schedule = LambdaLR(optimizer, rate)
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting.precision]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9) if half is torch.float16 else None
    loop = DloraCallback(model, optimizer, scheduler=schedule, scaler=scaler, max_grad_norm=CLIP)
    done = loop.load(directory / "first")["epochs"] if resume else 0
    found = []
    for epoch in range(done, EPOCHS):
        for index, batch in enumerate(loader_of(replica.topology.rank, replica.topology.world)):
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = model(**batch).loss
            (scaler.scale(loss / EVERY) if scaler else loss / EVERY).backward()
            found.append(loss.item())
            if index % EVERY == EVERY - 1:
                loop.step()
        name = "first" if epoch == 0 else f"last-{resume:d}"
        loop.save(directory / name, epochs=epoch + 1)
    return Result(found, replica.reductions)


def by_accelerate(base: str, directory: Path, setting: Setting, resume: bool) -> Result:
    fresh_state()
    torch.manual_seed(resume)
    accelerator = Accelerator(
        cpu=True, mixed_precision=setting.precision, gradient_accumulation_steps=EVERY
    )
    model = adapted(base, setting)
    replica = dlora.shard(model, **setting.sharding)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=RATE))
    world = replica.topology.world
    schedule = LambdaLR(optimizer, lambda step: rate(step // world))  # stepped once for each rank
    loader = DataLoader(sequences(8, uneven=False), batch_size=2 // world)
    model, optimizer, loader, schedule = prepare(accelerator, model, optimizer, loader, schedule)
    if resume:
        accelerator.load_state(str(directory / "first"))
    found = []
    for epoch in range(int(resume), EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found.append(loss.item())
        accelerator.save_state(str(directory / ("first" if epoch == 0 else f"last-{resume:d}")))
    return Result(found, replica.reductions)


class Module(lightning.LightningModule):
    """A module whose model has adapters."""

    def __init__(self, base: str, setting: Setting) -> None:
        super().__init__()
        self.model, self.found = adapted(base, setting), []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.found.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trainer.strategy.replica.parameter_groups(lr=RATE))
        schedule = {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def by_lightning(base: str, directory: Path, setting: Setting, resume: bool) -> Result:
    fresh_state()
    torch.manual_seed(resume)
    grouped = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    module = Module(base, setting)
    strategy = DloraStrategy(sharding=setting.sharding, process_group_backend="gloo")
    keep = ModelCheckpoint(
        directory / f"checkpoints-{resume:d}", "{epoch}", save_top_k=-1, save_last=False
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision={"no": "32-true", "bf16": "bf16-mixed"}[setting.precision],
        max_epochs=EPOCHS,
        accumulate_grad_batches=EVERY,
        gradient_clip_val=CLIP,
        use_distributed_sampler=False,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    first = directory / "checkpoints-0" / "epoch=0.ckpt"
    trainer.fit(module, loader_of(rank, world), ckpt_path=str(first) if resume else None)
    reductions = strategy.replica.reductions
    [figures] = trainer.validate(module, loader_of(rank, world), verbose=False)
    assert figures["val_loss"] < module.found[0] + 1  # on what it has trained on
    if not grouped:
        dist.destroy_process_group()
    return Result(module.found, reductions)


RUNS = {"hand": by_hand, "accelerate": by_accelerate, "lightning": by_lightning}


def run(kind: str, base: str, directory: Path, setting: Setting, resume: bool = False) -> Result:
    """One run of a kind; on every rank."""
    return RUNS[kind](base, directory, setting, resume)


def saved(kind: str, directory: Path, resume: bool) -> Path:
    """Where the run has written its last adapter."""
    if kind == "lightning":
        return directory / f"checkpoints-{resume:d}" / "epoch=1-adapter"
    return directory / f"last-{resume:d}"


def overflowing(base: str, method: str) -> Any:
    """Steps in fp16 from a scale at which gradients overflow on rank 0 alone."""
    model = adapted(base, Setting(method=method))
    replica = dlora.shard(model, base="world", optimizer_state="divided")
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=RATE))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loop = DloraCallback(model, optimizer, scaler=scaler, max_grad_norm=CLIP)
    batch = next(iter(loader_of(replica.topology.rank, replica.topology.world)))
    norms, changed = [], []
    for step in range(3):
        before = replica.values.clone()
        scaler.scale(model(**batch).loss).backward()
        if step == 1 and replica.topology.rank == 0:
            next(p for p in replica.named.values() if p.grad is not None).grad[0, 0] = torch.inf
        norms.append(loop.step())
        changed.append(not torch.equal(before, replica.values))
    replica.audit()
    return norms, changed, scaler.get_scale(), getattr(replica.method, "step", 0)
