"""`python -m models.packing`: docs/packing.md, which architectures compute packed rows exactly.

Each class, tiny and random, with windows and chunks shorter than the sequences: loss and gradient
of every parameter on one packed row against those of the class's own, a sequence at a time.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from dlora.base.eval_mode import keep_in_eval
from dlora.data.collate import collate, packed
from dlora.data.encode import Example
from dlora.objectives import chunked_loss
from dlora.objectives.packable import TYPES, why_not

from .architectures import Architecture, architectures, first_line
from .cells import YES, Cell
from .tiny_configs import tiny

PAGE = Path(__file__).parents[2] / "docs/packing.md"
LENGTHS = (23, 9, 41, 14)
_SHORT = 8  # tokens of a window, or of a chunk
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
# What tiny configurations leave out, and bases have.
_REAL: dict[str, dict[str, Any]] = {
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_block_size": _SHORT,
        "index_topk_blocks": 1,
    },
}
CLOSE_LOSS, CLOSE_GRADIENT = 1e-6, 2e-5  # relative, in float32: another order of sums


def packs(architecture: Architecture) -> tuple[Cell, str, str]:
    """(whether it computes packed rows exactly, its model types, why dlora does not pack it)."""
    try:
        config = _as_bases_are(tiny(transformers.CONFIG_MAPPING[architecture.model_type]))
        torch.manual_seed(0)
        model = architecture.auto_class.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in dict.fromkeys(model.parameters()):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        keep_in_eval(model)
        model.train()
        text = model.config.get_text_config().model_type
        kind = model.config.model_type + (f" of {text}" if text != model.config.model_type else "")
        said = why_not(model)
        chunked_loss.install(model)
        alone = _sums(model, [collate([example], 0) for example in examples()])
    except Exception as error:  # whatever a class raises
        return Cell("class", first_line(error)), architecture.model_type, "it does not run"
    try:
        return _same(_sums(model, [packed(examples(), 0)]), alone), kind, said
    except Exception as error:
        return Cell("✗", first_line(error)), kind, said


def examples() -> list[Example]:
    """Sequences of `LENGTHS`, every token of which is a target."""
    drawn = np.random.default_rng(0)
    ids = [drawn.integers(60, 200, n).astype(np.int32) for n in LENGTHS]
    return [Example(i, one, one) for i, one in enumerate(ids)]


def _as_bases_are(config: Any) -> Any:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in _WINDOWS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, _SHORT)
        for name, value in _REAL.get(part.model_type, {}).items():
            setattr(part, name, value)
    return config


def _sums(model: Any, batches: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
    """Σ loss over batches, and its gradient."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        where = {"positions": batch.positions, "lengths": batch.lengths}
        loss = model(**batch.inputs, targets=batch.targets, **where)
        loss.backward()
        total += float(loss)
    named = model.named_parameters()
    return total, {n: p.grad.double().clone() for n, p in named if p.grad is not None}


def _same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> Cell:
    if not math.isclose(found[0], wanted[0], rel_tol=CLOSE_LOSS):
        return Cell("✗", f"loss {found[0]:.5f} instead of {wanted[0]:.5f}")
    if found[1].keys() != wanted[1].keys():
        return Cell("✗", "other parameters have a gradient")
    off = sum(float((g - wanted[1][n]).square().sum()) for n, g in found[1].items())
    size = sum(float(g.square().sum()) for g in wanted[1].values())
    error = math.sqrt(off / size)
    return YES if error < CLOSE_GRADIENT else Cell("✗", f"gradients differ by {error:.1g}")


# -- the page --------------------------------------------------------------------------------------

_HEAD = """# Packing

The sequences of a micro-batch share one row, without padding between them, and never see each other
(`data.packing`, see [configuration](configuration.md)). Which classes of transformers compute such
a row exactly, by `tests/models/packing.py`: tiny and random, with attention windows and chunks
shorter than the sequences, loss and the gradient of every parameter against those of the class's
own, a sequence at a time. `make packing-table` makes this page, `make test` checks a sample of its
rows, `make test-full` all of them. `data.packing: auto` packs where there is a ✓.

Made on {date} with {versions}: {good} of {possible} classes that run pack.

| class | type | packs | why not |
|---|---|:-:|---|
"""


def page(rows: Mapping[Architecture, tuple[Cell, str, str]]) -> str:
    """The whole page."""
    names = ("torch", "transformers")
    ran = [cell for cell, _, _ in rows.values() if cell.mark != "class"]
    text = _HEAD.format(
        date=datetime.date.today().isoformat(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        good=sum(not _reason(cell, said) for cell, _, said in rows.values()),
        possible=len(ran),
    )
    for architecture, (cell, kind, said) in rows.items():
        reason = _reason(cell, said)
        text += f"| {architecture.name} | {kind} | {'no' if reason else '✓'} | {reason} |\n"
    return text


def _reason(cell: Cell, said: str) -> str:
    """Why dlora does not pack a class, of which `said` is what a run says."""
    if cell == YES:
        return said
    reason = cell.reason.removesuffix("; set data.packing: false").split("data.packing: ")[-1]
    start = {"class": "it does not run: ", "✗": "not exact: "}[cell.mark]
    return (start + reason).replace("|", "\\|")


def measured(some: Sequence[Architecture]) -> Iterator[tuple[Architecture, Any]]:
    """Rows one by one."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for architecture in some:
        yield architecture, packs(architecture)


def types_of(rows: Iterable[tuple[Cell, str, str]]) -> tuple[set[str], set[str]]:
    """Model types that compute packed rows exactly, of the whole and of its text part; do not."""
    good, wrong = set[str](), set[str]()
    for cell, kinds, _ in rows:
        if cell == YES:
            good.update(kinds.split(" of "))
        elif cell.mark == "✗":
            wrong.add(kinds.split(" of ")[0])
    return good, wrong


def main() -> None:
    """Write the page, and print what `packable.TYPES` should be."""
    torch.set_num_threads(1)
    rows = {}
    for architecture, row in measured(architectures()):
        print(architecture.model_type, row, file=sys.stderr, flush=True)
        rows[architecture] = row
    PAGE.write_text(page(rows), encoding="utf-8")
    good, wrong = types_of(rows.values())
    print("missing:", *sorted(good - TYPES), "\nwrong:", *sorted((TYPES - good) | (TYPES & wrong)))


if __name__ == "__main__":
    main()
