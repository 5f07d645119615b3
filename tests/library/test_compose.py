"""`dlora compose` beside PEFT's `add_weighted_adapter`, loaded by PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mixes import apart, composed, loaded, save_random, updates
from safetensors.torch import load_file
from tiny import MODELS, whole
from torch import nn
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.lora.attach import named_adapters, trainable_parameters

WEIGHTS = (0.7, -0.3, 1.2)
EXACT = {"cat": "cat", "svd": "svd", "ties_svd": "ties_svd", "linear": "linear", "ties": "ties"}
DENSITY = ("ties", "ties_svd")


@pytest.fixture(scope="module")
def llama(saved_models) -> Any:
    return lambda: whole(saved_models("llama"))


@pytest.fixture(scope="module")
def three(llama, tmp_path_factory) -> list[Path]:
    """Adapters with one r and different scales; the embedding is adapted too."""
    root = tmp_path_factory.mktemp("three")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    scales: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"lora_alpha": 3}]
    return [
        save_random(llama(), root / str(i), i, target_modules=targets, task_type="CAUSAL_LM", **how)
        for i, how in enumerate(scales)
    ]


@pytest.mark.parametrize("method", EXACT)
def test_it_is_peft_s(method, llama, three, tmp_path):
    words = ["--density", "0.4"] if method in DENSITY else []
    made = composed(tmp_path / "made", method, three, WEIGHTS, *words)
    reference = loaded(llama(), *three)
    how = {"combination_type": EXACT[method], "density": 0.4}
    reference.add_weighted_adapter(["0", "1", "2"], list(WEIGHTS), "mix", **how)
    found = updates(loaded(llama(), made), "0")
    assert apart(found, updates(reference, "mix")) < 1e-5
    assert len(found) == 5


def test_ranks_and_targets_may_differ(llama, tmp_path):
    """As PEFT's `cat` and `svd`, of the union of the targets."""
    one = save_random(llama(), tmp_path / "one", 1, target_modules=["q_proj", "v_proj"], r=3)
    other = save_random(
        llama(),
        tmp_path / "other",
        2,
        target_modules=["v_proj", "up_proj"],
        rank_pattern={"0.mlp.up_proj": 2},
    )
    for method, words in (("cat", ()), ("svd", ("--rank", "5"))):
        made = composed(tmp_path / method, method, [one, other], [0.5, -2.0], *words)
        reference = loaded(llama(), one, other)
        parts = [updates(reference, name) for name in "01"]
        wanted = {}
        for path in {**parts[0], **parts[1]}:
            zero = torch.zeros(())
            D = 0.5 * parts[0].get(path, zero) - 2.0 * parts[1].get(path, zero)
            U, S, Vt = torch.linalg.svd(D.double())
            k = 5 if method == "svd" else len(S)
            wanted[path] = ((U[:, :k] * S[:k]) @ Vt[:k]).float()
        assert apart(updates(loaded(llama(), made), "0"), wanted) < 1e-5
        assert apart(by_dlora(llama(), made), wanted) < 1e-5
        settings = json.loads((made / "adapter_config.json").read_text())
        assert settings["target_modules"] == ["q_proj", "up_proj", "v_proj"]
        ranks = {
            key: t.shape[0]
            for key, t in load_file(made / "adapter_model.safetensors").items()
            if "lora_A" in key
        }
        shape = {"q_proj": 3, "v_proj": 7 if method == "cat" else 5, "up_proj": 4}
        for key, r in ranks.items():
            name = key.split(".")[-3]
            assert r == (2 if ".0.mlp.up_proj" in key else shape[name]), key


def test_dlora_loads_it_as_peft_does(llama, three, tmp_path):
    made = composed(tmp_path / "made", "svd", three, WEIGHTS, "--rank", "6")
    assert apart(by_dlora(llama(), made), updates(loaded(llama(), made), "0")) < 1e-6


def by_dlora(model: nn.Module, adapter: Path) -> dict[str, torch.Tensor]:
    """{path: ΔW}, as dlora loads an adapter."""
    return {
        f"base_model.model.{path}": layer.as_stored(layer, adapted.delta())
        for path, layer, adapted in named_adapters(load_adapter(model, adapter))
    }


