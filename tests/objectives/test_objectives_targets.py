"""The chunked loss against plain `F.cross_entropy` on the full logits of an untouched twin."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import IDS, loss_of, tiny_model
from causal_models import VOCABULARY, causal_model, randomize_trainable, relative_error, token_ids
from made_tensors import Made
from refusals import refusal
from torch import Tensor, nn

from dlora import LoraConfig, UsageError, attach, disabled
from dlora.lora.attach import attachment_of, trainable_parameters
from dlora.lora.dropout import SampleKeys
from dlora.objectives import chunked_loss as objective
from dlora.objectives.output_head import output_head

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
ROWS, TOKENS = 3, 10
HEAD = {"target_modules": ["q_proj", "lm_head"]}
COPY = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@dataclass(frozen=True)
class Case:
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama"),
    "llama, head": Case("llama", HEAD),
    "llama, head copied": Case("llama", COPY),
    "tied": Case("tied"),
    "tied, head": Case("tied", HEAD),
    "tied, head copied": Case("tied", COPY),
    "tied, embedding": Case("tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "gpt2": Case("gpt2"),
    "gpt2, head": Case("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "mixtral": Case("mixtral"),
    "gemma2 (soft cap)": Case("gemma2", HEAD),
    "cohere (scale)": Case("cohere", HEAD),
    "granite (divisor)": Case("granite", HEAD),
    "head alone": Case("llama", {"target_modules": ["lm_head"]}),
}


def twins(case: Case, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(the model with `targets=`, its twin that knows nothing of it)."""
    plain = attach(causal_model(case.kind, dtype), LoraConfig(r=3, **case.settings))
    randomize_trainable(plain)
    model = copy.deepcopy(plain)
    objective.install(model)
    return model, plain


def batch() -> tuple[Tensor, Tensor]:
    """Ids, and targets as of a chat: none in the prompt, none in one row, none after the end."""
    ids = token_ids(ROWS, TOKENS)
    targets = token_ids(ROWS, TOKENS, seed=4)
    targets[:, :3] = -100
    targets[1] = -100
    targets[2, 7:] = -100
    return ids, targets


def plain_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainable_parameters(model).items()}


