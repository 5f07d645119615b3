"""The trace of a micro-batch against the same micro-batch really computed, byte for byte."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sampling import full
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)

from dlora import FloraConfig
from dlora.base.quantize import quantize
from dlora.config.recompute import Recompute
from dlora.lora.attach import attach
from dlora.lora.config import LoraConfig
from dlora.objectives import chunked_loss as targets
from dlora.objectives.dpo import Dpo, DpoOptions
from dlora.plan.activations import estimate
from dlora.plan.trace import trace
from dlora.quant import dequantize as kernel
from dlora.tasks.preference import Preference

SAVED, ALL = Recompute(), Recompute(1)
R, ROWS, TOKENS, VOCABULARY = 8, 2, 128, 4000
HIDDEN, FFN, LAYERS, HEADS, KV = 256, 688, 6, 4, 2
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    ),
    # Few activations, so that a whole weight stands out.
    "heavy": LlamaConfig(**LLAMA | {"vocab_size": 200, "intermediate_size": 16384}),
    "windows": MistralConfig(**LLAMA, sliding_window=32),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
}


def model_of(
    name: str, dtype: torch.dtype, device: str, quantization: str = "none", **settings: Any
) -> Any:
    """A model with adapters; `config` is the class of their settings."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    if quantization != "none":
        quantize(model, quantization)
    config = settings.pop("config", LoraConfig)
    attach(model, config(r=R, **settings))
    return model


def allocated(
    model: nn.Module,
    rows: int = ROWS,
    tokens: int = TOKENS,
    few: int | None = None,
    lengths: Sequence[int] = (),
    go: Callable[[], None] | None = None,
) -> tuple[int, int]:
    """(alive between forward and backward, most alive) as torch's profiler sees the allocator.

    Args:
        lengths: of sequences that share the one row.
        go: another pass than that of `run`, of a model that is prepared for it.
    """
    if go is None:
        targets.install(model)
        go = functools.partial(run, model, rows, tokens, few, lengths)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    go()  # what is made once is there now
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        go()
    events = list(profile.profiler.kineto_results.events())  # type: ignore[union-attr]
    [turn] = [event.start_ns() for event in events if event.name() == "backward begins"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = saved = 0
    for when, nbytes in changes:
        saved = alive if when < turn else saved
        alive += nbytes
        saved = alive if when < turn else saved
        most = max(most, alive)
    return saved, most


def run(
    model: nn.Module,
    rows: int,
    tokens: int,
    few: int | None = None,
    lengths: Sequence[int] = (),
) -> None:
    ids = torch.randint(model.config.vocab_size, (rows, tokens))
    marked = ids.clone()
    if few is not None:
        marked.view(-1)[few:] = targets.IGNORED
    packed = {}
    if lengths:
        positions = torch.cat([torch.arange(n) for n in lengths])
        packed = {"position_ids": positions[None], "lengths": lengths}
    loss = model(input_ids=ids, targets=marked, **packed)
    with torch.profiler.record_function("backward begins"):
        loss.backward()


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", ["llama", "windows"])
def test_bytes_are_those_of_a_packed_row(name: str, every: int) -> None:
    """Of sequences side by side, not of one as long as all of them."""
    lengths, how = [40, 16, 104, 8, 24], Recompute(every)
    total, model = sum(lengths), model_of(name, torch.float32, "cpu")
    skeleton = model_of(name, torch.float32, "meta")
    planned = trace(skeleton, 1, total, checkpointing=how, lengths=lengths)
    if every:
        model.activation_checkpointing_enable({"use_reentrant": False})
    saved, most = allocated(model, 1, total, lengths=lengths)
    assert planned.estimated == ""
    # Random states of what is computed again are not traced.
    assert planned.saved == pytest.approx(saved, rel=0.005, abs=6000 * LAYERS * every)
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.01)
    whole = trace(skeleton, 1, total, checkpointing=how)
    assert planned.flops < whole.flops


