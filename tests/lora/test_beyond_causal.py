"""Models that are no causal language models: trained and saved as PEFT does, and merged."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import check_steps
from beyond_causal import KINDS, Kind, loss_of, output_of, table
from causal_models import quiet_peft, randomize_trainable, relative_error
from torch import Tensor, nn

from dlora import LoraConfig, attach, load_adapter, merge, save_adapter, unmerge
from dlora.adapters.save_load import CONFIG

pytestmark = [*quiet_peft, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SIZES: dict[str, Any] = {"r": 3, "lora_alpha": 5}
SAMPLE = ("bert sequences", "bert answers", "t5", "llava", "vit", "unet", "flux")
# All kinds of models, of which the command's tests run a few: each takes seconds.
EVERY = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in KINDS]


def double(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def in_peft(kind: Kind) -> nn.Module:
    config = peft.LoraConfig(**SIZES, target_modules=kind.targets, task_type=kind.task)
    model = peft.get_peft_model(kind.model(), config).eval()
    randomize_trainable(model)
    return model


def adapted(kind: Kind, **settings: Any) -> nn.Module:
    config = LoraConfig(**SIZES, target_modules=kind.targets, **settings)
    model = attach(kind.model(), config)
    randomize_trainable(model)
    return model


@pytest.mark.parametrize("name", EVERY)
def test_it_trains_as_in_peft(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    theirs = in_peft(kind)
    theirs.save_pretrained(tmp_path)
    theirs, ours = theirs.double(), load_adapter(kind.model().double(), tmp_path)

    def run(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        batch = double(kind.batch(step))
        return output_of(model, batch), loss_of(model, batch)

    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in key or ".modules_to_save." in key)
    check_steps(ours, theirs, 2, run, lr=1e-2)


@pytest.mark.parametrize("name", EVERY)
def test_peft_loads_its_files_and_finds_its_base(name: str, tmp_path: Path) -> None:
    kind, base, saved = KINDS[name], tmp_path / "base", tmp_path / "adapter"
    ours, batch = adapted(kind), kind.batch()
    expected = output_of(ours, batch)
    assert relative_error(output_of(kind.model(), batch), expected) > 1e-3
    save_adapter(ours, saved, base_model_name_or_path=str(base))
    assert json.loads((saved / CONFIG).read_text())["task_type"] == kind.task
    loaded = peft.PeftModel.from_pretrained(kind.model(), saved)
    assert relative_error(output_of(loaded, batch), expected) < 1e-5
    kind.model().save_pretrained(base)
    found = auto_class(kind.task).from_pretrained(str(saved)).eval()
    assert relative_error(output_of(found, batch), expected) < 1e-5


def auto_class(task: str | None) -> Any:
    """PEFT's auto class of a task."""
    words = {
        "SEQ_CLS": "ForSequenceClassification",
        "TOKEN_CLS": "ForTokenClassification",
        "QUESTION_ANS": "ForQuestionAnswering",
        "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
        "FEATURE_EXTRACTION": "ForFeatureExtraction",
        "CAUSAL_LM": "ForCausalLM",
    }
    return getattr(peft, f"AutoPeftModel{words.get(task or '', '')}")


@pytest.mark.parametrize("name", EVERY)
def test_merged_it_computes_the_same_and_unmerged_it_is_what_it_was(name: str) -> None:
    kind = KINDS[name]
    model, batch = adapted(kind), kind.batch()
    with torch.no_grad():
        expected = output_of(model, batch)
        before = {key: p.clone() for key, p in model.named_parameters()}
        merge(model)
        assert relative_error(output_of(model, batch), expected) < 1e-5
        unmerge(model)
        assert torch.equal(output_of(model, batch), expected)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


HEADS = {"bert sequences": "classifier", "llama sequences": "score", "bert answers": "qa_outputs"}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_task_is_trained_as_in_peft(name: str) -> None:
    model, theirs = adapted(KINDS[name]), in_peft(KINDS[name])
    wrappers = peft.utils.ModulesToSaveWrapper
    heads = [path for path, module in theirs.named_modules() if isinstance(module, wrappers)]
    assert [f"base_model.model.{path}" for path in model.dlora.saved] == heads
    assert model.dlora.saved == [HEADS[name]]


def test_without_a_task_no_head_is_trained_and_peft_needs_none(tmp_path: Path) -> None:
    kind = KINDS["bert sequences"]
    model, batch = adapted(kind, task_type=None), kind.batch()
    assert model.dlora.saved == []
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] is None
    loaded = peft.PeftModel.from_pretrained(kind.model(), tmp_path)
    assert relative_error(output_of(loaded, batch), output_of(model, batch)) < 1e-5
    again = load_adapter(kind.model(), tmp_path)
    assert again.dlora.saved == []
    assert relative_error(output_of(again, batch), output_of(model, batch)) < 1e-5


def test_the_page_has_the_table_of_what_is_tested() -> None:
    page = Path(__file__).parents[2] / "docs/other_models.md"
    assert table() in page.read_text("utf-8"), table()
