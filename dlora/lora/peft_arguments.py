"""PEFT's arguments that `LoraConfig` has no field for: taken where they ask for nothing.

A user's habit `LoraConfig(bias="none", …)` works; a value that would have an effect in PEFT is
refused by its name, with what to use instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dlora.errors import UsageError

# PEFT's name → the value that means "not used"
UNUSED: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "ensure_weight_tying": False,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
_STARTS = dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"))
# Those that only an object has, and none of PEFT's files.
_OF_OBJECTS: dict[str, Any] = {
    **_STARTS,
    "inference_mode": False,
    "peft_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "runtime_config": None,
}
# Found by dlora itself, or only beside one of those above.
_NO_EFFECT = (
    *("fan_in_fan_out", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size"),
)
# Fields for which PEFT's default is None: nothing is named.
_NONE_IS_EMPTY = ("modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")
_INSTEAD = {
    "bias": "biases of the base stay frozen; train a whole module with modules_to_save",
    "lora_bias": "A and B have no biases here",
    "trainable_token_indices": "adapt the embedding (target_modules: embed_tokens), or train it "
    "whole with modules_to_save",
    "ensure_weight_tying": "name both tied modules",
    "inference_mode": "dlora.load_adapter loads an adapter, and model.eval() is for inference",
    "peft_type": "choose the class: dlora.LoraConfig, AdaLoraConfig or FloraConfig",
    "base_model_name_or_path": "pass it to dlora.save_adapter",
    "revision": "load the base at that revision",
    "lora_ga_config": "init_lora_weights: lora_ga has lora_ga_gamma; see "
    "dlora.start_from_gradients",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config"),
        "set init_lora_weights to true, gaussian, orthogonal, pissa, milora or lora_ga",
    ),
}


def check_unused(settings: Mapping[str, Any], unused: Mapping[str, Any] = UNUSED) -> None:
    """Raise a `UsageError` about a setting of PEFT's that dlora does not have and that is in use.

    Args:
        unused: the value of each name that asks for nothing; None and what is empty ask for nothing
            either.
    """
    for name in unused.keys() & settings.keys():
        if settings[name] not in (unused[name], None, [], {}):
            instead = _INSTEAD.get(name, "dlora does not have it")
            raise UsageError(f"{name}: {settings[name]!r} is not supported: {instead}")


def taken(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are fields of a settings class.

    Raises:
        UsageError: another one is no argument of PEFT's, or asks for something.
    """
    known = {field.name for field in fields(cls) if field.init}
    unused = UNUSED | _OF_OBJECTS
    for name in arguments.keys() - known - unused.keys() - set(_NO_EFFECT):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        raise UsageError(f"{cls.__name__}: there is no setting {name!r}; {hint}")
    check_unused(arguments, unused)
    empty = {name for name in _NONE_IS_EMPTY if arguments.get(name, "") is None}
    return {name: value for name, value in arguments.items() if name in known - empty}


class PeftArguments(type):
    """The class of settings classes: their calls take PEFT's arguments too."""

    if not TYPE_CHECKING:  # a type checker knows the fields alone

        def __call__(cls, *args: Any, **arguments: Any) -> Any:
            return super().__call__(*args, **taken(cls, arguments))
