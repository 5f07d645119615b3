"""Adapters on disk: stock PEFT reads what dlora writes, dlora reads what PEFT writes.

In both directions the logits and the set of adapted modules must be the same.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import causal_model, logits, quiet_peft, randomize_trainable, relative_error
from hostile import edit_json
from peft.tuners.tuners_utils import BaseTunerLayer
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlora import LoraConfig, UsageError, attach, load_adapter, save_adapter
from dlora.adapters.save_load import CONFIG, WEIGHTS

pytestmark = [
    *quiet_peft,
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear llama": ("llama", {}),
    "all-linear gpt2": ("gpt2", {}),
    "all-linear mistral": ("mistral", {}),
    "names of mixtral": ("mixtral", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "tied embedding and head": ("tied", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["o_proj", "lm_head"]}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte", "c_attn", "lm_head"]}),
    "regex, one layer": ("llama", {"target_modules": r".*\.layers\.1\..*\.(q|down)_proj"}),
    "regex, mixed": (
        "llama",
        {"target_modules": r"model\.layers\.(0\.self_attn\.q|1\.mlp\.up)_proj|lm_head"},
    ),
    "one path": ("llama", {"target_modules": ["layers.1.mlp.up_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            # The first match wins: of layer 1's q_proj the first, although all three fit.
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 5, r"self.*\.q_proj": 3},
            "alpha_pattern": {"k_proj": 5, r"self_attn\.(k|o)_proj": 11},
        },
    ),
    "rslora": (
        "llama",
        {"target_modules": ["k_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"k.*": 9}},
    ),
    "dora": ("llama", {"use_dora": True, "target_modules": ["k_proj", "lm_head", "embed_tokens"]}),
    "gpt2 dora": ("gpt2", {"use_dora": True}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved tied head": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["_tokens"]}),
    # PEFT compares endings: `norm` is every layer's input_layernorm too.
    "saved norms": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "head"]}),
    "saved gpt2 norm": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    "saved before targeted": ("llama", {"modules_to_save": ["down_proj"]}),
    "saved block": ("llama", {"target_modules": ["up_proj"], "modules_to_save": ["layers.0.mlp"]}),
}  # fmt: skip


def settings_of(case: str) -> tuple[str, dict[str, Any]]:
    kind, settings = (CASES | ONE_WAY)[case]
    return kind, {"target_modules": "all-linear", "r": 4, "lora_alpha": 6} | settings


def adapted_by_peft(model: nn.Module) -> dict[str, tuple[int, float]]:
    """(r, s) of every module with LoRA layers, by its path in the base."""
    return {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def saved_by_peft(model: nn.Module) -> set[str]:
    return {
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }


def adapted_here(model: nn.Module) -> dict[str, tuple[int, float]]:
    modules = {path: model.get_submodule(path).adapter for path in model.dlora.adapted}
    return {path: (adapter.r, adapter.scaling) for path, adapter in modules.items()}


def same_modules(ours: nn.Module, theirs: nn.Module) -> None:
    adapted, expected = adapted_here(ours), adapted_by_peft(theirs)
    assert {path: r for path, (r, _) in adapted.items()} == {p: r for p, (r, _) in expected.items()}
    for path, (_, scaling) in adapted.items():
        assert scaling == pytest.approx(expected[path][1], rel=1e-12), path
    assert set(ours.dlora.saved) == saved_by_peft(theirs)


def peft_model(kind: str, settings: dict[str, Any]) -> nn.Module:
    """PEFT's adapter with random A, B and copies."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(causal_model(kind), config).eval()
    randomize_trainable(model)
    return model