def test_lost_energy_is_printed_by_layer(llama, three, tmp_path, capsys):
    made = composed(tmp_path / "made", "svd", three, WEIGHTS, "--rank", "5")
    reference = loaded(llama(), *three)
    parts = [updates(reference, name) for name in "012"]
    lines = capsys.readouterr().out.splitlines()
    recorded = json.loads((made / "composition.json").read_text())
    tail = total = 0.0
    for path in parts[0]:
        D = sum(w * part[path].double() for w, part in zip(WEIGHTS, parts, strict=True))
        energies = torch.linalg.svdvals(D).square()
        tail, total = tail + float(energies[5:].sum()), total + float(energies.sum())
        share, name = (
            float(energies[5:].sum() / energies.sum()),
            path.removeprefix("base_model.model."),
        )
        assert recorded["lost"][name] == pytest.approx(share, abs=1e-6)
        assert f"  {name:<60} {recorded['lost'][name]:.3%}" in lines
    assert any(line.split() == ["all", f"{tail / total:.3%}"] for line in lines)


def test_dare_has_its_distribution(llama, three, tmp_path):
    """With every rank kept, an element is one of PEFT's: ΔW / density or 0."""
    [adapter, *_] = three
    made = composed(
        tmp_path / "made", "dare_svd", [adapter], [1.0], "--density", "0.25", "--rank", "259"
    )
    found, full = (updates(loaded(llama(), each), "0") for each in (made, adapter))
    ratios = torch.cat([(found[p].double() / full[p].double()).flatten() for p in full])
    kept = ratios > 2
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((ratios - 4 * kept).abs().median()) < 1e-5
    again = composed(
        tmp_path / "again", "dare_svd", [adapter], [1.0], "--density", "0.25", "--rank", "259"
    )
    other = composed(
        tmp_path / "other",
        "dare_svd",
        [adapter],
        [1.0],
        "--density",
        "0.25",
        "--rank",
        "259",
        "--seed",
        "1",
    )
    files = [(d / "adapter_model.safetensors").read_bytes() for d in (made, again, other)]
    assert files[0] == files[1] != files[2]


def test_dare_on_factors_keeps_elements_or_zeros(three, tmp_path, capsys):
    [adapter, *_] = three
    made = composed(tmp_path / "made", "dare", [adapter], [1.0], "--density", "0.25")
    assert "another factorisation" in capsys.readouterr().out
    found, full = (load_file(d / "adapter_model.safetensors") for d in (made, adapter))
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 4
    for key in [key for key in found if ".lora_" in key]:
        tensor, wanted = found[key], full[key] * scale**0.5 / 0.25
        assert ((tensor == 0) | torch.isclose(tensor, wanted, rtol=1e-5)).all()
        if tensor.numel() > 200:
            assert 0.1 < float((tensor != 0).double().mean()) < 0.4


def test_gpt2_s_weights_are_stored_transposed(saved_models, tmp_path):
    fresh = lambda: whole(saved_models("gpt2"))  # noqa: E731
    adapters = [
        save_random(fresh(), tmp_path / str(i), i, target_modules=["c_attn"], fan_in_fan_out=True)
        for i in range(2)
    ]
    for method in ("svd", "ties_svd"):
        words = ["--density", "0.4"] if method in DENSITY else []
        made = composed(tmp_path / method, method, adapters, [1.0, 0.5], "--rank", "3", *words)
        reference = loaded(fresh(), *adapters)
        how = {"combination_type": method, "density": 0.4, "svd_rank": 3}
        reference.add_weighted_adapter(["0", "1"], [1.0, 0.5], "mix", **how)
        assert apart(updates(loaded(fresh(), made), "0"), updates(reference, "mix")) < 1e-5


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(5, 7, 3)
        self.point = nn.Conv2d(7, 6, 1)
        self.line = nn.Conv1d(6, 4, 3)


