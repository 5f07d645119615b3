"""A base that says "one" and ends its turn: each token decides the next, whatever came before.

The residual stream is the token's own one-hot embedding (attention and MLP add nothing), and the
head maps it to the next token. Behind the end of a turn it goes on: "tttt…".
"""

from pathlib import Path

import torch
from tiny import VOCABULARY, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

CHAIN = ["Ċ", "o", "n", "e", "<|im_end|>", "t", "t"]


def save_chain(directory: Path, *, template: bool = True) -> Path:
    """The base; its tokenizer calls `<pad>` the end of texts, and no file says `<|im_end|>`."""
    made = tokenizer()
    made.eos_token = "<pad>"
    if not template:
        made.chat_template = None
    made.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=264,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=VOCABULARY - 1,
    )
    model = LlamaForCausalLM(config)
    ids = made.convert_tokens_to_ids(CHAIN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(VOCABULARY):
            model.model.embed_tokens.weight[token, token] = 1.0
        for now, then in zip(ids[:-1], ids[1:], strict=True):
            model.lm_head.weight[then, now] = 1.0
    model.save_pretrained(directory)
    return directory