def check_alike(model: nn.Module, plain: nn.Module, tolerance: float) -> None:
    """Their gradients."""
    reference = gradients(plain)
    for name, gradient in gradients(model).items():
        assert reference[name].any(), name
        assert relative_error(gradient, reference[name]) < tolerance, name


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "CHUNK_BYTES", {"cpu": 4 * VOCABULARY * rows})


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_plain_cross_entropy(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(4, monkeypatch)
    model, plain = twins(CASES[case], dtype)
    ids, targets = batch()
    loss, expected = model(ids, targets=targets), plain_loss(plain, ids, targets)
    assert loss.dtype == dtype
    assert relative_error(loss, expected) < EXACT[dtype]
    (loss / 7).backward()
    (expected / 7).backward()
    check_alike(model, plain, EXACT[dtype])


@pytest.mark.parametrize("rows", [1, 2, 5, 10, 11, 1000])
def test_the_size_of_a_chunk_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch has 11 targets: chunks of one, uneven last chunks, one chunk."""
    chunks_of(rows, monkeypatch)
    model, plain = twins(CASES["llama, head"], torch.float64)
    ids, targets = batch()
    assert int((targets != -100).sum()) == 11
    loss, expected = model(ids, targets=targets), plain_loss(plain, ids, targets)
    assert relative_error(loss, expected) < 1e-12
    loss.backward()
    expected.backward()
    check_alike(model, plain, 1e-12)


@pytest.mark.parametrize("case", ["llama", "llama, head", "llama, head copied"])
def test_without_targets_the_loss_is_zero_and_every_gradient_too(case: str) -> None:
    """A rank that runs short still takes part in every reduction."""
    model, _ = twins(CASES[case], torch.float32)
    loss = model(token_ids(), targets=torch.full((2, 9), -100))
    assert float(loss.detach()) == 0 and loss.requires_grad
    loss.backward()
    found = gradients(model)
    assert found and all(g is not None and not g.any() for g in found.values())


@pytest.mark.parametrize("case", ["llama, head", "llama, head copied"])
def test_gradients_accumulate_over_micro_batches(case: str) -> None:
    model, plain = twins(CASES[case], torch.float64)
    ids, targets = batch()
    for row in range(ROWS):
        model(ids[row : row + 1], targets=targets[row : row + 1]).backward()
    plain_loss(plain, ids, targets).backward()
    check_alike(model, plain, 1e-12)


def test_padding_on_the_right_changes_nothing() -> None:
    model, _ = twins(CASES["llama, head"], torch.float64)
    ids, targets = batch()
    expected = model(ids[:, :6], targets=targets[:, :6])
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = targets.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, targets=padded)
    assert relative_error(loss, expected) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    ids, targets = batch()
    found = []
    for checkpointing in (False, True):
        model, _ = twins(CASES["llama, head"], torch.float32)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, targets=targets).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_without_gradients_the_loss_is_the_same_and_has_no_graph() -> None:
    model, plain = twins(CASES["llama, head"], torch.float64)
    ids, targets = batch()
    with torch.no_grad():
        loss = model(ids, targets=targets)
    assert not loss.requires_grad
    assert relative_error(loss, plain_loss(plain, ids, targets)) < 1e-12


@pytest.mark.parametrize("case", ["llama, head", "llama, head copied"])
def test_a_disabled_head_gives_the_base_s_loss(case: str) -> None:
    """With gradients on too: A and B of the head are then no part of the graph."""
    model, plain = twins(CASES[case], torch.float64)
    ids, targets = batch()
    with disabled(model), disabled(plain):
        loss, expected = model(ids, targets=targets), plain_loss(plain, ids, targets)
    assert relative_error(loss, expected) < 1e-12


def test_the_model_s_own_forward_stays() -> None:
    model, plain = twins(CASES["gemma2 (soft cap)"], torch.float64)
    ids, targets = batch()
    model(ids, targets=targets)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj"]}, HEAD], ids=["base", "lora"])
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, rows, hidden = 1000, 8, 24
    monkeypatch.setattr(objective, "CHUNK_BYTES", {"cpu": 4 * vocabulary * rows})
    model = causal_model("llama", vocab_size=vocabulary)
    attach(model, LoraConfig(r=2, **settings))
    objective.install(model)
    ids = token_ids(4, 50)
    with Made() as chunked:
        model(ids, targets=ids).backward()
    # A chunk's logits, or a weight that passes through a cast or a transposition.
    assert max(chunked.numels) <= vocabulary * max(rows, hidden)
    with Made() as plain:
        model(ids, labels=ids).loss.backward()
    assert max(plain.numels) >= vocabulary * 4 * 50  # what it would have been


def test_the_head_is_called_once_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks gather a sharded weight: once for a forward, not once for each chunk."""
    chunks_of(2, monkeypatch)
    model, _ = twins(CASES["llama, head"], torch.float32)
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(module))
    ids, targets = batch()
    model(ids, targets=targets).backward()
    assert calls == [model.lm_head]


@contextmanager
def keyed(model: nn.Module, ids: list[int], lengths: list[int]) -> Iterator[None]:
    with attachment_of(model).stream.keyed(SampleKeys(0, 1, ids, lengths)):
        yield