def load_in_peft(kind: str, directory: Path) -> nn.Module:
    """`PeftModel.from_pretrained`, where a missing or an unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*unexpected keys.*")
        return peft.PeftModel.from_pretrained(causal_model(kind), directory).eval()


# PEFT sorts the patterns when it saves, and so cannot read its own file of the first of these; and
# it adapts the experts of a mixture too, which are no linear layers here.
ONE_WAY: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns out of order": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 6, r"layers\.1\..*": 2, r".*\.0\..*": 3},
            "alpha_pattern": {"self_attn.v_proj": 1, "1.self_attn.(q|v)_proj": 3},
        },
    ),
    "all-linear mixtral": ("mixtral", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", CASES | ONE_WAY)
def test_peft_loads_what_dlora_saves(case: str, tmp_path: Path) -> None:
    kind, settings = settings_of(case)
    ours = attach(causal_model(kind).eval(), LoraConfig(**settings))
    randomize_trainable(ours)
    save_adapter(ours, tmp_path)
    theirs = load_in_peft(kind, tmp_path)
    same_modules(ours, theirs)
    expected = logits(ours)
    assert relative_error(expected, logits(causal_model(kind).eval())) > 1e-3
    assert relative_error(logits(theirs), expected) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_dlora_loads_what_peft_saves(case: str, tmp_path: Path) -> None:
    kind, settings = settings_of(case)
    theirs = peft_model(kind, settings)
    same_modules(attach(causal_model(kind), LoraConfig(**settings)), theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(causal_model(kind).eval(), tmp_path)
    same_modules(ours, theirs)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5


def test_of_a_mixture_the_linear_layers_are_adapted_and_peft_s_experts_load(tmp_path: Path) -> None:
    """To PEFT, `all-linear` of a Mixtral is its experts and routers as well."""
    theirs = peft_model("mixtral", {"target_modules": "all-linear", "r": 4})
    linear = [p for p, m in theirs.named_modules() if type(m) is peft.tuners.lora.layer.Linear]
    with pytest.warns(UserWarning, match="stacked weights of experts"):
        ours = attach(causal_model("mixtral"), LoraConfig(r=4))
    assert [f"base_model.model.{path}" for path in ours.dlora.adapted] == linear
    randomize_trainable(theirs)
    theirs.save_pretrained(tmp_path)
    there = load_adapter(causal_model("mixtral"), tmp_path)
    assert len(there.dlora.parameters) == 2 * 3
    assert relative_error(logits(there), logits(theirs)) < 1e-5


class Twins(nn.Module):
    """Paths that end alike: a list of names cannot mean the outer `head` alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"head": nn.Linear(4, 4), "adapters": nn.Linear(4, 4)})
        self.adapter = nn.ModuleDict({"head": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.body["adapters"](self.body["head"](x)).relu()
        return self.head(self.adapter["head"](inner).relu())


@pytest.mark.parametrize(
    "targets",
    ["head", "adapter.head", r"(body|adapter)\.head", ["head"], ["body.head"], ["adapters"]],
    ids=str,
)
def test_the_saved_targets_mean_the_adapted_modules_alone(
    targets: str | list[str], tmp_path: Path
) -> None:
    ours = attach(Twins(), LoraConfig(r=2, target_modules=targets))
    randomize_trainable(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Twins(), tmp_path)
    same_modules(ours, theirs)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    again = load_adapter(Twins(), tmp_path)
    assert adapted_here(again) == adapted_here(ours)
    assert torch.equal(again(x), ours(x))


def test_the_files_are_what_a_fresh_peft_adapter_would_need(tmp_path: Path) -> None:
    """Float32 whatever the base; nothing of the base; every field that PEFT reads is plain JSON."""
    model = attach(
        causal_model("gpt2", torch.bfloat16),
        LoraConfig(r=2, target_modules=["c_attn", "wte"], modules_to_save=["ln_f"]),
    )
    save_adapter(model, tmp_path, base_model_name_or_path="some/base")
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sorted(key for key in tensors if ".h.1" not in key) == [
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight",
        "base_model.model.transformer.ln_f.bias",
        "base_model.model.transformer.ln_f.weight",
        "base_model.model.transformer.wte.lora_embedding_A",
        "base_model.model.transformer.wte.lora_embedding_B",
    ]
    config = json.loads((tmp_path / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "target_modules": ["c_attn", "wte"],
        "modules_to_save": ["ln_f"],
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert config.keys() <= peft.LoraConfig(task_type="CAUSAL_LM").to_dict().keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def saved(directory: Path, targets: list[str]) -> Path:
    model = attach(causal_model("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    randomize_trainable(model)
    save_adapter(model, directory)
    return directory


def test_loading_into_attached_adapters_keeps_their_tensors(tmp_path: Path) -> None:
    """Flat buffers and optimizers hold them."""
    saved(tmp_path, ["q_proj"])
    model = attach(causal_model("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    load_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, parameter in before.items():
        assert model.get_parameter(name) is parameter
        key = "base_model.model." + name.replace(".adapter", "") + ".weight"
        assert torch.equal(parameter, tensors[key])


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / CONFIG, **changes)


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return edit


def with_tensor(name: str, *shape: int) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BASE_COPY = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda d: (d / CONFIG).unlink(), f"{CONFIG}: file not found"),
    "no tensors": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS}: file not found"),
    "not JSON": (lambda d: (d / CONFIG).write_text("{"), f"{CONFIG}: cannot be read"),
    "not an object": (
        lambda d: (d / CONFIG).write_text("[]"),
        "contains a JSON list, not an object",
    ),
    "cut off": (lambda d: (d / WEIGHTS).write_bytes(b"\x00" * 9), f"{WEIGHTS}: is damaged"),
    "another method": (edit_config(peft_type="ADALORA"), "peft_type is 'ADALORA'"),
    "bias": (edit_config(bias="all"), "bias: 'all' is not supported"),
    "a bias": (edit_config(lora_bias=True), "lora_bias: True is not supported"),
    "tokens": (edit_config(trainable_token_indices=[1]), "trainable_token_indices: [1] is not"),
    "alora": (edit_config(alora_invocation_tokens=[1]), "alora_invocation_tokens: [1] is not"),
    "corda": (edit_config(init_lora_weights="corda"), "'corda' rewrites the base"),
    "loftq": (edit_config(init_lora_weights="loftq"), "'loftq' rewrites the base"),
    "pattern alone": (edit_config(layers_pattern="h"), "layers_pattern: cannot act without"),
    "pissa": (edit_config(init_lora_weights="pissa"), "'pissa' rewrites the base"),
    "olora": (edit_config(init_lora_weights="olora"), "'olora' rewrites the base"),
    "bad rank": (edit_config(r=0), f"{CONFIG}: r: must be >= 1"),
    "no targets": (edit_config(target_modules=None), f"{CONFIG}: target_modules: is empty"),
    "other base": (edit_config(target_modules=["qkv"]), "['qkv'] matches no linear layer"),
    "missing tensor": (edit_tensors(lambda t: t.pop(KEY)), f"lacks {KEY}"),
    "extra tensor": (with_tensor("extra", 1), "has the unexpected extra"),
    "other shape": (with_tensor(KEY, 4, 5), f"{KEY} has shape [4, 5], the model expects [4, 24]"),
    "other base weight": (with_tensor(BASE_COPY, 24, 24), f"{BASE_COPY} differs from this model's"),
    "resized base weight": (with_tensor(BASE_COPY, 25, 24), f"{BASE_COPY} differs from this"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    damage(saved(tmp_path, ["q_proj"]))
    assert message in refusal(load_adapter, causal_model("llama"), tmp_path)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}], ids=str
)
def test_an_adapter_of_another_scale_is_refused(settings: dict, tmp_path: Path) -> None:
    """The same tensors would give other logits."""
    saved(tmp_path, ["q_proj"])
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | settings
    model = attach(causal_model("llama"), LoraConfig(**config))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UsageError, match=r"scale model\.layers\.0\.self_attn\.q_proj by 1\.5"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_base_in_another_dtype_is_the_same_base(tmp_path: Path) -> None:
    """PEFT writes adapted embeddings in the dtype that it trained on."""
    peft_model("llama", {"r": 2, "target_modules": ["embed_tokens"]}).save_pretrained(tmp_path)
    model = load_adapter(causal_model("llama", torch.bfloat16), tmp_path)
    assert model.dlora.adapted == ["model.embed_tokens"]


def test_saving_refuses_an_empty_tensor(tmp_path: Path) -> None:
    """A partitioned tensor whose data is elsewhere."""
    model = attach(causal_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.model.layers[1].self_attn.q_proj.adapter.lora_A.data = torch.empty(0)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is empty"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_a_model_without_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"call dlora\.attach first"):
        save_adapter(causal_model("llama"), tmp_path)
