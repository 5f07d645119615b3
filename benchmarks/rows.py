"""The model of all benchmarks, and the ways of doing a LoRA step on it that several of them time.

A Llama-shaped bf16 model with random weights, r=16 on all linear layers, 4×256 tokens per rank.
Every row runs forward, the same loss, backward, clip, AdamW and zero_grad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dlora import LoraConfig, attach, quantize, shard
from dlora.methods.trained_replica import TrainedReplica
from dlora.sharding.engines.storage import held_bytes
from dlora.training.compiled import CompiledBlocks

SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SEQUENCES, TOKENS, R = 4, 256, 16


@dataclass
class Row:
    """One way of doing the step."""

    step: Callable[[], None]
    held: int  # bytes of frozen parameters (of all parameters in full fine-tuning) between steps


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).train()


def random_batch(rank: int) -> torch.Tensor:
    """[SEQUENCES, TOKENS] token ids, other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, TOKENS), generator=generator)


def adapter_parameters(model: nn.Module) -> int:
    """Numbers in A and B on all linear layers of the blocks of an unadapted model."""
    shapes = [m.weight.shape for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return sum(R * (m + n) for m, n in shapes)


def fully_shard_blocks(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def dlora(
    batch: torch.Tensor,
    base: str,
    *,
    engine: str = "fsdp2",
    resident: float = 0.0,
    ranks_per_node: int | None = None,
    quantization: str = "none",
    compiled: bool = False,
) -> Row:
    """W0 placed and packed by dlora, A and B in float32 on every rank."""
    model = base_model()
    if quantization != "none":
        quantize(model, quantization)
    attach(model, LoraConfig(r=R))
    replica = shard(
        model, engine=engine, base=base, resident=resident, ranks_per_node=ranks_per_node
    )
    if compiled:
        CompiledBlocks(model, packs=False).start()
    return adapted(model, replica, batch)


def adamw(replica: TrainedReplica) -> torch.optim.Optimizer:
    return torch.optim.AdamW(replica.parameter_groups(lr=1e-4), fused=True)


def adapted(
    model: LlamaForCausalLM,
    replica: TrainedReplica,
    batch: torch.Tensor,
    optimizer_of: Callable[[TrainedReplica], torch.optim.Optimizer] = adamw,
) -> Row:
    """The step of dlora's own loop."""
    optimizer = optimizer_of(replica)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        replica.reduce_gradients()
        replica.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Row(step, held_bytes(model))


def peft(batch: torch.Tensor, mesh: DeviceMesh, *, compiled: bool = False) -> Row:
    """PEFT's adapters inside `fully_shard` per block: A and B in bf16, as FSDP2 wants one dtype."""
    config = PeftLoraConfig(r=R, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    layers = model.base_model.model.model.layers
    for layer in layers if compiled else ():
        layer.compile()
    fully_shard_blocks(model, layers, mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Row(trainer(model, batch, trained), held_bytes(model))


def products(batch: torch.Tensor) -> Row:
    """The matrix products of the frozen layers alone: y = x·Wᵀ and dx = dy·W."""
    weights = [m.weight.detach() for m in base_model().modules() if isinstance(m, nn.Linear)]
    widths = {width for weight in weights for width in weight.shape}
    rows = {width: torch.randn(batch.numel(), width, dtype=weights[0].dtype) for width in widths}

    def step() -> None:
        for weight in weights:
            out, into = weight.shape
            rows[into] @ weight.t()
            rows[out] @ weight

    return Row(step, sum(weight.nbytes for weight in weights))


def trainer(
    model: nn.Module, batch: torch.Tensor, trained: list[nn.Parameter]
) -> Callable[[], None]:
    """A step of plain torch."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
