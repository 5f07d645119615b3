"""A mixture of experts on disk: plain LoRAs for PEFT, and what every command makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import quiet_peft, relative_error
from exported import IDS, loaded, plain_adapter
from hostile import edit_json
from refusals import refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from dlora import LoraConfig, MolaConfig, attach, load_adapter, save_adapter, shard
from dlora.adapters.open_adapter import open_adapter
from dlora.export.command import main as export
from dlora.generate import main as generate
from dlora.library.command import main as library
from dlora.library.compose import main as compose
from dlora.lora.attach import named_adapters

pytestmark = quiet_peft
SIZES = [{"r": 2}, {"r": 3, "lora_alpha": 4}, {"r": 1}]
TARGETS = ["q_proj", "down_proj"]
ROUTER = "router.safetensors"


def mixture(base: Path) -> nn.Module:
    """A model with random experts and routers, and mean gates as if they had been measured."""
    model = loaded(base)
    torch.manual_seed(4)
    attach(model, MolaConfig(experts=3, top_k=2, target_modules=TARGETS, expert_settings=SIZES))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, adapter in named_adapters(model):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
            adapter.mean_gates = torch.rand(3, generator=draw).softmax(0)
    return model.eval()


@pytest.fixture(scope="module")
def base(bases: Any) -> Path:
    return bases("llama")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    save_adapter(mixture(base), tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def with_weights(base: Path, gates: dict[str, list[float]]) -> Tensor:
    """Logits of the base whose weights are W0 + Σ_e gate_e·s_e·B_e A_e, by path."""
    model, experts = loaded(base), mixture(base)
    for path, _, adapter in named_adapters(experts):
        for (A, B), s, g in zip(
            adapter.of_each(), adapter.experts.scalings, gates[path], strict=True
        ):
            model.get_submodule(path).weight.data += g * s * B @ A
    return logits(model)


def test_stock_peft_loads_every_expert(base: Path, saved: Path) -> None:
    assert not list(saved.glob("adapter_*")), "PEFT would take it for one adapter"
    paths = [path for path, _, _ in named_adapters(mixture(base))]
    for expert in range(3):
        theirs = peft.PeftModel.from_pretrained(loaded(base), saved / "experts" / str(expert))
        alone = with_weights(base, dict.fromkeys(paths, [float(e == expert) for e in range(3)]))
        assert relative_error(logits(theirs), alone) < 1e-5
    assert sorted(path.name for path in (saved / "experts").iterdir()) == ["0", "1", "2"]


def test_it_is_loaded_as_it_was(base: Path, saved: Path) -> None:
    wanted = mixture(base)
    fresh, again = loaded(base), mixture(base)
    with torch.no_grad():
        for _, _, adapter in named_adapters(again):
            adapter.lora_B.zero_()
            adapter.lora_router.zero_()
    for model in (load_adapter(fresh, saved), load_adapter(again, saved)):
        assert torch.equal(logits(model), logits(wanted))
        pairs = zip(named_adapters(model), named_adapters(wanted), strict=True)
        for (_, _, mine), (_, _, theirs) in pairs:
            assert torch.equal(mine.mean_gates, theirs.mean_gates)
            assert mine.experts == theirs.experts
    other = attach(loaded(base), MolaConfig(experts=3, r=2, target_modules=TARGETS))
    assert "a mixture of 3 experts (mola) that does not fit" in refusal(load_adapter, other, saved)
    plain = attach(loaded(base), LoraConfig(r=2, target_modules=TARGETS))
    assert "does not fit the adapters of this model" in refusal(load_adapter, plain, saved)
    gpt2 = nn.Sequential(nn.Linear(3, 3))
    assert "target_modules" in refusal(load_adapter, gpt2, saved)


def test_plain_loras_become_frozen_experts(base: Path, saved: Path) -> None:
    """From Python: with the same routers it is the same mixture, and routers alone are trained."""
    wanted = mixture(base)
    places = [str(saved / "experts" / str(expert)) for expert in range(3)]
    model = attach(loaded(base), MolaConfig(experts_from=places))
    replica = shard(model)
    assert {name.rpartition(".")[2] for name in replica.named} == {"lora_router"}
    for (_, _, mine), (_, _, theirs) in zip(
        named_adapters(model), named_adapters(wanted), strict=True
    ):
        assert mine.experts == theirs.experts
        with torch.no_grad():
            mine.lora_router.copy_(theirs.lora_router)
    assert torch.equal(logits(model), logits(wanted))
    model.train()
    model(IDS).logits.square().sum().backward()
    assert replica.reduce_gradients().norm > 0
    one = attach(loaded(base), MolaConfig(experts_from=places[1:2], top_k=1))
    assert torch.equal(logits(one), logits(load_adapter(loaded(base), places[1])))
    said = refusal(attach, loaded(base), MolaConfig(experts_from=[str(saved)], top_k=1))
    assert "is a mixture of experts" in said


def test_generate_mixes_token_by_token(base: Path, saved: Path, capsys: Any) -> None:
    question, words = "one two three?", ["--dtype", "float32", "--max-new-tokens", "12"]
    assert generate(["--adapter", str(saved), "--prompt", question, *words]) == 0
    printed = capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(base), mixture(base)
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for _ in range(12):  # without a cache: every token anew
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[0, -1].argmax()
        if int(best) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    answer = ids[0, len(start["input_ids"]) :]
    assert printed == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert len(printed) > 3


def test_export_writes_it_again_or_its_mean_gates(base: Path, saved: Path, tmp_path: Path) -> None:
    assert export(["--adapter", str(saved), "--to", str(tmp_path / "again")]) == 0
    for file in sorted(saved.rglob("*.safetensors")):
        name = file.relative_to(saved)
        assert (tmp_path / "again" / name).read_bytes() == file.read_bytes()
    words = ["--adapter", str(saved), "--to", str(tmp_path / "mean"), "--mean-gates"]
    assert export(words) == 0
    gates = {path: a.mean_gates.tolist() for path, _, a in named_adapters(mixture(base))}
    theirs = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "mean")
    assert relative_error(logits(theirs), with_weights(base, gates)) < 1e-5
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert config["r"] == 6 and not (tmp_path / "mean" / ROUTER).exists()
    merged = ["--adapter", str(tmp_path / "mean"), "--to", str(tmp_path / "merged"), "--merge"]
    assert export(merged) == 0
    assert relative_error(logits(loaded(tmp_path / "merged")), logits(theirs)) < 1e-5


def test_every_other_command_refuses_it_by_name(
    base: Path, bases: Any, saved: Path, tmp_path: Path
) -> None:
    to, words = ["--to", str(tmp_path / "to")], ["--adapter", str(saved)]
    for more in (["--merge"], ["--format", "gguf"], ["--format", "adalora"]):
        said = refusal(export, [*words, *to, *more])
        assert said.startswith("--merge" if more == ["--merge"] else "--format")
        assert "is a mixture of experts (mola), whose ΔW differs from token to token" in said
    assert "--layout: checkpoint" in refusal(export, [*words, *to, "--layout", "checkpoint"])
    plain = plain_adapter(bases, tmp_path / "plain")
    one = ["--adapter", str(plain), *to, "--mean-gates"]
    assert refusal(export, one) == "--mean-gates: needs a mixture of experts (mola)"
    hint = f"{saved}: is a mixture of experts (mola), and not one plain LoRA; each of its"
    added = ["add", str(tmp_path / "lib"), str(saved), "--name", "a"]
    assert refusal(library, added).startswith(hint)
    mixed = ["--adapters", f"{saved}=1", f"{plain}=1", "--method", "cat", *to]
    assert refusal(compose, mixed).startswith(hint)
    assert refusal(load_adapter, loaded(base), saved, "a").startswith(hint)
    assert not (tmp_path / "to").exists()
    # An expert is a plain LoRA, for all of them.
    assert library(["add", str(tmp_path / "lib"), str(saved / "experts/1"), "--name", "a"]) == 0


def test_gates_that_nobody_measured_are_not_made_up(base: Path, tmp_path: Path) -> None:
    model = mixture(base)
    for _, _, adapter in named_adapters(model):
        adapter.mean_gates = None
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "to"), "--mean-gates"]
    assert "were not measured in training" in refusal(export, words)
    assert not (tmp_path / "to").exists()


def test_one_kind_of_adapter_replaces_the_other(base: Path, saved: Path) -> None:
    """A directory is never both: PEFT would load what dlora does not."""
    plain = attach(loaded(base), LoraConfig(r=2, target_modules=TARGETS))
    save_adapter(plain, saved)
    assert not (saved / ROUTER).exists()
    assert open_adapter(saved).config.method == "lora"
    save_adapter(mixture(base), saved)
    assert not list(saved.glob("adapter_*"))
    assert open_adapter(saved).config.method == "mola"


def rewritten(file: Path, change: Any, **metadata: str) -> None:
    with safe_open(file, "pt") as opened:
        kept = opened.metadata() | metadata
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, kept)


def poison(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def widen(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = torch.zeros(7, 7)


DAMAGES: dict[str, tuple[Any, str]] = {
    "no expert": (lambda d: shutil.rmtree(d / "experts/1"), "experts/1"),
    "no count": (lambda d: rewritten(d / ROUTER, len, mola="{}"), "does not say how many experts"),
    "a million": (
        lambda d: rewritten(
            d / ROUTER,
            len,
            mola='{"experts": 1000000, "top_k": 1, "balance_coef": 0, "router_init_std": 0}',
        ),
        "does not say how many experts",
    ),
    "too few": (
        lambda d: rewritten(
            d / ROUTER,
            len,
            mola='{"experts": 2, "top_k": 3, "balance_coef": 0, "router_init_std": 0}',
        ),
        "top_k: 3 is more than the 2 experts",
    ),
    "no number": (lambda d: rewritten(d / ROUTER, poison), "NaN or infinite"),
    "no number in an expert": (
        lambda d: rewritten(d / "experts/2/adapter_model.safetensors", poison),
        "NaN or infinite",
    ),
    "shape": (lambda d: rewritten(d / ROUTER, widen), "the model expects floats"),
    "lacks": (lambda d: rewritten(d / ROUTER, lambda t: t.pop(sorted(t)[-1])), "it lacks"),
    "more": (
        lambda d: rewritten(d / ROUTER, lambda t: t.update(x=torch.ones(1))),
        "it has the unexpected x",
    ),
    "other modules": (
        lambda d: rewritten(
            d / "experts/2/adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])
        ),
        "adapt different modules",
    ),
    "dora": (
        lambda d: edit_json(d / "experts/0/adapter_config.json", use_dora=True),
        "has use_dora",
    ),
    "r": (
        lambda d: edit_json(d / "experts/0/adapter_config.json", r=5),
        "the model expects floats",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused_in_one_line(base: Path, saved: Path, damage: str) -> None:
    act, says = DAMAGES[damage]
    act(saved)
    assert says in refusal(load_adapter, loaded(base), saved)
    words = ["--adapter", str(saved), "--prompt", "one", "--dtype", "float32"]
    assert says in refusal(generate, words)
