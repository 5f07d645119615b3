"""The model card of a run's adapter: `README.md` in `adapter/`, as the Hugging Face hub reads it.

A card that somebody has changed is left alone: its last line has a hash of what the run wrote.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dlora.adapters.write import CONFIG
from dlora.config.load import Config
from dlora.io.files import read_object, write_atomically
from dlora.metrics.log import result_lines
from dlora.training.context import RunContext

CARD = "README.md"
UNKNOWN = "unknown"  # a licence, by the hub's word
_MARK = re.compile(r"\n<!-- written by dlora ([0-9a-f]{64}) -->\n\Z")
_PIPELINES = {"causal": "text-generation", "classification": "text-classification"}


def write_card(context: RunContext, where: Path) -> str | None:
    """Write the card beside an adapter that is just written; returns a line if it may not.

    Args:
        where: the adapter's directory.
    """
    path = where / CARD
    if path.exists() and not is_unchanged(path):
        return f"{path} was changed since a run wrote it, so it stays as it is"
    mixed = not (where / CONFIG).exists()  # experts, whose settings say the same of the base
    settings = read_object((where / "experts" / "0" if mixed else where) / CONFIG)
    write_atomically(path, marked(card(context, settings)).encode())
    return None


def marked(text: str) -> str:
    """A card with the line by which `is_unchanged` knows it."""
    return f"{text}\n<!-- written by dlora {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_unchanged(path: Path) -> bool:
    """Whether a card is as a run wrote it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    mark = _MARK.search(text)
    return mark is not None and marked(text[: mark.start()]) == text


def card(context: RunContext, settings: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        settings: of the adapter, PEFT's.
    """
    config, base = context.config, settings["base_model_name_or_path"]
    kinds = {name for name in ("use_dora", "use_rslora") if settings.get(name)}
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        license=licence_of(base),
        pipeline_tag=_PIPELINES.get(config.train.task),
        tags=["lora", "dlora", config.adapter.method, *sorted(k[4:] for k in kinds)],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {context.directory.absolute().name}",
        *_use(config, base),
        "## Training\n\n" + _table(_settings(context, settings)),
        "## Metrics\n\n" + _table(_metrics(context)),
    ]
    if data.license == UNKNOWN:
        parts.append(
            "The licence of the base applies to what is made of it: set `license` above before "
            "this is published, and `base_model` to the base's name on the hub."
        )
    return "\n\n".join(filter(None, parts)) + "\n"


def _use(config: Config, base: str) -> list[str]:
    """What it is, and how it is loaded."""
    if config.adapter.method == "mola":
        return [
            f"A mixture of LoRA experts of `{base}`, trained with dlora. Each directory in "
            "`experts/` is a plain LoRA for PEFT; `router.safetensors` mixes them token by token.",
            "## Use\n\n```python\nimport dlora\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'dlora.load_adapter(model, "path of this directory")\n```',
        ]
    use = (
        "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("path of this directory")\n```'
    )
    made = f"An adapter of `{base}` for PEFT, trained with dlora."
    return [made, use] if config.train.task == "causal" else [made]


def licence_of(base: str | None) -> str:
    """The licence that the card of a local base names; of any other it is not known here."""
    path = Path(base or "").expanduser() / CARD
    if not base or not path.is_file():
        return UNKNOWN
    try:
        return str(ModelCard.load(path, ignore_metadata_errors=True).data.license or UNKNOWN)
    except Exception:  # a card of another making: the parser raises what it likes
        return UNKNOWN


def _settings(context: RunContext, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    config, prepared = context.config, context.prepared
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"):
        if settings.get(name):
            yield name, settings[name]
    yield "method", config.adapter.method
    yield "init_lora_weights", config.adapter.init_lora_weights
    yield "base stored as", f"{config.model.dtype}, quantization {config.model.quantization}"
    yield "objective", config.train.objective
    for name in ("name", "lr", "schedule", "warmup_ratio", "weight_decay"):
        yield {"name": "optimizer"}.get(name, name), getattr(config.optimizer, name)
    steps, ended = prepared.sampler.total_steps, context.ended_at
    yield "optimizer steps", steps if ended is None else f"{ended} of {steps}"
    if (share := context.decisions.get("forget", {}).get("scale")) is not None:
        yield "scale", f"{share:g} of that in training (forget.action: shrink)"
    yield "sequences per step", config.train.global_batch_size
    yield "longest sequence", f"{config.data.max_length} tokens"
    yield "seed", config.train.seed
    yield "fingerprint of the data", prepared.train.fingerprint
    for name in ("dlora", "torch", "transformers"):
        yield name, importlib.metadata.version(name)


def _metrics(context: RunContext) -> Iterator[tuple[str, Any]]:
    lines = result_lines(context.directory, context.ended_at)
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if lines and lines[-1].get("loss") is not None:
        yield "loss of the last step", f"{lines[-1]['loss']:.4f}"
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        yield f"held-out loss at step {first['step']}", f"{first['eval_loss']:.4f}"
        for name in (key for key in last if key.startswith("eval_") and len(evaluated) > 1):
            word = "held-out loss" if name == "eval_loss" else name
            yield f"{word} at step {last['step']}", f"{last[name]:.4f}"


def _table(rows: Iterator[tuple[str, Any]]) -> str:
    shown = [
        f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |"
        for name, value in rows
    ]
    return "\n".join(["| | |", "|---|---|", *shown])
