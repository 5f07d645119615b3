"""dlora beside PEFT over the cases of PEFT's own tests: numbers, files, merges and copies."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import quiet_peft, relative_error
from peft_cases import CASES, Case
from peft_models import batch, model_of, output_of
from peft_twins import (
    EXACT,
    base_weights,
    check_pass,
    check_same,
    check_statistics,
    in_peft,
    pairs,
    twins,
)
from safetensors.torch import load_file

from dlora import attach, disabled, load_adapter, merge, save_adapter, unmerge
from dlora.adapters.peft_names import peft_names, wrapped
from dlora.adapters.write import CONFIG, WEIGHTS
from dlora.lora.attach import attachment_of, named_adapters, trainable_parameters

pytestmark = quiet_peft
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of one sum in the dtype
HALF = [pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16]
SMALL = {name: c for name, c in CASES.items() if not name.startswith("decoder")}
PEFTS_MERGES = [name for name, c in CASES.items() if c.merged_by_peft]


def quiet(model: Any, found: Case) -> Any:
    """In eval mode where the masks of dropout would differ, else in training mode."""
    return model.eval() if found.settings.get("lora_dropout") else model.train()


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_a_step_are_pefts(name: str, tmp_path: Path) -> None:
    found = CASES[name]
    ours, theirs = (quiet(model, found) for model in twins(found.model, found.settings, tmp_path))
    frozen = base_weights(ours)
    check_pass(ours, theirs)
    for column in zip(*pairs(ours, theirs).values(), strict=True):
        torch.optim.SGD(column, lr=0.1).step()
    for key, (own, other) in pairs(ours, theirs).items():
        check_same(own, other, EXACT, key)
        own.grad = other.grad = None
    check_pass(ours, theirs)
    check_statistics(ours, theirs)
    assert all(torch.equal(t, ours.get_parameter(n)) for n, t in frozen.items())


@pytest.mark.parametrize("name", CASES)
def test_it_starts_at_the_base_and_training_moves_it(name: str) -> None:
    """With PEFT's parameters in number, name and shape."""
    found = CASES[name]
    base = model_of(found.model).double()
    ours = attach(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(found.settings)))
    theirs = in_peft(found.model, found.settings)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert all(p.numel() == q.numel() for p, q in pairs(ours, theirs).values())
    x, before = batch(base), base_weights(ours)
    with torch.no_grad():
        start = output_of(ours, x)
        assert relative_error(start, output_of(base, x)) < 1e-14
    trained = trainable_parameters(ours)
    for _ in range(2):  # A has no gradient before B has moved
        output_of(ours, x).square().sum().backward()
        torch.optim.SGD(trained.values(), lr=0.05).step()
    assert relative_error(output_of(ours, x), start) > 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_weights(ours).items())
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in trained)