# Every 4th of 6 layers is traced as the first block of a period, and the two behind it.
@pytest.mark.parametrize("every", [0, 1, 2, full(4)])
@pytest.mark.parametrize("dtype", [full(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bytes_are_those_of_a_real_pass(name: str, dtype: torch.dtype, every: int) -> None:
    how = Recompute(every)
    planned = trace(model_of(name, dtype, "meta"), ROWS, TOKENS, checkpointing=how)
    model = model_of(name, dtype, "cpu")
    if every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        model.disable_input_require_grads()  # only reentrant checkpointing needs them
    saved, most = allocated(model)
    assert planned.estimated == ""
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.005)
    assert planned.saved == pytest.approx(saved, abs=6000 * LAYERS)  # random states, not traced


@pytest.mark.parametrize("joined", [True, False])
def test_bytes_are_those_of_pairs_with_a_reference(joined: bool) -> None:
    """Which has no graph, but logits beside the policy's."""
    settings = {} if joined else {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}
    task, bare = Preference(), model_of("llama", torch.float32, "meta", **settings)
    task.objective = Dpo(DpoOptions())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    task.check(skeleton)
    assert task.reference(bare) == ("joined" if joined else "apart")
    targets_ = 2 * ROWS * (TOKENS // 2 - 1)
    planned = trace(bare, ROWS, TOKENS, checkpointing=SAVED, task=task, targets=targets_)
    model = model_of("llama", torch.float32, "cpu", **settings)
    task.install(model)
    batch = task.collate([task.example(TOKENS)] * ROWS, 0)
    assert batch.num_targets == targets_

    def go() -> None:
        loss = task.objective.loss(model, batch)
        with torch.profiler.record_function("backward begins"):
            loss.backward()

    saved, most = allocated(model, go=go)
    assert planned.estimated == ""
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.01)
    assert planned.saved == pytest.approx(saved, rel=0.01)


def test_inputs_in_host_memory_are_not_on_the_device() -> None:
    """[rows, tokens, hidden] of each layer, one of which comes back at a time."""
    model = model_of("llama", torch.bfloat16, "meta")
    here = trace(model, ROWS, TOKENS, checkpointing=ALL)
    there = trace(model, ROWS, TOKENS, checkpointing=Recompute(1, offload=True))
    inputs = ROWS * TOKENS * HIDDEN * 2
    assert there.offloaded == LAYERS * inputs == here.saved - there.saved
    assert there.blocks == here.blocks - (LAYERS - 1) * inputs
    assert (there.loss, there.flops) == (here.loss - LAYERS * inputs, here.flops)


def test_tokens_that_are_no_targets_have_no_logits() -> None:
    arguments = ("llama", torch.float32)  # in bfloat16 AMX has scratch that others have not
    planned = trace(model_of(*arguments, "meta"), ROWS, TOKENS, checkpointing=SAVED, targets=20)
    whole = trace(model_of(*arguments, "meta"), ROWS, TOKENS, checkpointing=SAVED)
    _, most = allocated(model_of(*arguments, "cpu"), few=20)
    assert planned.estimated == ""
    fewer = (ROWS * TOKENS - 20) * 4 * HIDDEN  # hidden states that the head does not see
    assert planned.loss < whole.loss
    assert whole.saved - planned.saved == pytest.approx(fewer, rel=0.05)
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.005)


@pytest.mark.parametrize("name", ["llama", full("gpt2")])
def test_what_dora_keeps_is_in_it(name: str) -> None:
    """Outputs, of which most models keep some anyway; with a bias something of their size."""
    arguments = (name, torch.bfloat16)
    planned = trace(model_of(*arguments, "meta", use_dora=True), ROWS, TOKENS, checkpointing=SAVED)
    plain = trace(model_of(*arguments, "meta"), ROWS, TOKENS, checkpointing=SAVED)
    saved, most = allocated(model_of(*arguments, "cpu", use_dora=True))
    assert planned.estimated == ""
    assert planned.saved > 1.1 * plain.saved
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.005)
    assert planned.saved == pytest.approx(saved, abs=6000 * LAYERS)
    if name == "llama":
        skeleton = model_of(*arguments, "meta", use_dora=True)
        estimated = estimate(skeleton, ROWS * TOKENS, SAVED, "asked for")
        assert estimated.saved == pytest.approx(planned.saved, rel=0.25)


def test_what_flora_keeps_is_in_it() -> None:
    """Its contracted factors, beside z."""
    arguments, settings = ("llama", torch.float32), {"config": FloraConfig, "flora_r_out": 5}
    planned = trace(model_of(*arguments, "meta", **settings), ROWS, TOKENS, checkpointing=SAVED)
    saved, most = allocated(model_of(*arguments, "cpu", **settings))
    assert planned.estimated == ""
    assert max(planned.blocks, planned.loss) == pytest.approx(most, rel=0.005)
    assert planned.saved == pytest.approx(saved, abs=6000 * LAYERS)


@pytest.mark.parametrize("quantization", [full("nf4"), "int8"])  # 5 s
def test_what_is_unpacked_is_in_it(quantization: str) -> None:
    """One layer at a time; what unpacking a chunk of it takes beside is left to the allowance."""
    arguments = ("heavy", torch.bfloat16)
    planned = trace(model_of(*arguments, "meta", quantization), 1, 8, checkpointing=SAVED)
    plain = trace(model_of(*arguments, "meta"), 1, 8, checkpointing=SAVED)
    assert planned.estimated == ""
    whole = 2 * HIDDEN * 16384
    assert planned.blocks == pytest.approx(plain.blocks + whole, rel=0.1)
    assert planned.saved == plain.saved
    _, most = allocated(model_of(*arguments, "cpu", quantization), 1, 8)
    chunk = 12 * kernel._CHUNK_BYTES["cpu"]
    assert 0.99 * planned.blocks <= most <= 1.01 * planned.blocks + chunk
    estimated = estimate(model_of(*arguments, "meta", quantization), 8, SAVED, "asked for")
    assert estimated.blocks == pytest.approx(planned.blocks, rel=0.25)
    assert estimated.flops == pytest.approx(planned.flops, rel=0.25)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_autograd_saves_is_in_it(name: str) -> None:
    """torch's hooks see each tensor saved for backward; beside them the loss holds a gradient."""
    model = model_of(name, torch.float32, "cpu")
    targets.install(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            seen.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, targets=ids.clone())
    # The logits of a chunk were saved as well, and are gone by now.
    alive = {s.data_ptr(): s.nbytes() for see in seen if (s := see()) is not None}
    saved = sum(alive.values()) + 4 * ROWS * TOKENS * HIDDEN  # the gradient of the hidden state
    planned = trace(model_of(name, torch.float32, "meta"), ROWS, TOKENS, checkpointing=SAVED)
    assert planned.saved == pytest.approx(saved, rel=0.01)
    assert loss.requires_grad


