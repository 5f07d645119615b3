"""Bases in many small files, and adapters for them by PEFT, by dlora and in a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny import MODELS, tokenizer
from tiny import whole as loaded
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model, MistralConfig, MixtralConfig

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.adapters.settings import lora_config
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.writing import write
from dlora.config.load import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    dump_yaml,
)
from dlora.lora.attach import trainable_parameters
from dlora.sharding.replica.optimizer_state import states_of
from dlora.sharding.replica.replica import Replica
from dlora.sharding.topology import Topology

IDS = torch.arange(3, 200, 7)[None]
SHAPES = MODELS | {
    "mistral": lambda: MistralConfig(**MODELS["llama"]().to_diff_dict() | {"sliding_window": 8}),
    "gpt2-bare": MODELS["gpt2"],
    "mixtral": lambda: MixtralConfig(
        **MODELS["mixtral"]().to_diff_dict() | {"intermediate_size": 64}
    ),
}


@dataclass(frozen=True)
class Case:
    """A base, and what is adapted and trained of it."""

    base: str
    targets: str | list[str]
    saved: tuple[str, ...] = ()
    dora: bool = False
    untied: bool = False  # PEFT would change both sides of a tied weight when it merges

    def __str__(self) -> str:
        targets = [self.targets] if "all" in self.targets else self.targets
        return "-".join([self.base, *targets, *(["dora"] if self.dora else [])])


class Bases:
    """`bases(name)`: a random base in many small files, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = self.root / f"{name}-{dtype}"
        if directory.exists():
            return directory
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
        if name == "gpt2-bare":  # as on the hub: keys `h.0…`, no output head
            bare = GPT2Model(model.config)
            bare.load_state_dict(model.transformer.state_dict())
            model = bare
        model.save_pretrained(directory, max_shard_size="25KB")
        tokenizer().save_pretrained(directory)
        assert (directory / "model.safetensors.index.json").exists()
        return directory


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def made_by_peft(base: Path, case: Case, directory: Path) -> Path:
    """An adapter that stock PEFT wrote, with all of it random."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=case.targets,
        modules_to_save=list(case.saved) or None,
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 3} if "q_proj" in case.targets else {},
        use_dora=case.dora,
        use_rslora=case.base == "mistral",
        fan_in_fan_out=case.base.startswith("gpt2"),
    )
    model = peft.get_peft_model(loaded(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 1.0 if "ln_f" in name or "norm" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def load_live(base: Path, adapter: Path) -> nn.Module:
    """The base with the adapter that stands in `adapter`, by dlora; without PEFT's copies of W0."""
    clean = adapter.with_name("clean")
    clean.mkdir(exist_ok=True)
    (clean / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "base_layer" not in key}
    save_file(kept, clean / "adapter_model.safetensors")
    return load_adapter(loaded(base), clean).eval()


def run_config(base: Path, root: Path, **adapter: Any) -> Config:
    """Of a run on `base` that writes to `root`."""
    return Config(
        model=ModelConfig(path=str(base), dtype="float32"),
        adapter=AdapterConfig(**adapter),
        data=DataConfig(train="gone.jsonl"),
        output=OutputConfig(dir=str(root)),
    )


def write_checkpoint(base: Path, root: Path, **adapter: Any) -> tuple[Path, nn.Module]:
    """A checkpoint of a run on `base`, and the live model as it was then."""
    usual = {"r": 3, "target_modules": ["v_proj", "up_proj"], "modules_to_save": ["norm"]}
    config = run_config(base, root, **(adapter or usual))
    model = attach_random(loaded(base), lora_config(config))
    replica = Replica(Topology.current())
    replica.own(trainable_parameters(model))
    optimizer = torch.optim.AdamW(replica.named.values())
    states = {"optimizer": states_of(optimizer, replica.optimized)}
    content = capture(replica, states, {"step": 7})
    assert content is not None
    return write(content, root / "checkpoints", dump_yaml(config), 2), model


def attach_random(model: nn.Module, config: LoraConfig, std: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    attach(model, config)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, 0, std)
    return model.eval()


def plain_adapter(bases: Bases, directory: Path) -> Path:
    model = attach_random(loaded(bases("llama")), LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, directory, base_model_name_or_path=str(bases("llama")))
    return directory