def test_convolutions(tmp_path):
    targets = ["wide", "point", "line"]
    adapters = [
        save_random(Convolutions(), tmp_path / str(i), i, target_modules=targets) for i in range(2)
    ]
    parts = [updates(loaded(Convolutions(), adapter), "0") for adapter in adapters]
    for method, words in (("cat", ()), ("svd", ("--rank", "3")), ("linear", ())):
        made = composed(tmp_path / method, method, adapters, [1.5, -0.5], *words)
        found = updates(loaded(Convolutions(), made), "0")
        for path, update in found.items():
            D = 1.5 * parts[0][path] - 0.5 * parts[1][path]
            if method == "linear":
                reference = loaded(Convolutions(), *adapters)
                reference.add_weighted_adapter(
                    ["0", "1"], [1.5, -0.5], "mix", combination_type="linear"
                )
                D = updates(reference, "mix")[path]
            flat = D.flatten(1).double()
            k = 3 if method == "svd" else min(flat.shape)
            U, S, Vt = torch.linalg.svd(flat, full_matrices=False)
            wanted = ((U[:, :k] * S[:k]) @ Vt[:k]).float().view(D.shape)
            assert float((update - wanted).norm() / wanted.norm()) < 1e-5, (method, path)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "dare_svd", "linear", "ties", "dare"])
def test_stacks_of_experts(method, tmp_path):
    """Each expert's matrix alone; PEFT has no weighted sum of them, but loads the result."""

    def fresh() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MODELS["mixtral"](), dtype=torch.float32)

    def made(seed: int, names: list[str], scale: float) -> Path:
        model = attach(
            fresh(),
            LoraConfig(r=2, lora_alpha=scale, target_modules=["q_proj"], target_parameters=names),
        )
        torch.manual_seed(seed)
        for parameter in trainable_parameters(model).values():
            nn.init.normal_(parameter, 0, 0.3)
        save_adapter(model, tmp_path / str(seed), base_model_name_or_path="tiny")
        return tmp_path / str(seed)

    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapters = [made(1, names, 4.0), made(2, names, 1.0)]
    result = composed(tmp_path / "made", method, adapters, [0.5, -1.0])
    deltas = [
        {path: adapter.delta() for path, _, adapter in named_adapters(load_adapter(fresh(), each))}
        for each in (*adapters, result)
    ]
    stacks = [path for path, delta in deltas[0].items() if delta.ndim == 3]
    assert len(stacks) == 4 and deltas[2].keys() == deltas[0].keys()
    for path in deltas[0]:
        D = (0.5 * deltas[0][path] - deltas[1][path]).double()
        error = float((deltas[2][path] - D).norm() / D.norm())
        if method == "cat":
            assert error < 1e-6
        elif method == "svd":
            U, S, Vt = torch.linalg.svd(D, full_matrices=False)
            wanted = (U[..., :2] * S[..., None, :2]) @ Vt[..., :2, :]
            assert float((deltas[2][path] - wanted).norm() / wanted.norm()) < 1e-5
        else:
            assert 0.05 < error < 10  # another sum, of finite numbers
    peft.PeftModel.from_pretrained(fresh(), str(result))


def test_copies_of_the_base_are_carried(llama, three, tmp_path):
    """PEFT stores W0 of an adapted embedding; the mix has it, as all of its adapters."""
    made = composed(tmp_path / "made", "cat", three, WEIGHTS)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    one, other = (load_file(d / "adapter_model.safetensors")[key] for d in (made, three[0]))
    assert torch.equal(one, other)


def test_what_answers_is_carried_where_it_agrees(three, llama, tmp_path, capsys):
    import shutil

    mine = [Path(shutil.copytree(d, tmp_path / d.name)) for d in three]
    for directory in mine:
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        (directory / "generation_config.json").write_text(f'{{"eos_token_id": {directory.name}}}')
    made = composed(tmp_path / "made", "cat", mine, WEIGHTS)
    assert (made / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (made / "generation_config.json").exists()
    assert "generation_config.json is not the same" in capsys.readouterr().out


def test_one_adapter_is_itself(llama, three, tmp_path):
    """Scaled; PEFT takes `linear` for a single one, whatever is asked for."""
    made = composed(tmp_path / "made", "svd", three[:1], [-2.0])
    wanted = {path: -2 * D for path, D in updates(loaded(llama(), three[0]), "0").items()}
    assert apart(updates(loaded(llama(), made), "0"), wanted) < 1e-5


def test_nothing_is_left_of_a_failure(three, tmp_path, monkeypatch):
    from dlora.library import result

    monkeypatch.setattr(result, "_json", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        composed(tmp_path / "made", "cat", three, WEIGHTS)
    assert list(tmp_path.iterdir()) == []
