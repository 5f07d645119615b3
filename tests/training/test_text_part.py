"""Text chats with a model that takes images too: what is adapted, and what is said of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import randomize
from refusals import preparation
from run_training import Runs, told
from tiny import VOCABULARY, tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from dlora.training.watchdogs import STEPS_TO_BE_USED_IN, UnusedWatch

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Gemma 3 with its vision tower, as its wrapper class saves it."""
    directory = tmp_path_factory.mktemp("models") / "gemma3"
    text = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_SIZES, **text, pad_token_id=VOCABULARY - 1),
        vision_config=SiglipVisionConfig(**_SIZES, image_size=8, patch_size=4),
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 2,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def test_all_linear_adapts_the_text_part_alone(
    words: Any, with_vision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = preparation(words(tmp_path / "run", model__path=with_vision))
    said = capsys.readouterr().out
    assert (
        "adapter.target_modules: all-linear adapts the text part alone (model.language_model)"
        in said
    )
    assert "15 linear layers elsewhere are left alone (model.vision_tower)" in said
    assert prepared.unreached == ()
    assert prepared.budget.trainable == sum(
        4 * (m + n)
        for m, n in 2 * [(32, 32), (16, 32), (16, 32), (32, 32), *2 * [(40, 32)], (32, 40)]
    )


def test_named_layers_of_the_vision_tower_do_not_end_the_run(run: Runs, with_vision: str) -> None:
    """As in PEFT a name means all layers that end with it; those of images stay as they began."""
    results, lines = run(
        "run",
        1,
        model__path=with_vision,
        work=told,
        adapter__target_modules=["q_proj"],
        train__max_steps=STEPS_TO_BE_USED_IN + 1,
        train__global_batch_size=2,
    )
    ended, said = results[0]
    assert ended["status"] == 0 and len(lines) == STEPS_TO_BE_USED_IN + 1
    assert "adapter.target_modules: 2 of 4 adapted modules are outside the text part" in said
    trained = {name: bool(t.any()) for name, t in ended["tensors"].items() if "lora_B" in name}
    assert {name for name, moved in trained.items() if moved} == {
        name for name in trained if "language_model" in name
    }


def watched(used: set[str], named: list[str], expected: tuple[str, ...] = ()) -> str | None:
    watch = UnusedWatch(allowed=False, expected=expected)
    tensors = {name: torch.zeros(1) for name in named}
    said = [watch.see(tensors, {n: n in used for n in named}) for _ in range(STEPS_TO_BE_USED_IN)]
    assert said[:-1] == [None] * (STEPS_TO_BE_USED_IN - 1)
    return said[-1]


def test_an_expert_that_no_token_was_sent_to_does_not_end_the_run() -> None:
    experts = [f"layers.0.mlp.experts.{i}.w1.lora_A" for i in range(3)]
    other = "layers.1.self_attn.q_proj.lora_A"
    assert watched({experts[0], other}, [*experts, other]) is None
    # None of them, or a layer of the model's own list: nothing would ever train it.
    assert "layers.0.mlp.experts.0" in str(watched({other}, [*experts, other]))
    assert other in str(watched(set(experts), [*experts, other]))
    assert watched(set(experts), [*experts, other], expected=("layers.1",)) is None
