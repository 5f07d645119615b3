"""PEFT's settings as they are: what `attach` makes of them computes what PEFT's own layers do."""

import copy
import warnings
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
from causal_models import relative_error
from peft import get_peft_model
from peft_twins import name_in_peft
from tiny import MODELS, whole
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from dlora import AdaLoraConfig, FloraConfig, LoraConfig, UsageError, attach
from dlora.adapters.peft_names import peft_names
from dlora.lora.attach import attachment_of, trainable_parameters

TOLERANCE = 1e-6
IDS = torch.arange(24).view(2, 12)
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True, "r": 4, "bias": "none"},
    "expression": {
        "target_modules": r".*\.(q|k)_proj",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 5, "k_proj": 3},
    },
    "blocks": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "excluded": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"],
    },
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "gate_proj"], "lora_alpha": 24},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"], "init_lora_weights": "gaussian"},
    "parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "task": {"task_type": "SEQ_CLS", "init_lora_weights": "orthogonal"},
}


def model_for(case: str, path: Any) -> Any:
    """In float64, so that differences are of meaning."""
    torch.manual_seed(0)
    if case == "task":
        config = MODELS["llama"]()
        config.num_labels = 3
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    model = whole(path("mixtral" if case == "parameters" else "llama"), "float64")
    model.config._experts_implementation = "eager"  # the others take no float64
    return model


def check_equal(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """The same trained tensors; with equal values, the same loss and gradients."""
    reference = dict(theirs.named_parameters())
    trained = trainable_parameters(ours)
    assert {n for n, p in reference.items() if p.requires_grad} == set(names.values())
    with torch.no_grad():
        for name, parameter in trained.items():
            nn.init.normal_(parameter, std=0.3)
            reference[names[name]].copy_(parameter.view_as(reference[names[name]]))
    labels = {"labels": IDS if hasattr(ours, "lm_head") else torch.tensor([0, 2])}
    mine, other = (model(input_ids=IDS, **labels).loss for model in (ours, theirs))
    assert relative_error(mine, other) < TOLERANCE
    mine.backward()
    other.backward()
    for name, parameter in trained.items():
        gradient = reference[names[name]].grad
        assert relative_error(parameter.grad, gradient.view_as(parameter)) < TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_a_config_of_peft_is_taken_as_it_is(saved_models: Any, case: str) -> None:
    config = peft.LoraConfig(**CASES[case])
    theirs = get_peft_model(model_for(case, saved_models), copy.deepcopy(config)).double()
    before = copy.deepcopy(config)
    ours = model_for(case, saved_models)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(ours, config)
    assert config == before
    found = attachment_of(ours).config
    assert found.init_lora_weights == CASES[case].get("init_lora_weights", True)
    assert (found.r, found.lora_alpha) == (config.r, config.lora_alpha)
    check_equal(ours, theirs, {n: name_in_peft(key) for n, key in peft_names(ours).items()})


def test_an_adalora_config_of_peft_is_taken(saved_models: Any) -> None:
    """PEFT's scale is lora_alpha / (init_r + 1e-5)."""
    settings = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 20}
    config = peft.AdaLoraConfig(**settings, beta1=0.7, orth_reg_weight=0.1, lora_alpha=24)
    theirs = get_peft_model(model_for("", saved_models), copy.deepcopy(config)).double()
    for name, parameter in theirs.named_parameters():
        if ".ranknum." in name:
            nn.init.constant_(parameter, 6 - 1e-5)
            parameter.requires_grad_(False)
    theirs = theirs.base_model  # whose model has no orthogonality in its loss
    ours = attach(model_for("", saved_models), config)
    found = attachment_of(ours).config
    assert isinstance(found, AdaLoraConfig)
    assert {name: getattr(found, name) for name in settings} == settings
    assert (found.beta1, found.beta2, found.orth_reg_weight) == (0.7, 0.85, 0.1)
    names = {n: n.replace(".adapter", "") + ".default" for n in trainable_parameters(ours)}
    check_equal(ours, theirs.model, names)


def test_the_usual_targets_are_those_of_pefts_table(saved_models: Any) -> None:
    """Also where the table has an expression or no entry."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**sizes, intermediate_size=16, vocab_size=30))
    theirs = get_peft_model(copy.deepcopy(bert), peft.LoraConfig())
    attach(bert, peft.LoraConfig())
    wanted = {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}
    assert set(attachment_of(bert).adapted) == wanted
    with pytest.raises(UsageError, match="peft.LoraConfig: target_modules: is not set, and PEFT"):
        attach(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("ensure_weight_tying", True),
        ("init_lora_weights", False),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "pissa_niter_4"),
        ("inference_mode", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("runtime_config", peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    saved_models: Any, name: str, value: Any
) -> None:
    model = whole(saved_models("llama"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{name: value})
    with pytest.raises(UsageError, match=f"^peft.LoraConfig: {name}: "):
        attach(model, config)
    assert not hasattr(model, "dlora") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.IA3Config(), "peft.IA3Config: peft_type: IA3 is not supported; LORA and ADALORA"),
        ({"r": 8}, "attach: expected a LoraConfig, of dlora or of peft, got dict"),
        (None, "attach: expected a LoraConfig, of dlora or of peft, got NoneType"),
    ],
)
def test_other_settings_are_refused(saved_models: Any, config: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        attach(whole(saved_models("llama")), config)


def test_a_name_that_means_nothing_is_told_of(saved_models: Any) -> None:
    """PEFT ignores it as long as another one matches."""
    config = peft.LoraConfig(target_modules=["q_proj", "c_attn"])
    model = whole(saved_models("llama"))
    with pytest.warns(
        UserWarning, match="attach: target_modules: 'c_attn' matches no module.*igno"
    ):
        attach(model, config)
    assert len(attachment_of(model).adapted) == 2
    with pytest.raises(UsageError, match="peft.LoraConfig: target_modules: .* matches no"):
        attach(whole(saved_models("llama")), peft.LoraConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize("cls", [LoraConfig, AdaLoraConfig, FloraConfig])
def test_arguments_of_peft_are_taken_or_refused_by_name(cls: Any) -> None:
    """Every argument that PEFT's class has, by its default; none is a bare TypeError."""
    theirs = peft.LoraConfig()
    names = {field.name for field in fields(theirs)} - {"target_modules", "r"}
    taken = {name: getattr(theirs, name) for name in names}
    assert taken["modules_to_save"] is None and taken["bias"] == "none"
    del taken["runtime_config"], taken["peft_type"]
    assert cls(**taken) == cls(lora_alpha=8, task_type=None)
    for name, value in {"bias": "all", "lora_bias": True, "loftq_config": {"a": 1}}.items():
        with pytest.raises(UsageError, match=f"^{name}: .* is not supported: "):
            cls(**{name: value})
    with pytest.raises(UsageError, match=f"{cls.__name__}: there is no setting 'lora_alhpa'; did"):
        cls(lora_alhpa=3)
