"""Sequences that share a row have loss and gradient of each alone, by transformers' own class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from calls import Calls
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)

from dlora import LoraConfig, attach
from dlora.data.collate import Batch, collate, packed
from dlora.data.encode import Example
from dlora.errors import UsageError
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys
from dlora.objectives import chunked_loss
from dlora.training.compiled import CompiledBlocks

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 12,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "windows": lambda: MistralConfig(**SIZES | WINDOW),
    "windows and soft caps": lambda: Gemma2Config(**SIZES | WINDOW),
    "windows and sinks": lambda: GptOssConfig(
        **SIZES | WINDOW | EXPERTS, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "longrope": lambda: Phi3Config(
        **SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=12
    ),
    "dynamic": lambda: LlamaConfig(
        **SIZES | {"max_position_embeddings": 12}, rope_parameters=DYNAMIC
    ),
}
LENGTHS = (9, 21, 3, 14)  # on both sides of a window, and of what scalings start at


def model_of(config: Any, **settings: Any) -> Any:
    """A random model; with settings, with adapters that have moved."""
    torch.manual_seed(0)
    how = {"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **how).eval()
    if settings:
        attach(model, LoraConfig(r=4, **settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.1)
    return model


def examples(lengths: Any = LENGTHS, seed: int = 0) -> list[Example]:
    drawn = np.random.default_rng(seed)
    ids = [drawn.integers(3, 64, n).astype(np.int32) for n in lengths]
    return [
        Example(10 + i, one, np.where(np.arange(len(one)) > 1, one, -100))
        for i, one in enumerate(ids)
    ]


def step(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Σ loss and its gradient by dlora."""
    model.zero_grad()
    where = {"positions": batch.positions, "lengths": batch.lengths}
    loss = model(**batch.inputs, targets=batch.targets, **where)
    loss.backward()
    return float(loss.detach()), gradient(model)


