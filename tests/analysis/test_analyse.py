"""`dlora analyse` beside dense matrices: PEFT's updates and transformers' weights, by numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from exported import Case, loaded, made_by_peft
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file
from torch import nn

from dlora import LoraConfig, attach, save_adapter
from dlora.analysis.command import main
from dlora.library.command import main as library
from dlora.lora.attach import named_adapters, trainable_parameters
from dlora.lora.init.svd import DEAD

CASES = [
    Case("llama", ["q_proj", "down_proj"]),
    Case("mistral", ["v_proj"]),  # rsLoRA
    Case("gpt2", ["c_attn"]),
    Case("llama", ["v_proj", "embed_tokens", "lm_head"]),
]
Dense = dict[str, tuple[np.ndarray, np.ndarray]]  # {path: ΔW and W0 as [m, n], float64}


def analysed(to: Path, adapter: Path, *words: str) -> dict[str, Any]:
    assert main(["--adapter", str(adapter), "--to", str(to), *words]) == 0
    return json.loads((to / "analysis.json").read_text())


def dense(base: Path, adapter: Path) -> Dense:
    """What PEFT adds to each weight of the base, and the weight."""
    model = peft.PeftModel.from_pretrained(loaded(base), adapter).double()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default").detach().numpy()
            weight = layer.get_base_layer().weight.detach().numpy()
            is_wide = isinstance(layer.get_base_layer(), nn.Linear)
            pair = (delta, weight) if is_wide else (delta.T, weight.T)
            found[name.removeprefix("base_model.model.")] = pair
    return found


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and V of the singular values that are not rounding."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    k = int((S / S[0] > DEAD).sum())
    return U[:, :k], S[:k], Vt[:k].T


def phi(one: np.ndarray, other: np.ndarray) -> float:
    return float((np.linalg.norm(one.T @ other) ** 2) / min(one.shape[1], other.shape[1]))


def check_figures(found: dict[str, Any], D: np.ndarray, W: np.ndarray) -> None:
    U, S, V = svd(D)
    k, (m, n) = len(S), D.shape
    top_U, top_S, top_Vt = np.linalg.svd(W, full_matrices=False)
    projected = float(np.linalg.norm(U.T @ W @ V))
    p = S / S.sum()
    wanted = {
        "m": m,
        "n": n,
        "update": np.linalg.norm(D),
        "base": np.linalg.norm(W),
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "rank_90": int(np.searchsorted((S**2).cumsum(), 0.9 * (S**2).sum())) + 1,
        "projection": projected,
        "top": math.sqrt((top_S[:k] ** 2).sum()),
        "random": k * np.linalg.norm(W) / math.sqrt(m * n),
        "amplification": np.linalg.norm(D) / projected,
        "phi_input": phi(V, top_Vt[:k].T),
        "phi_output": phi(U, top_U[:, :k]),
    }
    assert found["sigma"] == pytest.approx(S.tolist(), rel=1e-6)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_figure_is_that_of_the_dense_matrices(case, bases, tmp_path, capsys) -> None:
    base = bases(case.base)
    adapter = made_by_peft(base, case, tmp_path / "adapter")
    found = analysed(tmp_path / "to", adapter)
    wanted = dense(base, adapter)
    assert found["matrices"].keys() == wanted.keys()
    for path, (D, W) in wanted.items():
        check_figures(found["matrices"][path], D, W)
    total = math.sqrt(sum(np.linalg.norm(D) ** 2 for D, _ in wanted.values()))
    weights = math.sqrt(sum(np.linalg.norm(W) ** 2 for _, W in wanted.values()))
    assert found["all"]["ratio"] == pytest.approx(total / weights, rel=1e-6)
    for groups in (found["kinds"], found["layers"]):
        assert sum(row["energy"] for row in groups.values()) == pytest.approx(1)
        assert sum(row["matrices"] for row in groups.values()) == len(wanted)
    printed = capsys.readouterr().out
    assert all(
        f"\n{group}  " in printed for groups in ("kinds", "layers") for group in found[groups]
    )
    for name in ("updates", "directions", "spectra"):
        assert (tmp_path / "to" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_two_adapters(bases, tmp_path, capsys) -> None:
    """Of other targets and ranks: every cell of φ, and the cosine."""
    base = bases("llama")
    one = made_by_peft(base, Case("llama", ["q_proj", "v_proj"]), tmp_path / "one")
    other = made_by_peft(base, Case("llama", ["v_proj", "up_proj"]), tmp_path / "other")
    found = analysed(tmp_path / "to", one, "--against", str(other))["against"]
    pairs = dense(base, one), dense(base, other)
    both = pairs[0].keys() & pairs[1].keys()
    assert found["matrices"].keys() == both and all("v_proj" in path for path in both)
    assert set(found["only in adapter"]) == pairs[0].keys() - both
    assert set(found["only in against"]) == pairs[1].keys() - both
    grids = load_file(tmp_path / "to/similarity.safetensors")
    for path in both:
        (D1, _), (D2, _) = pairs[0][path], pairs[1][path]
        (U1, _, V1), (U2, _, V2) = svd(D1), svd(D2)
        own = found["matrices"][path]
        cosine = (D1 * D2).sum() / (np.linalg.norm(D1) * np.linalg.norm(D2))
        assert own["cosine"] == pytest.approx(cosine, rel=1e-6)
        assert own["update"] == pytest.approx(np.linalg.norm(D2), rel=1e-6)
        for side, left, right in (("input", V1, V2), ("output", U1, U2)):
            grid = grids[f"{path}.{side}"]
            assert grid.shape == (left.shape[1], right.shape[1])
            for i, j in np.ndindex(grid.shape):
                wanted = phi(left[:, : i + 1], right[:, : j + 1])
                assert grid[i, j] == pytest.approx(wanted, rel=1e-5)
            assert own[side]["all"] == pytest.approx(phi(left, right), rel=1e-6)
            assert own[side]["random"] == pytest.approx(max(grid.shape) / len(left))
    printed = capsys.readouterr().out
    for option in ("adapter", "against"):
        assert f"only in --{option}: {len(found[f'only in {option}'])} matrices: " in printed
    assert (tmp_path / "to/similarity.png").is_file()


def test_matrices_of_a_stack(saved_models, tmp_path) -> None:
    """Those of each expert, beside the model's own; and a factor of one of them is 0."""
    path, stack = saved_models("mixtral"), "experts.gate_up_proj"
    model = attach(
        loaded(path),
        LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], target_parameters=[stack]),
    )
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, 0, 0.3)
    first = next(a for p, _, a in named_adapters(model) if p.endswith(stack))
    first.lora_A.data[2:4] = 0  # of expert 1
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=path)
    found = analysed(tmp_path / "to", tmp_path / "adapter")
    seen = 0
    for name, _, adapter in named_adapters(model):
        if not name.endswith(stack):
            continue
        for expert, D in enumerate(adapter.delta().double().numpy()):
            own = found["matrices"][f"{name}[{expert}]"]
            seen += 1
            if adapter is first and expert == 1:
                assert (own["update"], own["sigma"], own["projection"]) == (0.0, [], None)
                continue
            U, S, Vt = np.linalg.svd(D)
            U, S, V = U[:, :2], S[:2], Vt[:2].T
            W = model.get_parameter(name)[expert].detach().double().numpy()
            assert own["sigma"] == pytest.approx(S.tolist(), rel=1e-5)
            assert own["projection"] == pytest.approx(np.linalg.norm(U.T @ W @ V), rel=1e-4)
            assert own["base"] == pytest.approx(np.linalg.norm(W), rel=1e-6)
    (row,) = [row for kind, row in found["kinds"].items() if kind.endswith(stack)]
    assert seen == row["matrices"] > 4


