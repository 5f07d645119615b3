"""The cases of PEFT's own tests as (model, settings) → the same numbers; `peft_differences.py` has
those that come out otherwise.

PEFT's suites `test_custom_models.py` and `test_decoder_models.py` go through kinds of layers and
settings of LoRA, DoRA and AdaLoRA; here are such kinds and settings, on models of this suite.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One model of `peft_models.py` and PEFT's settings for it.

    Attributes:
        merged_by_peft: False where PEFT's own merge fails or changes the output.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    merged_by_peft: bool = True


def case(model: str, *targets: str, merged_by_peft: bool = True, **settings: Any) -> Case:
    """A case whose `target_modules` are a list."""
    named = {"target_modules": [*targets]} if targets else {}
    return Case(model, {"r": 4, "lora_alpha": 6, **named, **settings}, merged_by_peft)


def _dora(model: str, *targets: str, **settings: Any) -> Case:
    return case(model, *targets, use_dora=True, **settings)


CASES: dict[str, Case] = {
    # linear layers
    "expression": case("mlp", target_modules="up"),
    "one layer": case("mlp", "up"),
    "last layer": case("mlp", "down"),
    "two layers": case("mlp", "up", "down"),
    "no biases": case("mlp without biases", "up", "down"),
    "PEFT's sizes": Case("mlp", {"target_modules": ["up", "down"]}),
    "saved beside": case("mlp", "up", modules_to_save=["down"]),
    "saved norm": case("mlp with norms", "up", "down", modules_to_save=["after"]),
    "saved norms": case("mlp with norms", "up", modules_to_save=["before", "after"]),
    "saved and named": case("mlp", "up", "down", modules_to_save=["down"]),
    "saved recurrence": case("recurrent", "up", modules_to_save=["gru"]),
    "saved attention": case("attention", "head", modules_to_save=["mha"]),
    "dropout": case("mlp", "up", "down", lora_dropout=0.3),
    "rank-stabilised": case("mlp", "up", "down", use_rslora=True),
    "rank 1": case("mlp", "up", r=1),
    "rank above the sizes": case("mlp", "down", r=32),
    "a fraction as alpha": case("mlp", "up", lora_alpha=2.5),
    "all linear": case("recurrent", target_modules="all-linear"),
    "names that match nothing": case("mlp", "up", "nowhere"),
    "saved names that match nothing": case("mlp", "up", modules_to_save=["nowhere"]),
    "fan_in_fan_out of a linear layer": case("mlp", "up", fan_in_fan_out=True),
    "running statistics of the base": case("normed", "up"),
    # starts
    "gaussian": case("mlp", "up", "down", init_lora_weights="gaussian"),
    "orthogonal": case("mlp", "up", init_lora_weights="orthogonal"),
    "gaussian in capitals": case("words", "embed", "mix", init_lora_weights="Gaussian"),
    # targets and patterns
    "some blocks": case("deep", "up", layers_to_transform=[1, 3]),
    "one block": case("deep", "up", "down", layers_to_transform=2, layers_pattern="layers"),
    "of named lists": case(
        "deep", "up", layers_to_transform=[0], layers_pattern=["layers", "blocks"]
    ),
    "no blocks named": case("deep", "up", layers_to_transform=[]),
    "excluded names": case("deep", "up", "down", exclude_modules=["layers.1.up", "down"]),
    "excluded by expression": case(
        "deep", target_modules="all-linear", exclude_modules=r".*\.[02]\..*"
    ),
    "excluding nothing": case("deep", "up", exclude_modules=["nowhere"]),
    "paths": case("deep", "body.layers.0.up", "3.down", "head"),
    "patterns": case(
        "deep",
        *("up", "down", "head"),
        rank_pattern={"up": 2, r".*\.[02]\.down": 3},
        alpha_pattern={"head": 9, "^body.layers.1.down": 1},
    ),
    "stabilised patterns": case(
        "deep", "up", "head", use_rslora=True, rank_pattern={"head": 9}, alpha_pattern={"1.up": 3}
    ),
    "patterns that match nothing": case("mlp", "up", rank_pattern={"nowhere": 3}),
    "saved block": case("deep", "up", modules_to_save=["layers.1"]),
    # embeddings and transformers' Conv1D
    "conv1d": case("words", "mix"),
    "conv1d that is told": case("words", "mix", fan_in_fan_out=True),
    "embedding": case("words", "embed"),
    "embedding and conv1d": case("words", "embed", "mix", lora_dropout=0.2),
    "padded embedding": case("words with padding", "embed", "head"),
    "saved embedding": case("words with padding", "mix", modules_to_save=["embed"]),
    # convolutions
    "1d": case("image 1d", "conv"),
    "2d": case("image 2d", "conv"),
    "2d and linear": case("image 2d", "conv", "inner", lora_dropout=0.2),
    "2d without a bias": case("image 2d, no bias, strided", "conv"),
    "3d": case("image 3d", "conv", "head"),
    "1d of size 1": case("pixels 1d", "conv"),
    "2d of size 1": case("pixels 2d", "conv"),
    "3d of size 1": case("pixels 3d", "conv", merged_by_peft=False),
    "saved convolution": case("image 2d", "inner", modules_to_save=["conv"]),
    # DoRA
    "dora": _dora("mlp", "up"),
    "dora of two": _dora("mlp", "up", "down", lora_alpha=32),
    "dora with dropout": _dora("mlp", "up", "down", lora_dropout=0.3),
    "dora, stabilised, patterns": _dora(
        "mlp", "up", "down", use_rslora=True, rank_pattern={"up": 7}
    ),
    "dora of conv1d": _dora("words", "mix"),
    "dora of an embedding": _dora("words", "embed"),
    "dora of both": _dora("words", "embed", "mix", modules_to_save=["head"]),
    "dora of a padded embedding": _dora("words with padding", "embed"),
    "dora of 1d": _dora("image 1d", "conv"),
    "dora of 2d": _dora("image 2d", "conv", "inner"),
    "dora of 2d without a bias": _dora("image 2d, no bias, strided", "conv"),
    "dora of 3d": _dora("image 3d", "conv"),
    "dora of size 1": _dora("pixels 2d", "conv"),
    "dora of 3d of size 1": _dora("pixels 3d", "conv", merged_by_peft=False),
    # parameters
    "a parameter": case("products", target_parameters=["up.weight"]),
    "parameters": case("products", target_parameters=["weight"], rank_pattern={"up.weight": 2}),
    "a layer and a parameter": case("mlp", "up", target_parameters=["down.weight"]),
    "a stack": case("mixture", "head", target_parameters=["experts.stack"]),
    "a stack alone": case("mixture", target_parameters=["stack"], use_rslora=True),
    "attention's parameter": case("attention", target_parameters=["mha.in_proj_weight"]),
    "recurrent parameters": case(
        "recurrent", target_parameters=["gru.weight_ih_l0", "gru.weight_hh_l0"]
    ),
    "an embedding's parameter": case("words", target_parameters=["embed.weight"]),
    "a convolution's parameter": case("image 1d", target_parameters=["conv.weight"]),
    # decoders
    "decoder": case("llama", "q_proj", "v_proj", task_type="CAUSAL_LM"),
    "decoder, all linear": case("llama", target_modules="all-linear", lora_dropout=0.1),
    "decoder, one block": case("llama", "q_proj", "up_proj", layers_to_transform=[1]),
    "decoder, dora": _dora("llama", "o_proj", "gate_proj"),
    "decoder, embedding and head": case("llama", "embed_tokens", "lm_head"),
    "decoder, saved head": case("llama", "q_proj", modules_to_save=["lm_head", "norm"]),
    "decoder, tied embedding": case("tied", "embed_tokens", "q_proj", merged_by_peft=False),
    "decoder of Conv1D": case("gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
    "decoder of Conv1D, dora": _dora("gpt2", "c_attn", "wte", merged_by_peft=False),  # tied
    "decoder of experts": case(
        "mixtral",
        "q_proj",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
}

# Of AdaLoRA, whose tensors PEFT keeps in its own form.
ADALORA: dict[str, Case] = {
    "one layer": Case("mlp", {"target_modules": ["up"]}),
    "two layers": Case("mlp", {"target_modules": ["up", "down"], "lora_alpha": 9, "init_r": 5}),
    "conv1d": Case("words", {"target_modules": ["mix"], "lora_dropout": 0.2}),
    "saved beside": Case(
        "mlp with norms", {"target_modules": ["up"], "modules_to_save": ["after"]}
    ),
    "decoder": Case("llama", {"target_modules": ["q_proj", "down_proj"]}),
}
