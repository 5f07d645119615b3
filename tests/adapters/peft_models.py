"""Small models of every kind of layer that adapters are put on, and a batch for each.

`model_of(name)` makes one, with the same weights at every call; `batch(model)` is what it takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from causal_models import causal_model, randomize, token_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS, WIDTH, WORDS = 6, 12, 30


class Mlp(nn.Module):
    """Two linear layers, with norms around the second where it is asked for."""

    def __init__(self, bias: bool = True, norms: bool = False) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH) if norms else nn.Identity()
        self.up = nn.Linear(WIDTH, 20, bias=bias)
        self.after = nn.LayerNorm(20) if norms else nn.Identity()
        self.down = nn.Linear(20, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.after(self.up(self.before(x)).tanh())).log_softmax(-1)


class Block(nn.Module):
    """Two layers beside which the input goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Deep(nn.Module):
    """A list of alike blocks under a prefix, as `layers_to_transform` counts them."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(depth))})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body["layers"]:
            x = block(x)
        return self.head(x)


class Words(nn.Module):
    """An embedding, a transformers `Conv1D` and a linear layer."""

    batch_of = "words"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8, **settings)
        self.mix = Conv1D(6, 8)
        self.head = nn.Linear(6, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).tanh())


class Image(nn.Module):
    """A convolution of 1, 2 or 3 dimensions between two linear layers."""

    def __init__(self, dims: int, kernel_size: int = 3, channels: int = 4, **settings: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.shape = (channels, *[4] * dims)
        self.inner = nn.Linear(WIDTH, channels * 4**dims)
        self.conv = kind(channels, 8, kernel_size, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.inner(x).tanh().view(-1, *self.shape)).tanh()
        return self.head(y.flatten(2).mean(2))


class Attention(nn.Module):
    """torch's own attention, whose forward reads its weights."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **settings)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return self.head(self.mha(x, x, x)[0]).squeeze(0)


class Recurrent(nn.Module):
    """A linear layer before and behind a GRU, whose weights are parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.up(x).unsqueeze(0))[0].squeeze(0))


class Product(nn.Module):
    """x W + b by a parameter [in, out] of its own."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.ones(m))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """A stack of matrices [E, out, in], of which each row takes its own."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x)) % len(self.stack)
        parts = [x[places == e] @ self.stack[e].mT for e in range(len(self.stack))]
        return torch.cat(parts)


class Normed(nn.Module):
    """A linear layer and a normalisation with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


class Products(nn.Module):
    """An MLP whose layers are no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Product(WIDTH, 20), Product(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x).tanh())


_KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "mlp without biases": lambda: Mlp(bias=False),
    "mlp with norms": lambda: Mlp(norms=True),
    "deep": Deep,
    "words": Words,
    "words with padding": lambda: Words(padding_idx=3),
    "words by frequency": lambda: Words(scale_grad_by_freq=True),
    "words of bounded norm": lambda: Words(max_norm=1.0),
    "image 1d": lambda: Image(1),
    "image 2d": lambda: Image(2, padding=1),
    "image 2d, no bias, strided": lambda: Image(2, 2, stride=2, bias=False),
    "image 3d": lambda: Image(3, 2),
    "pixels 1d": lambda: Image(1, 1),
    "pixels 2d": lambda: Image(2, 1),
    "pixels 3d": lambda: Image(3, 1),
    "image in groups": lambda: Image(2, groups=2),
    "image dilated": lambda: Image(1, 2, dilation=2),
    "image reflected": lambda: Image(2, padding=1, padding_mode="reflect"),
    "attention": Attention,
    "attention of two widths": lambda: Attention(kdim=WIDTH, vdim=WIDTH),
    "recurrent": Recurrent,
    "products": Products,
    "mixture": Mixture,
    "normed": Normed,
    "llama": lambda: causal_model("llama"),
    "tied": lambda: causal_model("tied"),
    "gpt2": lambda: causal_model("gpt2"),
    "mixtral": lambda: causal_model("mixtral"),
}


def model_of(name: str) -> nn.Module:
    """A model of the table; not from the global generator's state."""
    torch.manual_seed(0)
    model = _KINDS[name]()
    randomize(model)
    return model


def batch(model: nn.Module, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Tensor:
    """What a model of the table takes: a leaf with a gradient, or ids."""
    if hasattr(model, "config"):
        return token_ids()
    draw = torch.Generator().manual_seed(5)
    if getattr(model, "batch_of", None) == "words":
        return torch.randint(0, WORDS, (rows, 4), generator=draw)
    return torch.randn(rows, WIDTH, generator=draw).to(dtype).requires_grad_()


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """The output, of a language model its logits."""
    y = model(x)
    return y.logits if hasattr(y, "logits") else y