def test_modules_that_are_trained_whole(bases, tmp_path, capsys) -> None:
    base = bases("llama")
    case = Case("llama", ["q_proj"], saved=("norm",))
    adapter = made_by_peft(base, case, tmp_path / "adapter")
    found = analysed(tmp_path / "to", adapter)["whole"]
    before = loaded(base).model.norm.weight.detach()
    tensors = load_file(adapter / "adapter_model.safetensors")
    after = tensors["base_model.model.model.norm.weight"]
    change = np.linalg.norm(after - before.numpy())
    assert found["model.norm.weight"]["update"] == pytest.approx(change, rel=1e-6)
    assert found["model.norm.weight"]["base"] == pytest.approx(float(before.norm()), rel=1e-6)
    assert "model.norm.weight: trained whole, moved by" in capsys.readouterr().out


ADALORA = {
    "adapter__r": None,
    "adapter__method": "adalora",
    "adapter__init_r": 4,
    "adapter__target_r": 1,
    "adapter__target_modules": ["q_proj", "down_proj"],
    "adapter__tinit": 1,
    "adapter__tfinal": 2,
}
PISSA = {"adapter__init_lora_weights": "pissa", "adapter__target_modules": ["q_proj"]}


@pytest.mark.parametrize("method", ["adalora", "pissa"])
def test_a_run(method, run, saved_models, tmp_path, capsys) -> None:
    """A checkpoint and the adapter that it became are the same update, which PEFT loads."""
    how = ADALORA if method == "adalora" else PISSA
    run("run", 1, train__max_steps=6, output__save_every=6, **how)
    directory = tmp_path / "run"
    (checkpoint,) = (directory / "checkpoints").glob("step-*")
    to = tmp_path / "to"
    found = analysed(to, directory / "adapter", "--against", str(checkpoint))
    wanted = dense(saved_models("llama"), directory / "adapter")
    assert found["matrices"].keys() == wanted.keys()
    for path, (D, W) in wanted.items():
        if not np.linalg.norm(D):
            continue
        check_figures(found["matrices"][path], D, W)
        own = found["against"]["matrices"][path]
        assert [own["cosine"], own["input"]["all"]] == pytest.approx([1, 1], rel=1e-5)
    if method == "pissa":
        assert found["adalora"] is None and found["all"]["r"] == 8  # twice the run's
        return
    masks = json.loads((directory / "ranks.json").read_text())
    last = masks[max(masks, key=int)]
    assert found["adalora"]["ranks"] == last
    assert (found["adalora"]["kept"], found["adalora"]["of"]) == (sum(last.values()), 4 * len(last))
    for kind, rank in found["adalora"]["kinds"].items():
        assert rank == pytest.approx(np.mean([r for path, r in last.items() if kind in path]))
    pruned = [path for path, rank in last.items() if not rank]
    assert set(found["against"]["only in against"]) == set(pruned)
    assert (
        f"AdaLoRA kept {sum(last.values())} of {4 * len(last)} triplets" in capsys.readouterr().out
    )
    assert (to / "ranks.png").is_file()
    of_checkpoint = analysed(tmp_path / "of checkpoint", checkpoint)
    assert of_checkpoint["adalora"] == found["adalora"]
    other = tmp_path / "elsewhere"
    (directory / "adapter").rename(other)  # then nothing says that it was an AdaLoRA
    assert analysed(tmp_path / "again", other)["adalora"] is None


def test_names_of_a_library(bases, tmp_path) -> None:
    adapter = made_by_peft(bases("llama"), Case("llama", ["q_proj"]), tmp_path / "adapter")
    assert library(["add", str(tmp_path / "lib"), str(adapter), "--name", "first"]) == 0
    words = ["--library", str(tmp_path / "lib"), "--adapter", "first", "--to", str(tmp_path / "to")]
    assert main(words) == 0
    assert json.loads((tmp_path / "to/analysis.json").read_text())["all"]["r"] == 3
