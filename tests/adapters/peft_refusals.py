"""PEFT's settings that `attach` refuses, with the reason of each."""

from dataclasses import dataclass
from typing import Any

import peft


@dataclass(frozen=True)
class Refused:
    """PEFT's settings for a model that `attach` refuses.

    Attributes:
        shown: the settings and the layer, as the page names them.
        key: what the message begins with, after the class's name.
        why: the reason, as the page says it.
    """

    shown: str
    model: str
    settings: dict[str, Any]
    key: str
    why: str


def _up(**settings: Any) -> dict[str, Any]:
    return {"target_modules": ["up"], **settings}


_CONV: dict[str, Any] = {"target_modules": ["conv"]}
_EMBED: dict[str, Any] = {"target_modules": ["embed"]}
_START = "init_lora_weights"
_OTHER = "another method, with tensors of its own"
REFUSED: list[Refused] = [
    Refused(
        '`bias="all"`, `"lora_only"`',
        "mlp",
        _up(bias="lora_only"),
        "bias",
        "W0 is never trained, its biases included; `modules_to_save` trains a module",
    ),
    Refused(
        "`lora_bias=True`",
        "mlp",
        _up(lora_bias=True),
        "lora_bias",
        "ΔW = s·B·A has no bias, so a merge would have to change that of the base",
    ),
    Refused(
        "`trainable_token_indices`",
        "words",
        {"target_modules": ["mix"], "trainable_token_indices": {"embed": [0, 4]}},
        "trainable_token_indices",
        "adapt the embedding or save it; rows of W0 are never trained",
    ),
    Refused(
        "`init_lora_weights=False`",
        "mlp",
        _up(init_lora_weights=False),
        _START,
        "PEFT has it for tests: training would start at another model than the base",
    ),
    *(
        Refused(f'`init_lora_weights="{name}"`', "mlp", _up(init_lora_weights=name), _START, why)
        for name, why in {
            "pissa_niter_4": "an approximate SVD differs from machine to machine; `pissa` is exact",
            "olora": "it rewrites W0",
            "mica": "it trains A alone",
            "eva": "it starts from activations of a data set",
            "lora_ga": "its gradients are PEFT's; `dlora.start_from_gradients` has its own",
        }.items()
    ),
    Refused(
        "`kasa_config`",
        "mlp",
        _up(r=4, kasa_config=peft.KasaConfig()),
        "kasa_config",
        "it rewrites W0",
    ),
    Refused(
        "`velora_config`",
        "mlp",
        _up(velora_config=peft.VeloraConfig(num_groups=2)),
        "velora_config",
        _OTHER,
    ),
    Refused(
        "`monteclora_config`",
        "mlp",
        _up(monteclora_config=peft.MontecloraConfig(num_samples=2)),
        "monteclora_config",
        _OTHER,
    ),
    Refused(
        "`layer_replication`",
        "deep",
        _up(layer_replication=[(0, 2), (1, 3)]),
        "layer_replication",
        "W0 keeps its layers and their names",
    ),
    Refused(
        "`inference_mode=True`",
        "mlp",
        _up(inference_mode=True),
        "inference_mode",
        "it would train nothing; `load_adapter` loads an adapter",
    ),
    Refused(
        "`lora_alpha=0`, or below",
        "mlp",
        _up(lora_alpha=0),
        "lora_alpha",
        "the update would be nothing",
    ),
    Refused(
        "`lora_dropout=1`",
        "mlp",
        _up(lora_dropout=1.0),
        "lora_dropout",
        "no input would reach the adapter",
    ),
    Refused(
        "IA3, LoHa and other methods",
        "mlp",
        {"cls": peft.IA3Config, "target_modules": ["up"], "feedforward_modules": []},
        "peft_type",
        "LoRA, DoRA and AdaLoRA are taken",
    ),
    Refused(
        "a convolution in groups",
        "image in groups",
        {"r": 4, **_CONV},
        "target_modules",
        "W0 connects channels of one group, and PEFT's A all: no ΔW, and no merge in PEFT either",
    ),
    Refused(
        "a dilated convolution",
        "image dilated",
        _CONV,
        "target_modules",
        "the A of PEFT 0.21 is not dilated, so there is no ΔW (and no output of W0's size)",
    ),
    Refused(
        "a convolution that pads with other than zeros",
        "image reflected",
        _CONV,
        "target_modules",
        "the A of PEFT 0.21 sees zeros there, so what it merges is another model",
    ),
    Refused(
        "`nn.MultiheadAttention` as a target",
        "attention",
        {"target_modules": ["mha"]},
        "target_modules",
        "it calls no layer; `target_parameters: [mha.in_proj_weight]` is adapted as in PEFT",
    ),
    Refused(
        "the `out_proj` inside it",
        "attention",
        {"target_modules": ["out_proj"]},
        "target_modules",
        "it is never called: PEFT trains an adapter without effect",
    ),
    Refused(
        "an embedding with `max_norm`",
        "words of bounded norm",
        _EMBED,
        "target_modules",
        "each look-up would rewrite W0",
    ),
    Refused(
        "an embedding with `scale_grad_by_freq`",
        "words by frequency",
        _EMBED,
        "target_modules",
        "gradients would depend on how batches are divided over ranks",
    ),
    Refused(
        "`modules_to_save` with running statistics",
        "normed",
        _up(modules_to_save=["norm"]),
        "modules_to_save",
        "they would differ from rank to rank; of the base they are PEFT's",
    ),
]