def test_operations_are_those_of_the_formulas() -> None:
    tokens, narrow = ROWS * TOKENS, HIDDEN // HEADS * KV
    shapes = [(HIDDEN, HIDDEN), (narrow, HIDDEN), (narrow, HIDDEN), (HIDDEN, HIDDEN)]
    shapes += [(FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)]
    block = 2 * tokens * sum(m * n for m, n in shapes)
    adapters = 2 * tokens * R * sum(m + n for m, n in shapes)
    product = 2 * ROWS * HEADS * TOKENS * TOKENS * (HIDDEN // HEADS) // 2  # the causal half
    forward = LAYERS * (block + adapters + 2 * product)
    head = 2 * tokens * HIDDEN * VOCABULARY
    # No gradient is taken to the input of the first block, which q, k and v read.
    first = 2 * tokens * (sum(m * n for m, n in shapes[:3]) + R * sum(n for _, n in shapes[:3]))
    backward = LAYERS * (block + 2 * adapters + 5 * product) - first
    model = model_of("llama", torch.bfloat16, "meta")
    assert trace(model, ROWS, TOKENS, checkpointing=SAVED).flops == forward + backward + 2 * head
    again = trace(model, ROWS, TOKENS, checkpointing=ALL).flops - (forward + backward + 2 * head)
    assert forward <= again <= forward + first


def test_experts_count_for_the_tokens_that_see_them() -> None:
    model = model_of("mixtral", torch.bfloat16, "meta", target_modules=["q_proj"])
    planned = trace(model, ROWS, TOKENS, checkpointing=SAVED)
    assert planned.estimated == ""
    seen = 2 * 3 * HIDDEN * FFN  # two experts of three matrices for each token
    attention = 2 * HIDDEN * (HIDDEN + HIDDEN // HEADS * KV)
    products = 2 * 2 * ROWS * TOKENS * (LAYERS * (seen + attention) + HIDDEN * VOCABULARY)
    assert planned.flops == pytest.approx(products, rel=0.1)


class Peeking(nn.Module):
    """Looks at a value, as no pass over shapes can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum().item() else x


def test_a_model_that_cannot_be_traced_is_estimated() -> None:
    model = model_of("llama", torch.bfloat16, "meta")
    traced = trace(model, ROWS, TOKENS, checkpointing=SAVED)
    model.model.norm = Peeking(model.model.norm)
    estimated = trace(model, ROWS, TOKENS, checkpointing=SAVED)
    assert traced.estimated == ""
    assert "_local_scalar_dense" in estimated.estimated
    for figure in ("saved", "blocks", "flops"):
        assert getattr(estimated, figure) == pytest.approx(getattr(traced, figure), rel=0.25)


def test_a_skeleton_is_left_as_it_was() -> None:
    model = model_of("llama", torch.bfloat16, "meta")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    trace(model, ROWS, TOKENS, checkpointing=ALL)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert len(model.model.layers) == LAYERS
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "forward" not in vars(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def test_adapted_experts_are_planned_without_a_copy_of_their_weights() -> None:
    """A and B, their casts and the products with A; W0 + ΔW, as PEFT forms it, would be seen."""
    attention: dict[str, Any] = {"target_modules": ["q_proj"]}
    plain = trace(
        model_of("mixtral", torch.bfloat16, "meta", **attention), ROWS, TOKENS, checkpointing=SAVED
    )
    model = model_of("mixtral", torch.bfloat16, "meta", **attention, target_parameters=EXPERTS)
    planned = trace(model, ROWS, TOKENS, checkpointing=SAVED)
    assert planned.estimated == ""
    weights = [p for name, p in model.named_parameters() if name.endswith(tuple(EXPERTS))]
    factors = [p for name, p in model.named_parameters() if "experts.adapter" in name]
    assert 0 < planned.saved - plain.saved < sum(p.nbytes for p in weights) / 2
    assert planned.saved - plain.saved >= sum(p.numel() for p in factors) * 2 / 2
    assert planned.flops > plain.flops
