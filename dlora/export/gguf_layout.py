"""Where llama.cpp has a weight of a Hugging Face model: its name, and the order of its rows.

    model.layers.3.self_attn.q_proj.weight   ->   blk.3.attn_q.weight

llama.cpp rotates neighbouring rows of Llama's queries and keys, transformers row i and i + d/2 of a
head, so the rows of q and k are in another order (arXiv:2104.09864 rotates neighbours):

    W [heads · 2 · d/2, in]  ->  W [heads · d/2 · 2, in]        a permutation of each head's rows

The rows of an adapter's B are those of the weight, so B is permuted alike, and A is not.

Source: `LlamaModel.permute` in llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor

from dlora.errors import UsageError

_WORDS = {word: key for key, word in gguf.MODEL_ARCH_NAMES.items()}
# transformers' model_type → llama.cpp's architecture, and whether it permutes q and k
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


@dataclass(frozen=True)
class Layout:
    """The layout of one model.

    Attributes:
        architecture: llama.cpp's word for it.
        permutes: whether q and k are permuted.
        heads: of the queries, and of the keys.
    """

    architecture: str
    permutes: bool
    heads: tuple[int, int]
    blocks: int

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout for a model's configuration.

        Raises:
            UsageError: it is none of `ARCHITECTURES`, or computes what these do not.
        """
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise UsageError(
                f"--format: gguf has no layout for {kind} here, only for "
                f"{', '.join(ARCHITECTURES)}; "
                "export with --merge and use llama.cpp's own convert_hf_to_gguf.py"
            )
        heads = (config.num_attention_heads, config.num_key_value_heads)
        return cls(*ARCHITECTURES[kind], heads, config.num_hidden_layers)

    def name(self, key: str) -> str:
        """llama.cpp's name of a parameter.

        Raises:
            UsageError: it has none.
        """
        names = gguf.get_tensor_name_map(_WORDS[self.architecture], self.blocks)
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"--format: gguf has no name for {key} of a {self.architecture}")
        return found

    def permuted(self, key: str, rows: Tensor) -> Tensor:
        """Rows of a weight, a bias or an adapter's B, in llama.cpp's order.

        Args:
            key: of the parameter, with or without what follows its module's path.
            rows: [out, …]
        """
        names = key.split(".")
        if not self.permutes or not {"q_proj", "k_proj"} & set(names):
            return rows
        heads = self.heads["k_proj" in names]
        pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)
