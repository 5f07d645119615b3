"""The auxiliary loss of routers: what the class itself adds to its loss, and its gradient."""

import copy
from typing import Any

import pytest
import torch
import transformers
from causal_models import VOCABULARY, randomize, randomize_trainable, relative_error
from refusals import refusal
from test_objectives_targets import FAMILIES, gradients, on_meta
from torch import nn

from dlora import LoraConfig, UsageError, attach
from dlora.base.eval_mode import keep_in_eval
from dlora.objectives import chunked_loss
from dlora.objectives.router_loss import find_router_loss, router_loss_of, whole_loss

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "output_router_logits": True,
}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", ROUTED | {"router_jitter_noise": 0.3}),
    "a coefficient of another name": (
        "JetMoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": 0.7, "kv_channels": 6},
    ),
    "some layers only": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.7,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
}
LENGTHS = [9, 4, 12]


def model_of(kind: str) -> Any:
    family, settings = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    )
    randomize(model)
    attach(model, LoraConfig(r=2))
    randomize_trainable(model)
    return model


@pytest.mark.parametrize(
    ("kind", "recomputed"),
    [*((kind, False) for kind in KINDS), ("mixtral", True), ("some layers only", True)],
)
def test_loss_and_gradient_are_those_of_the_class(kind: str, recomputed: bool) -> None:
    plain = model_of(kind).eval()
    model = copy.deepcopy(plain)
    ids = torch.randint(1, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask, -100)
    own = plain(ids, attention_mask=mask.long(), labels=labels)
    own.loss.backward()

    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    keep_in_eval(model)
    chunked_loss.install(model)
    model.train()
    targets = labels.roll(-1, 1)
    targets[:, -1] = -100
    tokens = int((targets != -100).sum())
    summed = model(input_ids=ids, targets=targets, lengths=LENGTHS)
    whole, reported = whole_loss(model, summed, tokens)
    (whole / tokens).backward()
    assert relative_error(reported["aux_loss"] / tokens, own.aux_loss) < 1e-6
    assert relative_error(whole / tokens, own.loss) < 1e-6
    reference = gradients(plain)
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, reference[name]) < 1e-6, name


def test_a_pass_without_sequences_adds_nothing() -> None:
    model = model_of("mixtral")
    chunked_loss.install(model)
    targets = torch.full((1, 8), -100)
    summed = model(input_ids=torch.zeros_like(targets), targets=targets, lengths=[])
    whole, reported = whole_loss(model, summed, 0)
    whole.backward()
    assert float(whole.detach()) == float(reported["aux_loss"]) == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    "changed", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}]
)
def test_there_is_none_where_the_configuration_asks_for_none(changed: dict[str, Any]) -> None:
    config = transformers.MixtralConfig(**SIZES | ROUTED | changed)
    model = transformers.MixtralForCausalLM(config)
    chunked_loss.install(model)
    assert router_loss_of(model) is None
    loss = torch.ones(())
    assert whole_loss(model, loss, 3) == (loss, {"loss": loss})


class Foreign(transformers.MixtralForCausalLM):
    """A forward of its own, whose auxiliary loss nobody knows."""

    def forward(self, input_ids: Any = None, output_router_logits: Any = None) -> Any:
        aux_loss = 0.0
        return (aux_loss,)


def test_one_that_is_not_known_is_refused() -> None:
    said = refusal(find_router_loss, Foreign(transformers.MixtralConfig(**SIZES | ROUTED)))
    assert said.startswith("model.path: output_router_logits is set, but how Foreign computes")


def test_every_family_with_an_auxiliary_loss_is_known() -> None:
    """Of the causal families of transformers: a newer one that computes it otherwise shows here."""
    known, refused = [], []
    for config_class in FAMILIES:
        if not hasattr(config_class, "output_router_logits"):
            continue
        model: nn.Module | None = on_meta(config_class)
        if model is None or (model.config.model_type == "doge"):  # type: ignore[union-attr]
            continue
        model.config.output_router_logits = True  # type: ignore[union-attr]
        try:
            if find_router_loss(model) is not None:
                known.append(type(model).__name__)
        except UsageError as error:
            refused.append(str(error))
    assert not refused
    assert {"MixtralForCausalLM", "JetMoeForCausalLM", "PhimoeForCausalLM"} <= {*known}
