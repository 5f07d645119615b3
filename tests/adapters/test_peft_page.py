"""The page beside PEFT: its tables are those of the tests, and what it calls refused is."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from causal_models import quiet_peft
from peft_differences import SEVERAL, rows
from peft_models import model_of
from peft_refusals import REFUSED, Refused
from refusals import refusal

from dlora import LoraConfig, attach

pytestmark = quiet_peft
PAGE = Path(__file__).parents[2] / "docs" / "beside_peft.md"
UP: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["up"]}


@pytest.mark.parametrize("found", REFUSED, ids=lambda found: found.shown)
def test_refused_by_name_before_anything_is_attached(found: Refused) -> None:
    settings = copy.copy(found.settings)
    config = settings.pop("cls", peft.LoraConfig)(**settings)
    model = model_of(found.model)
    said = refusal(attach, model, config)
    assert re.match(rf"peft\.\w+: {found.key}: ", said), said
    assert not hasattr(model, "dlora") and all(p.requires_grad for p in model.parameters())
    assert not any("adapter" in name for name, _ in model.named_modules())


def test_what_an_attention_can_have_is_said() -> None:
    said = refusal(attach, model_of("attention"), LoraConfig(target_modules=["mha"]))
    assert said.endswith("use target_parameters: [mha.in_proj_weight])")


@pytest.mark.parametrize("call", [call for _, call in SEVERAL.values()])
def test_what_is_spelled_otherwise_for_several_adapters_is_refused(call: str) -> None:
    model = attach(model_of("mlp"), peft.LoraConfig(**UP))
    attach(model, peft.LoraConfig(**UP), "other")
    calls: dict[str, Callable[[], Any]] = {
        "add_adapter": lambda: model.add_adapter("third", peft.LoraConfig(**UP)),
        "merge_adapter": lambda: model.merge_adapter(["default", "other"]),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
    }
    assert refusal(calls[call]).startswith(f"{call}: ")


def test_the_page_has_these_tables() -> None:
    found = re.findall(r"^\| .* \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    heads = [row for row in found if row.startswith(("| case |", "| settings |", "| in PEFT |"))]
    assert len(heads) == 3
    assert [row for row in found if row not in heads] == rows()
