"""Tiny models, a tokenizer and chats, made from a seed and saved where a test wants them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<pad>"]
VOCABULARY = 256 + len(SPECIAL)

# Sizes that divide neither by 3 nor by 4, so that shards are uneven there.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": VOCABULARY - 1,
}
_BLOCKS = {"hidden_size": 128, "intermediate_size": 192}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    **dict.fromkeys(("bos_token_id", "eos_token_id"), VOCABULARY - 2),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}
# Chats of `save_chats` are shorter and longer than this.
_ORIGINAL = 48
_LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": _ORIGINAL,
    "factor": 4.0,
    "short_factor": [1.0] * 5,
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0],
}
_NO_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "wide": lambda: LlamaConfig(
        **_LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    ),
    # Rows that divide into blocks of 64, in numbers that do not divide by 3.
    "blocks": lambda: LlamaConfig(**_LLAMA | _BLOCKS),
    "tied_blocks": lambda: LlamaConfig(**_LLAMA | _BLOCKS, tie_word_embeddings=True),
    "ragged": lambda: LlamaConfig(**_LLAMA | _BLOCKS | {"intermediate_size": 200}),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "gpt2_blocks": lambda: GPT2Config(**_GPT2 | {"n_embd": 64}),
    "mixtral": lambda: MixtralConfig(
        **_LLAMA | {"intermediate_size": 72}, num_local_experts=4, num_experts_per_tok=2
    ),
    # What a loss must not depend on, but could: neighbours in a batch, and random numbers.
    "windows": lambda: Gemma2Config(
        **_LLAMA | _NO_IDS, head_dim=10, query_pre_attn_scalar=10, sliding_window=20
    ),
    "longrope": lambda: Phi3Config(
        **_LLAMA | _NO_IDS | {"original_max_position_embeddings": _ORIGINAL},
        rope_parameters={"rope_theta": 10000.0, **_LONGROPE},
    ),
    "dynamic": lambda: LlamaConfig(
        **_LLAMA | {"max_position_embeddings": _ORIGINAL},
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
    ),
    "gpt2_dropout": lambda: GPT2Config(**_GPT2 | _DROPOUT),
    "opt_dropout": lambda: OPTConfig(
        **_NO_IDS,
        vocab_size=VOCABULARY,
        hidden_size=40,
        word_embed_proj_dim=40,
        ffn_dim=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        layerdrop=0.5,
        attention_dropout=0.1,
    ),
    "llama_dropout": lambda: LlamaConfig(**_LLAMA, attention_dropout=0.3),
    "mixtral_aux": lambda: MixtralConfig(
        **_LLAMA | {"intermediate_size": 72},
        num_local_experts=4,
        num_experts_per_tok=2,
        router_jitter_noise=0.3,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    ),
    "mixtral_blocks": lambda: MixtralConfig(
        **_LLAMA | _BLOCKS, num_local_experts=4, num_experts_per_tok=2
    ),
}


def save_model(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of `MODELS` and the tokenizer; its directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros and ones: each value has to be in its place
            parameter.normal_(0, 0.15).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_filled(directory: Path, dtype: torch.dtype, value: float, **sizes: int) -> Any:
    """A Llama of `sizes` whose weights are all `value`; its skeleton, on the meta device."""
    config = LlamaConfig(**sizes, hidden_size=1024, num_attention_heads=8, dtype=dtype)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.save_pretrained(directory)
    weights = {n: torch.full(p.shape, value, dtype=dtype) for n, p in skeleton.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return skeleton


def whole(path: str | Path, dtype: str = "float32") -> Any:
    """A saved model as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[:1],
    )
    made.chat_template = CHATML
    return made


def save_chats(path: Path, count: int) -> Path:
    """`count` short chats of very different lengths, as JSON lines."""
    draw = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            question = " ".join(draw.choices(words, k=draw.randint(1, 4)))
            answer = " ".join(draw.choices(words, k=draw.randint(1, 6)))
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def command(base: str | Path, directory: Path, **settings: Any) -> list[str]:
    """Words for `dlora.train`: 2 steps on `base`, in `directory`/run; `__` stands for a dot."""
    chats = directory / "chats.jsonl"
    if not chats.exists():
        save_chats(chats, 8)
    given = {
        "model__path": str(base),
        "model__dtype": "float32",
        "adapter__r": 4,
        "data__train": str(chats),
        "train__max_steps": 2,
        "train__global_batch_size": 4,
        "output__dir": str(directory / "run"),
        "output__tensorboard": False,
    }
    words = []
    for key, value in (given | settings).items():
        if value is not None:  # None takes a setting out
            shown = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{key.replace('__', '.')}", shown]
    return words
