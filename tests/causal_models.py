"""Tiny random causal language models without dropout, and how far two tensors are apart."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

# On a machine that does other things too, waiting for a second thread takes longer than the tests.
torch.set_num_threads(1)

VOCABULARY = 97
# PEFT warns of tied weights, of saved embeddings and of fan_in_fan_out; numbers decide in tests.
quiet_peft = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", {"head_dim": 6, "final_logit_softcapping": 2.5}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
}


def causal_model(
    kind: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """The same weights at every call; all of them random, so that each has to be in its place."""
    config: Any
    if kind == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4}
        settings = sizes | no_dropout | {"n_positions": 64} | _NO_SPECIAL_TOKENS | overrides
        config = transformers.GPT2Config(**settings)
    else:
        family, extra = _KINDS[kind]
        settings = _SIZES | _NO_SPECIAL_TOKENS | extra | overrides
        config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        experts_implementation="eager",  # the only one that computes in float64
    )
    randomize(model)
    return model


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 1) -> None:
    """Every parameter random: matrices around 0, vectors around 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(module.parameters()):
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0))


@torch.no_grad()
def randomize_trainable(model: nn.Module, seed: int = 2) -> None:
    """Every trainable parameter moved away from where it starts, so that ΔW is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def token_ids(rows: int = 2, tokens: int = 9, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of `token_ids`."""
    return model(token_ids()).logits


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖, and ‖ours‖ where the reference is 0."""
    ours, reference = ours.detach().double(), reference.detach().double()
    norm, difference = reference.norm(), (ours - reference).norm()
    return float(difference / norm if norm > 0 else difference)
