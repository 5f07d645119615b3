"""Runs of a method beside a packed base, against one process and stock PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from run_training import Runs, train
from tiny import whole

from dlora.base.quantize import quantize
from dlora.quant.formats import FORMATS, unpack


def held_out(path: str, adapter: Path, name: str) -> torch.Tensor:
    """Logits of stock PEFT on a base that holds what the packed weights, if any, stand for."""
    model, packed = whole(path), whole(path)
    for layer in () if name == "none" else quantize(packed, name).packed:
        weight, fmt = model.get_submodule(layer).weight.data, FORMATS[name]
        codes, scales = fmt.codes(weight), fmt.scales(weight)
        weight.copy_(unpack(codes, scales, weight.shape[1], name, torch.float32))
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter))(torch.arange(12)[None]).logits


def logits_after(argv: list[str]) -> torch.Tensor:
    """Logits of the run's own model at its end."""
    run: list[Any] = []
    train(argv, run.append)
    model = run[0].model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None], use_cache=False).logits


def check_method(run: Runs, path: str, engine: str, name: str, world: int, **settings: Any) -> None:
    """A run of the model at `path`, named "run", is that of one process and what PEFT computes."""
    settings |= {"model__path": path, "model__quantization": name}
    where = {"sharding__engine": engine, "sharding__base": "world"}
    _, one = run("one", 1, **settings)
    results, lines = run("run", world, work=logits_after, **settings, **where)
    for got, expected in zip(lines, one, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got.get("kept_ranks") == expected.get("kept_ranks")
    wanted = held_out(path, run.root / "run" / "adapter", name)
    for logits in results:
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