def gradient(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def own(config: Any) -> tuple[float, dict[str, Tensor]]:
    """The same by the class itself, a sequence at a time, each in a model that saw no other."""
    total, sums = 0.0, dict[str, Tensor]()
    for example in examples():
        model = model_of(config)
        ids, labels = (
            torch.tensor(values, dtype=torch.int64)[None]
            for values in (example.input_ids, example.labels)
        )
        logits = model(input_ids=ids).logits  # its own loss is in float32
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        total += float(loss.detach())
        for name, found in gradient(model).items():
            sums[name] = sums.get(name, 0) + found
    return total, sums


def check_same(found: Any, wanted: Any) -> None:
    """In float64 but for what a class computes in float32: its norms, some its softmax."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-8)
    assert found[1].keys() == wanted[1].keys()
    for name, expected in wanted[1].items():
        assert float((found[1][name] - expected).norm()) <= 1e-6 * float(expected.norm()), name


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_the_class_s_own(name: str, recomputes: bool) -> None:
    config = CONFIGS[name]()
    model = model_of(config)
    chunked_loss.install(model)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = packed(examples(), 0)
    assert batch.input_ids.shape == (1, 48) and batch.packed
    check_same(step(model, batch), own(config))
    check_same(step(model, collate(examples(), 0)), own(config))  # what was packed leaves nothing


@pytest.mark.parametrize("name", ["llama", "windows", "windows and sinks"])
def test_what_one_sequence_says_changes_no_bit_of_the_others(name: str) -> None:
    model = model_of(CONFIGS[name]())
    chunked_loss.install(model)
    hidden: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda *args: hidden.append(args[2].detach()))
    some, others = examples(), examples(seed=1)
    for first in (some[0], others[0]):
        step(model, packed([first, *some[1:]], 0))
    assert torch.equal(hidden[0][:, LENGTHS[0] :], hidden[1][:, LENGTHS[0] :])
    assert not torch.equal(hidden[0][:, : LENGTHS[0]], hidden[1][:, : LENGTHS[0]])


def test_adapters_with_dropout_drop_the_same_of_each_sequence() -> None:
    model = model_of(CONFIGS["llama"](), lora_dropout=0.3, target_modules="all-linear")
    chunked_loss.install(model)
    model.train()

    def keyed(batch: Batch) -> Any:
        row = batch.input_ids.shape[1] if batch.packed else 0
        keys = SampleKeys(0, 1, batch.ids, batch.lengths, row)
        with attachment_of(model).stream.keyed(keys):
            return step(model, batch)

    check_same(keyed(packed(examples(), 0)), keyed(collate(examples(), 0)))
    assert keyed(packed(examples(), 0))[0] != step(model, packed(examples(), 0))[0]


@pytest.mark.parametrize("how", ["eager", "recomputed", "graphs"])
def test_passes_of_other_lengths_before_one_backward_keep_their_own(how: str) -> None:
    """Packed, one more packed, and logits of another shape: each against its class alone."""
    config = CONFIGS["windows"]()
    some, others = examples(), examples((13, 2, 17), seed=1)
    logit_ids = torch.from_numpy(others[2].input_ids).long()[None]
    model = model_of(config, target_modules="all-linear")
    wanted = [step_of_losses(model, own_losses(model, e)) for e in (some, others)]
    wanted.append(step_of_losses(model, model(input_ids=logit_ids).logits.square().sum()))
    expected = {n: sum(gradients[n] for gradients in wanted) for n in wanted[0]}

    model = model_of(config, target_modules="all-linear")
    blocks = CompiledBlocks(model, packs=True, backend="aot_eager") if how == "graphs" else None
    chunked_loss.install(model)
    if blocks is not None:
        torch._dynamo.reset()
        blocks.start()
    if how == "recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def loss(of: list[Example]) -> Tensor:
        batch = packed(of, 0)
        where = {"positions": batch.positions, "lengths": batch.lengths}
        return model(**batch.inputs, targets=batch.targets, **where)

    logits = model(input_ids=logit_ids).logits.square().sum()
    found = step_of_losses(model, loss(some) + loss(others) + logits)
    check_same((0.0, found), (0.0, expected))


def own_losses(model: Any, of: list[Example]) -> Tensor:
    """Σ loss by the class itself, a sequence at a time."""
    total = torch.zeros(())
    for example in of:
        values = (example.input_ids, example.labels)
        ids, labels = (torch.tensor(v, dtype=torch.int64) for v in values)
        logits = model(input_ids=ids[None]).logits
        total = total + F.cross_entropy(logits[0, :-1], labels[1:], reduction="sum")
    return total


def step_of_losses(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return gradient(model)


def test_attention_outside_of_the_table_is_refused_not_computed() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = model_of(BloomConfig(**sizes))
    chunked_loss.install(model)
    batch = packed(examples(), 0)
    batch.extra.clear()  # it takes no positions
    with pytest.raises(UsageError, match="would see each other"):
        step(model, batch)


@pytest.mark.parametrize("has_targets", [True, False], ids=["loss", "logits"])
def test_what_a_pass_returns_is_no_view(has_targets: bool) -> None:
    """FSDP2 warns of a root module that returns one: its hook would be lost by `out += …`."""
    model = model_of(CONFIGS["llama"]())
    chunked_loss.install(model)
    batch = packed(examples(), 0)
    where = {"targets": batch.targets, "lengths": batch.lengths} if has_targets else {}
    found = model(**batch.inputs, **where)
    assert not (found if has_targets else found.logits)._is_view()


def test_more_sequences_than_fit_a_row_are_refused() -> None:
    model = model_of(CONFIGS["llama"]())
    chunked_loss.install(model)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(
        UsageError, match=r"2 sequences of 9 tokens do not fit into 1 row\(s\) of 8"
    ):
        model(input_ids=ids, targets=ids, lengths=[4, 5])
    ids = ids.expand(2, -1)
    with pytest.raises(UsageError, match="packed ones share one row"):
        model(input_ids=ids, targets=ids, lengths=[4, 2, 2])


def test_another_model_is_left_alone() -> None:
    """The tables of transformers are shared by all models of a process."""
    plain = model_of(CONFIGS["windows"]())
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        before = plain(ids).logits
        other = model_of(CONFIGS["windows"]())
        chunked_loss.install(other)
        step_of = packed(examples(), 0)
        other(**step_of.inputs, targets=step_of.targets, lengths=step_of.lengths)
        assert torch.equal(plain(ids).logits, before)


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """Stands for the function of the package flash-attn, which needs a GPU; [B, T, heads, D]."""
    how = {"scale": softmax_scale, "is_causal": causal, "enable_gqa": True}
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **how).transpose(
        1, 2
    )


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """The same of rows [T, heads, D] of many lengths. They come as the real one wants them."""
    lengths = np.diff(cu_seqlens_q.numpy()).tolist()
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_k is cu_seqlens_q
    assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k == max(lengths)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([flash(*(x[None] for x in p), softmax_scale, causal)[0] for p in parts])


def test_flash_attention_of_one_row_reads_nothing_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither of several sequences in the row nor of one; loss and gradient are those of sdpa."""
    process = flash_utils._lazy_define_process_function(flash_varlen)
    kernels = (flash, flash_varlen, None, None, None), (process, process)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: kernels)
    model = model_of(CONFIGS["llama"](), target_modules="all-linear")
    chunked_loss.install(model)
    for batch in (packed(examples(), 0), collate(examples()[:1], 0)):
        wanted = step(model, batch)
        with monkeypatch.context() as patch:
            patch.setattr(model.config, "_attn_implementation", "flash_attention_2")
            with Calls() as calls:
                found = step(model, batch)
        check_same(found, wanted)
        assert calls["aten._local_scalar_dense.default"] == 1  # the loss, by `step`
