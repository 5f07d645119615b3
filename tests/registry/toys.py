"""One added file each: what somebody writes who adds a method, an initialisation, …

`FILES` maps a path below `dlora/` to the file's content. No other file is touched.
"""

from pathlib import Path

import dlora

GATED = '''
"""ΔW = s·g·B·A with a trained gate g of each module."""
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dlora.lora.config import LoraConfig
from dlora.lora.variants.lora import LoraAdapter
from dlora.registry import option


@dataclass(frozen=True)
class GatedConfig(LoraConfig):
    method: ClassVar[str] = "gated"
    gate: float = option(1.0, "the gate at the start", gt=0, lt=8)

    def shapes_for(self, path: str, kernel: tuple[int, ...]) -> dict[str, Any]:
        return {"gate": self.gate}


class GatedAdapter(LoraAdapter):
    settings = GatedConfig
    name = "gated"

    def __init__(self, *, gate: float, dtype: Any, device: Any, **others: Any) -> None:
        super().__init__(dtype=dtype, device=device, **others)
        self.start = gate
        self.lora_gate = nn.Parameter(torch.empty(1, 1, dtype=dtype, device=device))

    def reset(self, **how: Any) -> None:
        super().reset(**how)
        with torch.no_grad():
            self.lora_gate.fill_(self.start)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B * self.lora_gate
'''
HALVES = '''
"""A₀ and B₀ are the first rows and columns of W0, scaled to a size."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlora.lora.init.base import Initialisation
from dlora.registry import option


@dataclass(frozen=True)
class HalvesOptions:
    halves_size: float = option(1.0, "the largest element of A", gt=0)


class Halves(Initialisation):
    """Rows and columns of W0."""

    name = "halves"
    needs = "weight"
    options = HalvesOptions

    @classmethod
    def factors(cls, matrix: Tensor, r: int, scaling: float, **settings: Any) -> Any:
        size = settings["halves_size"] / matrix.abs().max().double()
        return matrix[:r].double() * size, matrix[:, :r].double() * size
'''

SMOOTH = '''
"""Label smoothing: (1 − ε)·cross entropy + ε·the mean over the vocabulary."""
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dlora.registry import option


@dataclass(frozen=True)
class SmoothOptions:
    epsilon: float = option(0.1, "weight of the uniform distribution", ge=0, lt=1)


class Smooth:
    name = "smooth"

    def __init__(self, section: Any) -> None:
        self.section = section

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1).float()
        how = {"reduction": "sum", "label_smoothing": self.section.epsilon, "ignore_index": -100}
        return F.cross_entropy(logits, batch.targets.flatten(), **how)
'''

HALF = '''
"""16 bits a weight: the upper half of a float32."""
from typing import ClassVar

import torch
from torch import Tensor


class Half:
    name: ClassVar[str] = "half"
    block: ClassVar[int] = 1

    def code_bytes(self, n: int) -> int:
        return 2 * n

    def scale_bytes(self, n: int) -> int:
        return 1

    def codes(self, rows: Tensor) -> Tensor:
        return rows.bfloat16().contiguous().view(torch.uint8)

    def scales(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), 1, dtype=torch.uint8, device=rows.device)

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.contiguous().view(torch.bfloat16).to(dtype)
'''

SIGNED = '''
"""Steps of one size, in the direction of the gradient's sign."""
from dataclasses import dataclass
from typing import Any

import torch

from dlora.registry import option


@dataclass(frozen=True)
class SignedOptions:
    signed_decay: float = option(0.0, "of every weight, in each step", ge=0, lt=1)


class _Signed(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.mul_(1 - group["decay"]).sub_(p.grad.sign(), alpha=group["lr"])


class Signed:
    name = "signed"
    moments = 0
    divides = "elements"

    @staticmethod
    def build(groups: Any, pairs: Any, section: Any, *_: Any) -> torch.optim.Optimizer:
        return _Signed(groups, {"decay": section.signed_decay})
'''

_REPLICATED = Path(dlora.__file__).parent / "sharding/engines/replicated.py"
WHOLE = (  # all of W0 on every rank, whatever `sharding.base` is
    _REPLICATED.read_text("utf-8")
    .replace("class Replicated:", "class Whole:")
    .replace('name = "replicated"', 'name = "whole"')
    .replace("offered = False", "offered = True")
)

QUESTIONS = '''
"""{"q": "...", "a": "..."}"""
from dlora.data.formats.record import filled


class Questions:
    name = "questions"

    @staticmethod
    def read(record):
        asked, said = filled(record, "q"), filled(record, "a")
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
'''

BLANKS = '''
"""Objects with blank lines between them, each a "field: text" per line (.rec)."""
from dlora.data.kinds.compressed import opened
from dlora.data.kinds.kind import Record, file_digest


class Blanks:
    name = "records of recutils"
    suffixes = (".rec",)

    @staticmethod
    def read(place, faults):
        with opened(place.path, str(place)) as file:
            parts = file.read().decode("utf-8").split("\\n\\n")
        for number, part in enumerate(parts, start=1):
            fields = dict(line.split(": ", 1) for line in part.strip().splitlines())
            yield Record(fields, f"{place}: record {number}", place.part)

    @staticmethod
    def digest(place):
        return file_digest(place.path)
'''

LAST = '''
"""Only the last target of a sequence is learnt."""
from dataclasses import replace

import numpy as np

from dlora.data.encode import NO_TARGET
from dlora.tasks.causal import Causal


class Last(Causal):
    name = "last"

    def collate(self, examples, pad_id):
        return super().collate([replace(e, labels=_last(e.labels)) for e in examples], pad_id)


def _last(labels):
    wanted = np.full_like(labels, NO_TARGET)
    [*_, place] = np.flatnonzero(labels != NO_TARGET)
    wanted[place] = labels[place]
    return wanted
'''
FILES = {
    "lora/variants/gated.py": GATED,
    "lora/init/halves.py": HALVES,
    "objectives/smooth.py": SMOOTH,
    "data/formats/questions.py": QUESTIONS,
    "data/kinds/blanks.py": BLANKS,
    "tasks/last.py": LAST,
    "quant/half.py": HALF,
    "optim/signed.py": SIGNED,
    "sharding/engines/whole.py": WHOLE,
}
