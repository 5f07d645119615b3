"""PiSSA and MiLoRA on a packed base: the residual is packed, on every rank as on one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from run_training import Runs, prepared_run, same_bits, train
from sampling import full
from tiny import whole
from torch import Tensor

from dlora.base.quantize import quantize
from dlora.lora.attach import disabled, named_adapters
from dlora.lora.merge import merge, unmerge
from dlora.quant.formats import FORMATS, unpack

STEPS = 4
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, quantization, init, **settings)"""

    def of(directory: Path, name: str, init: str, **settings: Any) -> list[str]:
        common = {"model__quantization": name, "adapter__init_lora_weights": init}
        common |= {"train__max_steps": STEPS, "output__save_every": 2}
        return words(directory, "blocks", **common | settings)

    return of


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trained(argv: list[str]) -> dict[str, Any]:
    """Logits before and after a run and with adapters off, packed bytes, and the offsets."""
    run = prepared_run(argv)
    model = run.model.eval()
    packed = {
        name: tensor.clone()
        for path, host, _ in named_adapters(model)
        for name, tensor in packed_of(run, path, host).items()
    }
    offsets = {name: tensor.clone() for name, tensor in run.replica.frozen.items()}
    before = logits_of(model)
    run.replica.release()
    model.train()
    assert run.train() == 0
    model.eval()
    after = logits_of(model)
    with disabled(model):
        off = logits_of(model)
    run.replica.release()
    return {"before": before, "after": after, "off": off, "packed": packed, "offsets": offsets}


def packed_of(run: Any, path: str, host: Any) -> dict[str, Tensor]:
    with run.replica.engine.gather_module(host) as weights:
        return {
            f"{path}.{name}": tensor
            for name, tensor in weights.items()
            if name.startswith("weight_")
        }


def expected_packed(path: str, name: str, offsets: dict[str, Tensor], scaling: float) -> Any:
    """The residual of every layer packed as a whole, and a model of W_res + s·B0·A0, by hand."""
    model = whole(path)
    codes: dict[str, Tensor] = {}
    for layer in quantize(whole(path), name).packed:
        weight, fmt = model.get_submodule(layer).weight.data, FORMATS[name]
        A0, B0 = (offsets[f"{layer}.adapter.offset_{factor}"] for factor in "AB")
        offset = scaling * (B0.double() @ A0.double())
        left = (weight.double() - offset).float()
        codes[f"{layer}.weight_codes"] = fmt.codes(left)
        codes[f"{layer}.weight_scales"] = fmt.scales(left)
        weight.copy_(
            unpack(fmt.codes(left), fmt.scales(left), weight.shape[1], name, torch.float32) + offset
        )
    return model, codes


@pytest.mark.parametrize(
    ("engine", "name", "init", "world"),
    [
        full("fsdp2", "nf4", "pissa", 2),  # 5 s: FSDP2 resumes from it below
        ("zero3", "nf4-dq", "pissa", 2),
        full("fsdp2", "int8", "milora", 3),
        full("zero3", "nf4", "milora", 3),
    ],
)
def test_the_residual_is_packed(
    run: Runs, saved_models: Any, tmp_path: Path, engine: str, name: str, init: str, world: int
) -> None:
    where = {"sharding__engine": engine, "sharding__base": "world"}
    [one], one_lines = run("one", 1, name, init, work=trained)
    results, lines = run("run", world, name, init, work=trained, **where)
    base, codes = expected_packed(saved_models("blocks"), name, one["offsets"], scaling=2.0)
    held_out = logits_of(base)
    for result in (one, *results):
        assert same_bits(result["offsets"], one["offsets"])
        assert same_bits(result["packed"], codes)
        torch.testing.assert_close(result["before"], held_out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["off"], held_out, rtol=1e-4, atol=1e-4)
        assert (result["after"] - held_out).abs().max() > 1e-3
    for got, expected in zip(lines, one_lines, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    exported = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits_of(exported), results[0]["after"], rtol=1e-4, atol=1e-4)


def test_the_residual_is_nearer_to_w0_than_packed_w0(run: Runs, saved_models: Any) -> None:
    """What PiSSA is for on a packed base: its large directions are not rounded."""
    path = saved_models("blocks")
    [result], _ = run("run", 1, "nf4", "pissa", work=trained, adapter__r=16)
    base, _ = expected_packed(path, "nf4", result["offsets"], scaling=0.5)
    exact, fmt = whole(path), FORMATS["nf4"]
    for layer in quantize(whole(path), "nf4").packed:
        weight = exact.get_submodule(layer).weight.data
        plain = unpack(fmt.codes(weight), fmt.scales(weight), weight.shape[1], "nf4", torch.float32)
        ours = base.get_submodule(layer).weight.data
        assert (ours - weight).norm() < (plain - weight).norm()


def test_a_run_goes_on_from_the_same_residual(run: Runs, tmp_path: Path) -> None:
    [through, _], lines = run("run", 2, "nf4", "pissa")
    resumed = Path(shutil.copytree(tmp_path / "run", tmp_path / "resumed"))
    resume = str(resumed / "checkpoints" / "step-000002")
    [again, _], again_lines = run("resumed", 2, "nf4", "pissa", output__resume=resume)
    assert same_bits(again["tensors"], through["tensors"])
    assert again_lines == lines


def merged(argv: list[str]) -> list[Tensor]:
    """Logits of a trained model as it is, merged, and unmerged again."""
    runs: list[Any] = []
    train(argv, runs.append)
    model = runs[0].model.eval()
    found = [logits_of(model)]
    for change in (merge, unmerge):
        change(model)
        found.append(logits_of(model))
    with disabled(model):
        found.append(logits_of(model))
    return found


def test_merging_adds_to_the_residual(run: Runs) -> None:
    [found], _ = run("run", 1, "int8", "milora", work=merged)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], found[0])
    assert not torch.equal(found[3], found[0])
