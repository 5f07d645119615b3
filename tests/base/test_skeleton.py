"""The base as its files and its class make it: ties, dtypes and attention of `from_pretrained`."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import loss_of, save_tiny
from hostile import edit_json
from ranks import Pools
from refusals import preparation, refusal
from safetensors.torch import load_file, save_file
from tiny import command, whole
from transformers import AutoModelForCausalLM

from dlora import LoraConfig, attach, save_adapter
from dlora.base.loading import BaseWeights
from dlora.base.model import find_base
from dlora.base.quantize import quantize
from dlora.export.command import main as export
from dlora.generate import main as generate
from dlora.lora.attach import trainable_parameters
from dlora.plan.command import main as plan
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.topology import Topology, resolve_placement

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def loaded_loss(path: str, dtype: str, engine: str, quantization: str = "none") -> float:
    """Of the base as an engine reads it over all ranks."""
    topology = Topology.current()
    built = build_engine(resolve_placement(engine, "world", topology), topology)
    base = find_base(path, dtype=dtype, quantization=quantization)
    model = base.load(built, torch.device("cpu"))
    built.shard(model, ignored=(), device=None)
    built.after_load(model)
    return loss_of(model)


def shapes_agree(path: Path, dtype: str) -> Any:
    """The skeleton, whose tensors have names, dtypes and ties of the model in memory."""
    skeleton, model = find_base(str(path), dtype=dtype).skeleton(), whole(path, dtype)
    for ours, theirs in zip(skeleton.state_dict().items(), model.state_dict().items(), strict=True):
        assert (ours[0], ours[1].dtype) == (theirs[0], theirs[1].dtype)
    assert len(list(skeleton.parameters())) == len(list(model.parameters()))
    return skeleton


# -- tied in the configuration, two in the files ---------------------------------------------------


WIDE = {"hidden_size": 64, "intermediate_size": 64}  # rows that divide into blocks of 64


def with_head(
    directory: Path, kind: str, other: bool = True, rows: slice = slice(None), **sizes: int
) -> Path:
    """A base whose configuration ties the head, and whose files have one: other, or the same."""
    save_tiny(
        directory, kind, **({"tie_word_embeddings": True} if kind == "llama" else {}), **sizes
    )
    tensors = load_file(directory / "model.safetensors")
    [embedding] = [key for key in tensors if key.endswith(EMBEDDING.removeprefix("model."))]
    head = tensors[embedding].clone()
    if other:
        head[rows] += 0.1 * torch.randn(head.shape, generator=torch.manual_seed(5))[rows]
    save_file(tensors | {HEAD: head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("rows", [slice(None), slice(3)], ids=["all rows", "rows of one rank"])
def test_two_matrices_stay_two(pools: Pools, tmp_path: Path, engine: str, rows: slice) -> None:
    base = with_head(tmp_path / "base", "llama", rows=rows)
    wanted = loss_of(whole(base))
    tied = AutoModelForCausalLM.from_pretrained(with_head(tmp_path / "tied", "llama", other=False))
    assert abs(loss_of(tied) - wanted) > 1e-3
    assert pools(2).run(loaded_loss, str(base), "float32", engine) == pytest.approx([wanted] * 2)
    shapes_agree(base, "float32")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_two_matrices_of_a_packed_base(tmp_path: Path, quantization: str) -> None:
    base = with_head(tmp_path / "base", "llama", **WIDE)
    model = whole(base)
    quantize(model, quantization)
    assert loaded_loss(str(base), "float32", "fsdp2", quantization) == pytest.approx(loss_of(model))


def test_equal_matrices_are_one(tmp_path: Path) -> None:
    """Equal in the dtype in which they are loaded, as transformers compares them."""
    skeleton = shapes_agree(with_head(tmp_path / "equal", "llama", other=False), "float32")
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    base = with_head(tmp_path / "nearly", "llama", other=False)
    tensors = load_file(base / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
    tensors[HEAD] = tensors[EMBEDDING] * (1 + 1e-6)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert HEAD in shapes_agree(base, "bfloat16").all_tied_weights_keys
    assert HEAD not in shapes_agree(base, "float32").all_tied_weights_keys


def test_many_files_and_a_composite_configuration(tmp_path: Path) -> None:
    base = with_head(tmp_path / "one", "gemma3")
    model = whole(base)
    wanted, many = loss_of(model), tmp_path / "many"
    model.save_pretrained(many, max_shard_size="25KB")
    edit_json(many / "config.json", tie_word_embeddings=True)
    assert loss_of(whole(many)) == wanted
    for path in (base, many):
        shapes_agree(path, "float32")
        assert loaded_loss(str(path), "float32", "fsdp2") == wanted


def adapter_of(base: Path, directory: Path, targets: list[str]) -> Path:
    model = attach(whole(base), LoraConfig(r=2, target_modules=targets))
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, 0, 0.3)
    save_adapter(model, directory, base_model_name_or_path=str(base))
    return directory


def test_a_merge_has_both_matrices(tmp_path: Path) -> None:
    base = with_head(tmp_path / "base", "llama")
    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        adapter = adapter_of(base, tmp_path / "adapter", targets)
        wanted = loss_of(peft.PeftModel.from_pretrained(whole(base), adapter))
        merged = tmp_path / f"merged{len(targets)}"
        assert export(["--adapter", str(adapter), "--to", str(merged), "--merge"]) == 0
        assert loss_of(whole(merged)) == pytest.approx(wanted, abs=1e-5)
        assert whole(merged).config.tie_word_embeddings is False


# -- tensors that a class pins to float32 ----------------------------------------------------------

PINNED = {"deepseek_v3": "e_score_correction_bias", "ernie4_5_moe": "mlp.(gate|moe_statics)"}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", [*PINNED, "nemotron_h", "mamba"])
def test_pinned_tensors_are_float32(pools: Pools, tmp_path: Path, kind: str, engine: str) -> None:
    base = save_tiny(tmp_path / kind, kind)
    wanted = loss_of(whole(base, "bfloat16"))
    assert pools(2).run(loaded_loss, str(base), "bfloat16", engine) == [wanted] * 2
    shapes_agree(base, "bfloat16")


@pytest.mark.parametrize("kind", PINNED)
def test_pinned_tensors_of_a_packed_and_of_a_merged_base(tmp_path: Path, kind: str) -> None:
    base = save_tiny(tmp_path / kind, kind, **WIDE)
    model = whole(base, "bfloat16")
    quantize(model, "int8")
    assert loaded_loss(str(base), "bfloat16", "fsdp2", "int8") == loss_of(model)
    adapter = adapter_of(base, tmp_path / "adapter", ["o_proj"])
    argv = ["--adapter", str(adapter), "--to", str(tmp_path / "merged"), "--merge"]
    assert export([*argv, "--dtype", "bfloat16"]) == 0
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    wide_ones = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide_ones and all(re.search(PINNED[kind], key) for key in wide_ones)


def test_integers_of_a_base_are_read(tmp_path: Path) -> None:
    """DeepSeek-V4 stores a table from tokens to experts."""
    base = save_tiny(tmp_path / "base", "deepseek_v4")
    weights = BaseWeights(find_base(str(base), dtype="float32"))
    [(name, table)] = [
        (n, t) for n, t in whole(base).state_dict().items() if t.dtype == torch.int64
    ][:1]
    read = torch.empty(table.shape, dtype=torch.int64)
    weights.read(name, 0, read.view(-1))
    assert torch.equal(read, table)


# -- attention -------------------------------------------------------------------------------------

NO_SDPA = ["bloom", "gptj", "gpt_neo", "codegen", "mpt", "xglm", "gpt_oss"]


@pytest.mark.parametrize("kind", NO_SDPA)
def test_a_class_without_sdpa_needs_no_option(tmp_path: Path, kind: str, capsys: Any) -> None:
    base = save_tiny(tmp_path / "base", kind)
    assert loaded_loss(str(base), "float32", "fsdp2") == loss_of(whole(base))
    adapter = tmp_path / "adapter"
    model = attach(whole(base), LoraConfig(r=2))
    save_adapter(model, adapter, base_model_name_or_path=str(base))
    assert export(["--adapter", str(adapter), "--to", str(tmp_path / "plain")]) == 0
    words = ["--adapter", str(adapter), "--prompt", "one", "--max-new-tokens", "2"]
    assert generate(words) == 0
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    prepared = preparation(command(base, tmp_path), check=True)
    assert prepared.budget.trainable == 2 * trained  # r is twice as large
    assert plan(["--gpus-per-node", "1", *command(base, tmp_path)]) == 0


REFUSED = {
    "sdpa": ("bloom", "BloomForCausalLM does not support sdpa; auto takes eager"),
    "flash_attention_2": ("llama", "flash_attention_2 cannot be used: "),
    "flex_attention": ("llama", "flex_attention has no backward pass on a CPU"),
    "flash_attention_3": ("bloom", "BloomForCausalLM does not support flash_attention_3"),
}


@pytest.mark.parametrize("value", REFUSED)
def test_attention_that_cannot_act_is_refused_in_a_line(tmp_path: Path, value: str) -> None:
    kind, wanted = REFUSED[value]
    base = save_tiny(tmp_path / "base", kind)
    (base / "model.safetensors").unlink()  # before a weight is read
    words = command(base, tmp_path, model__attn_implementation=value, model__dtype="bfloat16")
    message = refusal(preparation, words, check=True)
    assert message.startswith(f"model.attn_implementation: {wanted}")
    assert len(message) < 200


def test_a_plan_needs_no_kernels_of_this_machine(tmp_path: Path, capsys: Any) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    words = [
        "--model.path",
        str(base),
        "--data.train",
        "x",
        "--output.dir",
        "y",
        "--gpus-per-node",
        "1",
    ]
    assert plan([*words, "--model.attn_implementation", "flash_attention_2"]) == 0
    base = save_tiny(tmp_path / "other", "bloom")
    words[1] = str(base)
    message = refusal(plan, [*words, "--model.attn_implementation", "flash_attention_2"])
    assert message.startswith("model.attn_implementation: BloomForCausalLM does not support")
