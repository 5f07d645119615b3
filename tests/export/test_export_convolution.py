"""`dlora.export` of an adapted convolution: that of a model that looks at pictures."""

from pathlib import Path

import peft
import pytest
import torch
from causal_models import randomize, randomize_trainable, relative_error
from exported import loaded, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3Config

from dlora.export.command import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TARGETS = ["patch_embedding", "o_proj"]
IMAGE = 40  # the token in whose places a picture is seen
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Gemma3Config(
        text_config=SIZES | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50},
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )
    directory = tmp_path_factory.mktemp("gemma") / "model"
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.tensor([[3, 4, *[IMAGE] * 4, 5]])
    torch.manual_seed(1)
    picture = {"pixel_values": torch.randn(1, 3, 8, 8), "token_type_ids": (ids == IMAGE).long()}
    return model(input_ids=ids, **picture).logits


def check_exported(words: list[str], wanted: Tensor, base: Path, to: Path) -> None:
    """Merged, and as a plain adapter."""
    assert main([*words, "--to", str(to / "merged"), "--merge"]) == 0
    assert main([*words, "--to", str(to / "plain")]) == 0
    assert relative_error(logits(loaded(base)), wanted) > 0.01
    assert relative_error(logits(loaded(to / "merged")), wanted) < 1e-5
    plain = peft.PeftModel.from_pretrained(loaded(base), to / "plain")
    assert relative_error(logits(plain), wanted) < 1e-6


def test_an_adapter_that_peft_wrote_is_merged_and_exported(base: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(loaded(base), peft.LoraConfig(r=4, target_modules=TARGETS)).eval()
    randomize_trainable(model)
    model.save_pretrained(tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--base", str(base)]
    check_exported(words, logits(model), base, tmp_path)


def test_a_checkpoint_of_flora_is_merged_and_exported(base: Path, tmp_path: Path) -> None:
    """Its kernel in four factors, its core beside P_in or P_out."""
    ranks = {"r": 4, "flora_r_out": 3, "flora_kernel_r": 2}
    settings = {"method": "flora", "target_modules": TARGETS} | ranks
    checkpoint, live = write_checkpoint(base, tmp_path / "run", **settings)
    check_exported(["--adapter", str(checkpoint)], logits(live), base, tmp_path)