def sizes(model: Any) -> dict[str, tuple[int, float, float]]:
    """{path: (r, scale, dropout)} of PEFT's layers."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_dropout") and module.scaling:
            dropout = getattr(module.lora_dropout["default"], "p", 0.0)
            found[path] = (module.r["default"], module.scaling["default"], dropout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    """The same keys and values; settings by which PEFT puts the same layers in the same places."""
    found = CASES[name]
    ours, theirs = twins(found.model, found.settings, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    own, other = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs"))
    copies = {key for key in other if key.endswith(".base_layer.weight")}
    assert own.keys() == other.keys() - copies
    assert all(torch.equal(tensor, other[key]) for key, tensor in own.items())
    again = peft.PeftModel.from_pretrained(model_of(found.model), tmp_path / "ours").double()
    assert sizes(again) == sizes(theirs)
    parameters = attachment_of(ours).parameters
    here = {wrapped(parameters, p): (a.r, a.scaling) for p, _, a in named_adapters(ours)}
    assert here == {path: (r, scale) for path, (r, scale, _) in sizes(theirs).items()}
    x = batch(ours)
    assert relative_error(output_of(again.eval(), x), output_of(ours.eval(), x)) < EXACT
    written = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert written["peft_type"] == "LORA" and written["inference_mode"] is True
    assert written["use_dora"] is bool(found.settings.get("use_dora"))
    back = load_adapter(model_of(found.model).double(), tmp_path / "ours")
    assert set(peft_names(back)) == set(peft_names(ours))
    for key, parameter in trainable_parameters(back).items():
        assert torch.equal(parameter, trainable_parameters(ours)[key]), key


@pytest.mark.parametrize("safe", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("name", PEFTS_MERGES)
def test_merged_and_unmerged_weights_are_pefts(name: str, safe: bool, tmp_path: Path) -> None:
    found = CASES[name]
    ours, theirs = (m.eval() for m in twins(found.model, found.settings, tmp_path))
    before, x = base_weights(ours), batch(ours)
    outputs = output_of(ours, x).detach()
    ours.merge_adapter(safe_merge=safe)
    ours.merge_adapter()
    theirs.merge_adapter(safe_merge=safe)
    merged = copy.deepcopy(theirs).unload()
    for key, weight in base_weights(ours).items():
        check_same(weight, merged.state_dict()[key], EXACT, key)
    assert relative_error(output_of(ours, x), output_of(theirs, x)) < EXACT
    assert relative_error(output_of(ours, x), outputs) < EXACT
    ours.unmerge_adapter()
    ours.unmerge_adapter()
    assert all(torch.equal(weight, before[key]) for key, weight in base_weights(ours).items())
    theirs.unmerge_adapter()
    assert relative_error(output_of(ours, x), output_of(theirs, x)) < EXACT


@pytest.mark.parametrize("name", [name for name in CASES if name not in PEFTS_MERGES])
def test_where_pefts_merge_fails_or_moves_the_output_this_does_not(
    name: str, tmp_path: Path
) -> None:
    found = CASES[name]
    ours, theirs = (m.eval() for m in twins(found.model, found.settings, tmp_path))
    x = batch(ours)
    with torch.no_grad():
        outputs = output_of(theirs, x)
        try:
            theirs.merge_adapter()
        except RuntimeError:
            assert found.model == "pixels 3d"
        else:
            assert relative_error(output_of(theirs, x), outputs) > 1e-3
        merge(ours)
        assert relative_error(output_of(ours, x), outputs) < EXACT
        unmerge(ours)
        assert relative_error(output_of(ours, x), outputs) < EXACT


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_in_half_precision_it_is_pefts_but_for_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """PEFT computes x A B in float32 and rounds the sum; here all is in the base's dtype."""
    found = SMALL[name]
    ours, theirs = (m.eval() for m in twins(found.model, found.settings, tmp_path, dtype))
    y = check_pass(ours, theirs, 20 * ROUNDING[dtype])
    x = batch(ours, dtype)
    with torch.no_grad():
        assert y.dtype == output_of(theirs, x).dtype == dtype
        assert relative_error(y, output_of(theirs, x)) < 4 * ROUNDING[dtype]
    trained = {parameter.dtype for parameter in trainable_parameters(ours).values()}
    assert trained == {torch.float32}


@pytest.mark.parametrize("name", CASES)
def test_switches_and_copies(name: str, tmp_path: Path) -> None:
    """Off is the base, bit for bit; copies and pickles compute the same and share nothing."""
    found = CASES[name]
    ours, theirs = (m.eval() for m in twins(found.model, found.settings, tmp_path))
    x, base = batch(ours), model_of(found.model).double().eval()
    with torch.no_grad():
        on, off = output_of(ours, x), output_of(base, x)
        assert relative_error(on, off) > 1e-6
        with disabled(ours), theirs.disable_adapter():
            assert torch.equal(output_of(ours, x), off)
            assert torch.equal(output_of(theirs, x), off)
        ours.disable_adapters()
        with ours.disable_adapter():
            pass
        assert torch.equal(output_of(ours, x), off)  # as before the context
        ours.enable_adapters()
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(output_of(twin, x), on)
            assert repr(twin) == repr(ours)
            for parameter in trainable_parameters(twin).values():
                parameter.zero_()
        assert torch.equal(output_of(ours, x), on)
    ours.load_state_dict(base.state_dict(), strict=False)
    assert set(base.state_dict()) <= set(ours.state_dict())