@pytest.mark.parametrize("rows", [2, 1000])
def test_dropout_in_the_head_is_keyed_by_the_sequence(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks in one padded batch, in single sequences, in chunks of any size."""
    settings = {**HEAD, "lora_dropout": 0.4}
    ids, targets = token_ids(2, 9), token_ids(2, 9, seed=4)
    lengths, numbers = [9, 6], [31, 32]
    targets[:, :2] = targets[1, 6:] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0

    chunks_of(1000, monkeypatch)
    together, _ = twins(Case("llama", settings), torch.float64)
    with keyed(together.train(), numbers, lengths):
        loss = together(ids, attention_mask=mask, targets=targets)
        loss.backward()

    chunks_of(rows, monkeypatch)
    apart, _ = twins(Case("llama", settings), torch.float64)
    parts = []
    for row, length in enumerate(lengths):
        with keyed(apart.train(), [numbers[row]], [length]):
            one = slice(row, row + 1)
            parts.append(apart(ids[one, :length], targets=targets[one, :length]))
            parts[-1].backward()
    assert relative_error(sum(parts), loss) < 1e-12
    check_alike(apart, together, 1e-12)
    together.eval()
    assert relative_error(together(ids, attention_mask=mask, targets=targets), loss) > 1e-3


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "intermediate_size": 32, "max_position_embeddings": 64}
BART = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
BART |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
REFUSED: dict[str, tuple[Any, str]] = {
    "no output head": (
        lambda: transformers.LlamaModel(causal_model("llama").config),
        "is not a causal language model with an output head",
    ),
    "plain module": (lambda: nn.Sequential(nn.Linear(2, 2)), "is not a causal language model"),
    "encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=32, d_model=8, **BART)
        ),
        "is an encoder-decoder model",
    ),
    "every token sees all others": (
        lambda: transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(vocab_size=32, d_model=8, n_layer=1, n_head=2, d_inner=8)
        ),
        "XLNetLMHeadModel is not causal: every token sees all others",
    ),
    "padding on the right is seen": (
        lambda: transformers.CpmAntForCausalLM(
            transformers.CpmAntConfig(
                vocab_size=32,
                hidden_size=8,
                num_attention_heads=2,
                dim_head=4,
                dim_ff=8,
                num_hidden_layers=1,
            )
        ),
        "CpmAntForCausalLM is not causal: a token sees the padding after it",
    ),
    "routing mixes a batch": (
        lambda: transformers.DogeForCausalLM(
            transformers.DogeConfig(**SMALL, **HEADS, is_moe=True, num_experts=4)
        ),
        "DogeForCausalLM is not causal: its router mixes the tokens of a batch",
    ),
    "several streams": (
        lambda: transformers.ProphetNetForCausalLM(
            transformers.ProphetNetConfig(
                vocab_size=32,
                hidden_size=8,
                num_decoder_layers=1,
                num_decoder_attention_heads=2,
                decoder_ffn_dim=8,
            )
        ),
        "several streams of hidden states",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_whose_loss_would_be_another_is_refused(case: str) -> None:
    build, message = REFUSED[case]
    model = build()
    assert message in refusal(objective.install, model)
    assert "forward" not in model.__dict__


# model_type: what its configuration sets; whether its logits are computed in chunks.
ACCEPTED: dict[str, tuple[dict[str, Any], bool]] = {
    "opt": ({"word_embed_proj_dim": 32}, True),  # a decoder inside the decoder
    "recurrent_gemma": ({"logits_soft_cap": 1.5}, True),
    "hyperclovax": ({"logits_scaling": 3.0}, True),  # multiplies, where Granite divides
    "granite": ({"logits_scaling": 3.0}, True),
    "falcon_h1": ({"lm_head_multiplier": 3.0}, True),
    "cohere2": ({"logit_scale": 0.3}, True),
    "minicpm3": ({"dim_model_base": 8}, True),  # scales in front of the head
    "nanochat": ({}, True),
    "gemma3": ({"text_config": {"final_logit_softcapping": 1.5}}, True),
    "gemma4": ({"text_config": {"final_logit_softcapping": 1.5}}, True),
    "bert": ({"is_decoder": True}, False),  # layers between the decoder and the head
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_loss_is_the_class_s_own(kind: str) -> None:
    settings, in_chunks = ACCEPTED[kind]
    model = tiny_model(kind, **settings).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wanted = loss_of(model)
    assert (output_head(model).finish is not None) == in_chunks
    attach(model, LoraConfig(r=2))
    objective.install(model)
    targets = torch.full_like(IDS, -100)
    targets[:, :-1] = IDS[:, 1:]
    loss = model(input_ids=IDS, targets=targets)
    assert float(loss.detach()) / int((targets >= 0).sum()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert any(g is not None and g.any() for g in gradients(model).values())  # text has no images


FAMILIES = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def on_meta(config_class: type) -> nn.Module | None:
    """The family's model with two layers; None: it needs more."""
    try:
        config = config_class()
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, 2)
        for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if isinstance(listed := vars(config).get(name), list):
                setattr(config, name, listed[:2])
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception:  # defaults that do not fit each other, or a library that is not here
        return None


def test_most_architectures_are_computed_in_chunks() -> None:
    """Found without weights, by the class's forward alone."""
    in_chunks, whole = set(), set()
    for config_class in FAMILIES:
        if (model := on_meta(config_class)) is None:
            continue
        try:
            found = whole if output_head(model).finish is None else in_chunks
        except UsageError:
            continue
        found.add(type(model).__name__)
    assert len(in_chunks) > 100 and len(whole) < 30
    known = {"CohereForCausalLM", "GraniteForCausalLM", "FalconH1ForCausalLM", "LlamaForCausalLM"}
    assert known <= in_chunks


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [(128_256, 512), (32_000, 2048), (151_936, 256), (2**20, 64), (2**28, 1)],
)
def test_rows_of_a_chunk_on_a_gpu(vocabulary: int, rows: int) -> None:
    """256 MB of float32 logits, in whole tiles of 256 rows where there are so many."""
    found = objective.chunk_rows(vocabulary, "cuda")
    assert found == rows
    assert found % 256 == 0 or found < 256
    assert found == 1 or 4 * vocabulary * found <= 256 << 20
