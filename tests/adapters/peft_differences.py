"""What comes out otherwise than in PEFT: refused settings, differences, and what needs named
adapters. `docs/beside_peft.md` shows these tables; `rows` renders them.
"""

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


@dataclass(frozen=True)
class Difference:
    """Attributes: the case; what PEFT does; what dlora does; the reason."""

    what: str
    in_peft: str
    here: str
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

DIFFERENCES: dict[str, Difference] = {
    "the model": Difference(
        "the model",
        "is wrapped in a `PeftModel`, its layers in `lora.Linear`",
        "stays the object that it was, and its layers too: `AdaptedLinear` is an `nn.Linear`",
        "names of W0, hooks and wrapping policies go on working",
    ),
    "state_dict": Difference(
        "`state_dict()`",
        "has `base_model.model.up.base_layer.weight`",
        "has `up.weight`, and `up.adapter.lora_A` beside it",
        "a base checkpoint loads as before; files have PEFT's keys",
    ),
    "seed": Difference(
        "A from a seed",
        "draws A and B, then draws A again",
        "draws A once, from the same distribution",
        "B starts at 0 in both",
    ),
    "dropout": Difference(
        "`lora_dropout` in training",
        "has masks of torch's generator",
        "has masks of its own; none in eval mode, as in PEFT",
        "a sequence has its mask on any number of ranks",
    ),
    "half": Difference(
        "a base in float16 or bfloat16",
        "computes x·A·B in float32 and rounds the sum",
        "computes all in the base's dtype; A, B and their gradients are float32 in both",
        "half the memory traffic; the outputs differ by rounding",
    ),
    "saved in half": Difference(
        "`modules_to_save` of such a base",
        "trains a copy in the base's dtype",
        "trains a float32 copy",
        "small steps are not rounded away",
    ),
    "unmerge in half": Difference(
        "unmerging such a base",
        "subtracts ΔW, which leaves rounding in W0",
        "puts W0 back, bit for bit",
        "W0 is never rewritten; it costs a copy meanwhile",
    ),
    "tied": Difference(
        "merging one of two tied weights",
        "changes both, so the output changes",
        "changes the adapted one alone",
        "a merged model computes what it did before",
    ),
    "pixels": Difference(
        "merging a 3-d convolution of size 1",
        "fails",
        "merges",
        "ΔW is one product for every kernel",
    ),
    "safe merge": Difference(
        "merging what is not finite",
        "raises with `safe_merge=True` alone",
        "raises always, before anything is merged",
        "nothing is broken silently",
    ),
    "disabled": Difference(
        "`disable_adapter()` of a merged model",
        "unmerges it, and leaves it so",
        "is refused: unmerge first",
        "a context leaves the model as it was",
    ),
    "unload": Difference(
        "`merge_and_unload()`, `unload()`",
        "return the base",
        "are refused",
        "adapters stay; `merge_adapter()` merges in place, `dlora export --merge` into files",
    ),
    "unknown name": Difference(
        "a name that matches nothing, beside one that does",
        "is ignored",
        "is ignored with a warning; `dlora.LoraConfig` refuses it",
        "a typing error is seen",
    ),
    "saved alone": Difference(
        "`modules_to_save` without a target",
        "is refused",
        "is trained",
        "PEFT's own file format has a word for it",
    ),
    "sparse": Difference(
        "an embedding with `sparse=True`",
        "fails in backward",
        "has dense gradients of A",
        "A is as dense as the update",
    ),
    "all-linear": Difference(
        "`all-linear` around an `nn.MultiheadAttention`",
        "trains an adapter of `out_proj` without effect",
        "leaves it alone, with a warning",
        "nothing is trained in vain",
    ),
    "patterns": Difference(
        "`rank_pattern` with keys that overlap, in the file",
        "sorts the keys, so that another one may come first: PEFT's file does not load",
        "keeps their order",
        "the first match counts",
    ),
    "embedding copies": Difference(
        "the file of an adapted `embed_tokens`",
        "has a copy of W0",
        "has none; a copy in PEFT's file is compared with the base",
        "W0 is never saved",
    ),
    "pickle": Difference(
        "`save_pretrained(safe_serialization=False)`",
        "writes a pickle",
        "is refused",
        "nothing is pickled",
    ),
    "keyword": Difference(
        "a layer that the model calls as `layer(input=x)`",
        "fails once it is adapted",
        "works as before",
        "it is the layer's own argument",
    ),
}

# Calls of PEFT's tests that need several adapters in one model, with what each says until then.
WITH_L: dict[str, str] = {
    "`add_adapter(name, config)`": "add_adapter",
    "`load_adapter(directory, name)` of another name": "load_adapter",
    "`set_adapter(name)`": "set_adapter",
    "`delete_adapter(name)`": "delete_adapter",
    "`merge_adapter([name, …])`": "merge_adapter",
    "`add_weighted_adapter(…)`": "add_weighted_adapter",
    "`attach` on a model with an adapter": "attach",
}


def rows() -> list[str]:
    """The rows of the page's tables, in their order."""
    found = [f"| {d.what} | {d.in_peft} | {d.here} | {d.why} |" for d in DIFFERENCES.values()]
    found += [f"| {r.shown} | `{r.key}` | {r.why} |" for r in REFUSED]
    return [*found, *(f"| {call} |" for call in WITH_L)]
