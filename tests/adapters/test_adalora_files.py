"""What is written of AdaLoRA, loaded by stock PEFT: as a plain LoRA and in AdaLoRA's own form."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import quiet_peft
from exported import Bases, loaded, logits, run_config
from refusals import refusal
from safetensors.torch import load_file
from torch import Tensor, nn

from dlora import AdaLoraConfig, LoraConfig, UsageError, attach, load_adapter
from dlora import save_adapter as save
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.writing import write
from dlora.config.load import dump_yaml
from dlora.export.command import main
from dlora.lora.attach import named_adapters, trainable_parameters
from dlora.methods import adalora_report as ranks_file
from dlora.methods.trained_replica import replicate
from dlora.metrics.log import MetricsLog
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

pytestmark = quiet_peft
PHASES = {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2, "deltaT": 2}
ATTENTION = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ATTENTION}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2's embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "copies": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "alphas": ("llama", {"target_modules": ATTENTION, "alpha_pattern": {"q_proj": 7, "0.*": 3}}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
}


def adapted(base: Path, state: str, settings: dict[str, Any]) -> nn.Module:
    """A model with random P, λ, Q and copies, of which triplets are masked or gone.

    Among `masked` and `shrunk` modules are some of every rank from 0 to 4.
    """
    model = loaded(base)
    torch.manual_seed(1)
    attach(model, AdaLoraConfig(lora_alpha=6, **PHASES | settings))
    for name, parameter in trainable_parameters(model).items():
        around = 1.0 if "norm" in name else 0.0
        nn.init.normal_(parameter, around, 0.5 if name.endswith("lora_E") else 0.3)
    for k, (_, _, adapter) in enumerate(named_adapters(model)):
        kept = torch.tensor([(i + k) % 4 < (k + 3) % 5 for i in range(4)])
        if state == "masked":
            adapter.kept = kept
        elif state == "shrunk":
            adapter.shrink(kept.nonzero().view(-1))
    return model


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def ranks(model: nn.Module) -> dict[str, int]:
    return {path: len(a.triplets()) for path, _, a in named_adapters(model)}


@pytest.mark.parametrize("state", ["whole", "masked", "shrunk"])
@pytest.mark.parametrize("case", CASES)
def test_stock_peft_loads_a_plain_lora_with_equal_logits(
    case: str, state: str, bases: Bases, tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    model = adapted(bases(kind), state, settings)
    expected = logits(model.eval())
    model.train()  # what is written is the pruned model whatever the mode
    save(model, tmp_path / "adapter")
    assert relative(expected, logits(loaded(bases(kind)))) > 0.05
    theirs = peft.PeftModel.from_pretrained(loaded(bases(kind)), tmp_path / "adapter").eval()
    assert relative(logits(theirs), expected) < 1e-5
    again = load_adapter(loaded(bases(kind)), tmp_path / "adapter").eval()
    assert relative(logits(again), expected) < 1e-5
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["use_rslora"]
    left = {path: r for path, r in ranks(model).items() if r}
    assert {path: a.r for path, _, a in named_adapters(again)} == left
    if state != "whole" and len(ranks(model)) > 2:
        assert len(left) < len(ranks(model))  # there were modules of rank 0


@pytest.mark.parametrize("state", ["whole", "masked", "shrunk"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if "embedding" not in c and c not in ("tied head",)]
)
def test_stock_peft_loads_adalora_s_own_form(
    case: str, state: str, bases: Bases, tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    model = adapted(bases(kind), state, settings)
    expected = logits(model.eval())
    save(model, tmp_path / "adapter", peft_type="ADALORA")
    theirs = peft.PeftModel.from_pretrained(loaded(bases(kind)), tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].peft_type == "ADALORA"
    assert relative(logits(theirs), expected) < 1e-5
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for path, r in ranks(model).items():
        prefix = f"base_model.model.{path}.lora_"
        assert tensors[f"{prefix}A"].shape[0] == tensors[f"{prefix}B"].shape[1] == r
        assert tensors[f"{prefix}E"].shape == (r, 1)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert {key: config[key] for key in PHASES} == PHASES
    assert {k: sum(v) for k, v in config["rank_pattern"].items()} == {
        f"{path}.lora_E": r for path, r in ranks(model).items()
    }


def test_mistakes_are_one_line_and_nothing_is_written(bases: Bases, tmp_path: Path) -> None:
    base, out = bases("llama"), tmp_path / "out"
    fresh = loaded(base)
    attach(fresh, AdaLoraConfig(target_modules=["q_proj"]))
    plain = loaded(base)
    attach(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    embedding = adapted(base, "whole", {"target_modules": ["embed_tokens"]})
    for model, form, message in (
        (fresh, "LORA", "every singular value is 0"),
        (fresh, "ADALORA", "total_step: "),
        (plain, "ADALORA", "needs an adalora adapter, but this one is lora"),
        (embedding, "ADALORA", "does not support the embedding model.embed_tokens"),
        (plain, "IA3", "expected one of LORA, ADALORA, got 'IA3'"),
        (loaded(base), "ADALORA", "has no dlora adapters"),
    ):
        assert message in refusal(save, model, out, peft_type=form) and not out.exists()


def test_loading_where_it_cannot_be_is_one_line(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    model = adapted(base, "masked", {"target_modules": ATTENTION})
    save(model, tmp_path / "plain")
    save(model, tmp_path / "own", peft_type="ADALORA")
    before = {name: p.clone() for name, p in trainable_parameters(model).items()}
    with pytest.raises(UsageError, match="is a plain LoRA, but the model has adalora"):
        load_adapter(model, tmp_path / "plain")
    for target in (model, loaded(base)):
        with pytest.raises(UsageError, match="peft_type is 'ADALORA'; only LORA can be loaded"):
            load_adapter(target, tmp_path / "own")
    assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(model).items())


# -- dlora.export of a checkpoint -----------------------------------------------------------------


def checkpoint_of(base: Path, root: Path, steps: int) -> tuple[Path, nn.Module]:
    """A checkpoint after some steps of a run of 6, and the live model as it was then."""
    settings = {"target_modules": ATTENTION, "modules_to_save": ["norm"], "lora_alpha": 6}
    schedule = {name: PHASES[name] for name in PHASES if name != "total_step"}
    model = loaded(base)
    torch.manual_seed(2)
    attach(model, AdaLoraConfig(**settings, **PHASES))
    for _, _, adapter in named_adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, 0, 0.3)
    topology = Topology.current()
    replica = replicate(model, build_engine(resolve_placement("fsdp2", "none", topology), topology))
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=0.02))
    for step in range(steps):
        ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(step))
        model.train()(ids, labels=ids).loss.backward()
        replica.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
    config = run_config(base, root, method="adalora", **settings, **schedule)
    lora = {"method": "adalora", **asdict(model.dlora.config)}
    state = {"step": steps, "total_steps": 6, "adapter": lora}
    content = capture(replica, replica.states(optimizer), state, replica.method.record())
    assert content is not None
    directory = write(content, root / "checkpoints", dump_yaml(config), 2)
    return directory, model.eval()


@pytest.mark.parametrize("steps", [1, 3, 6], ids=["before masks", "masked", "shrunk"])
def test_export_of_a_checkpoint_in_every_form(steps: int, bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    source, model = checkpoint_of(base, tmp_path / "run", steps)
    expected, words = logits(model), ["--adapter", str(source), "--to"]
    count = sum(ranks(model).values())
    assert count == {1: 24, 3: 15, 6: 12}[steps]
    main([*words, str(tmp_path / "lora")])
    main([*words, str(tmp_path / "adalora"), "--format", "adalora"])
    main([*words, str(tmp_path / "merged"), "--merge"])
    for form in ("lora", "adalora"):
        theirs = peft.PeftModel.from_pretrained(loaded(base), tmp_path / form).eval()
        assert theirs.peft_config["default"].peft_type == form.upper()
        assert relative(logits(theirs), expected) < 1e-5, form
    assert relative(logits(loaded(tmp_path / "merged")), expected) < 1e-5
    assert relative(logits(loaded(base)), expected) > 0.01


def test_export_refuses_adalora_s_form_of_others(bases: Bases, tmp_path: Path) -> None:
    source, model = checkpoint_of(bases("llama"), tmp_path / "run", 3)
    save(model, tmp_path / "plain")
    words = ["--to", str(tmp_path / "out"), "--format", "adalora"]
    with pytest.raises(UsageError, match="--format: adalora needs a checkpoint of an adalora run"):
        main(["--adapter", str(tmp_path / "plain"), *words])
    with pytest.raises(UsageError, match="--format: adalora cannot act with --merge"):
        main(["--adapter", str(source), *words, "--merge"])
    assert not (tmp_path / "out").exists()


# -- ranks.json and its picture -------------------------------------------------------------------


def test_ranks_are_read_as_they_were_written_up_to_a_step(tmp_path: Path) -> None:
    masks = {10: {"a.0.q": 3, "a.1.q": 1}, 2: {"a.0.q": 4, "a.1.q": 4}}
    ranks_file.write_masks(tmp_path, masks)
    assert list(json.loads((tmp_path / "ranks.json").read_text())) == ["2", "10"]
    assert ranks_file.read_masks(tmp_path, until=10) == masks
    assert ranks_file.read_masks(tmp_path, until=9) == {2: masks[2]}
    for damaged in ('{"2": {"a', "[1]", '{"x": {}}'):
        (tmp_path / "ranks.json").write_text(damaged)
        assert ranks_file.read_masks(tmp_path, until=10) == {}
    assert ranks_file.read_masks(tmp_path / "nowhere", until=10) == {}


def test_the_picture_has_layers_in_columns_and_kinds_in_rows(tmp_path: Path) -> None:
    ranks = {f"m.layers.{i}.{kind}": i for i in (0, 1, 10, 2) for kind in ("q", "mlp.up")}
    rows, columns, cells = ranks_file.table_of(ranks | {"head": 5})
    assert rows == ["q", "mlp.up", "head"] and columns == ["-", "0", "1", "2", "10"]
    assert cells["mlp.up", "10"] == 10 and cells["head", "-"] == 5 and len(cells) == 9
    figure = ranks_file.heat_map(ranks, init_r=12)
    assert "26 of 96" in figure.axes[0].get_title()
    written = ranks_file.write_picture(tmp_path, figure)
    assert written.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_the_picture_is_on_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, after=None, tensorboard=True)
    log.figure("ranks", ranks_file.heat_map({"layers.0.q": 3, "layers.1.q": 1}, init_r=4), 7)
    log.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [image.step for image in seen.Images("ranks")] == [7]
