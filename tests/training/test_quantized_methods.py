"""Methods beside a packed base: over ranks what they are on one process, exported to PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ranks import Pools
from run_training import command_line, figures, train
from test_quantized_sharded import whole
from tiny import save_chats

from dlora.base.quantize import quantize
from dlora.quant.formats import FORMATS, unpack

STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {
        "adapter__method": "adalora",
        "adapter__r": None,
        "adapter__init_r": 6,
        "adapter__target_r": 2,
        "adapter__tfinal": 1,
    },
    "rslora, lora+": {"adapter__use_rslora": True, "optimizer__loraplus_lr_ratio": 4},
}


def held_out(path: str, adapter: str, name: str) -> torch.Tensor:
    """Logits of stock PEFT on a base that holds what the packed weights, if any, stand for."""
    model, packed = whole(path, "float32"), whole(path, "float32")
    for layer in () if name == "none" else quantize(packed, name).packed:
        weight, fmt = model.get_submodule(layer).weight.data, FORMATS[name]
        codes, scales = fmt.codes(weight), fmt.scales(weight)
        weight.copy_(unpack(codes, scales, weight.shape[1], name, torch.float32))
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter)(torch.arange(12)[None]).logits


def logits_after(argv: list[str]) -> torch.Tensor:
    """Logits of the run's own model at its end."""
    run: list[Any] = []
    train(argv, run.append)
    model = run[0].model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None], use_cache=False).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("engine", "name", "world"), [("fsdp2", "nf4", 3), ("zero3", "int8", 2)])
def test_a_method_beside_a_packed_base(
    pools: Pools, saved_models: Any, tmp_path: Path, method: str, engine: str, name: str, world: int
) -> None:
    model = saved_models("blocks")
    chats = save_chats(tmp_path / "chats.jsonl", 24)

    def words(directory: str, **settings: Any) -> list[str]:
        return command_line(
            model__path=model,
            model__quantization=name,
            data__train=str(chats),
            output__dir=str(tmp_path / directory),
            train__max_steps=STEPS,
            **METHODS[method] | settings,
        )

    pools(1).run(train, words("one"))
    where = {"sharding__engine": engine, "sharding__base": "world"}
    results = pools(world).run(logits_after, words("run", **where))
    for got, expected in zip(figures(tmp_path / "run"), figures(tmp_path / "one"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got.get("kept_ranks") == expected.get("kept_ranks")
    wanted = held_out(model, str(tmp_path / "run" / "adapter"), name)
    for logits in results:
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
