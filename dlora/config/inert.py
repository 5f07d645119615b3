"""Options that do nothing beside certain others, with the reason.

What a method, an optimizer, … leaves unused is declared in its file, see `dlora.registry.Part`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dlora.config.sections import Config, record_format, value_of


def _is_gguf(c: Config) -> bool:
    return c.model.path.endswith(".gguf")


def _converts(c: Config) -> bool:
    """Whether a base, or a teacher that is another one, is a .gguf file."""
    return _is_gguf(c) or str(value_of(c, "distill.teacher")).endswith(".gguf")


def _is_local(c: Config) -> bool:
    return _is_gguf(c) or os.path.isdir(os.path.expanduser(c.model.path))


def _logs(c: Config) -> bool:
    """Whether any line of the metrics is written: evaluated steps always are."""
    return c.output.log_every > 0 or (c.output.eval_every > 0 and _evaluates(c))


def _evaluates(c: Config) -> bool:
    """Whether there is anything to evaluate on."""
    return c.data.eval is not None or c.forget.data is not None


# (options, when they do nothing, why): a value other than the default is refused then.
INERT: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("model.revision", _is_local, "model.path is local"),
    ("model.cache_dir", lambda c: not _converts(c), "only a .gguf base is converted"),
    ("model.trust_remote_code", _is_gguf, "a .gguf file contains no code"),
    (
        "adapter.r adapter.lora_alpha adapter.target_modules adapter.use_rslora adapter.use_dora "
        "adapter.init_lora_weights adapter.rank_pattern adapter.alpha_pattern "
        "adapter.modules_to_save adapter.target_parameters adapter.exclude_modules "
        "adapter.layers_to_transform adapter.layers_pattern",
        lambda c: c.adapter.path is not None,
        "the adapter at adapter.path sets it",
    ),
    (
        "adapter.r adapter.lora_alpha adapter.target_modules adapter.use_rslora "
        "adapter.rank_pattern adapter.alpha_pattern adapter.exclude_modules "
        "adapter.layers_to_transform adapter.layers_pattern",
        lambda c: bool(c.adapter.experts_from),
        "the experts at adapter.experts_from set it",
    ),
    (
        "output.eval_every",
        lambda c: not _evaluates(c) and c.output.eval_every != 0,  # 0 asks for nothing
        "data.eval is null",
    ),
    ("forget.data", lambda c: c.output.eval_every == 0, "output.eval_every is 0"),
    (
        "forget.max_kl forget.max_nll_ratio forget.action",
        lambda c: c.forget.data is None,
        "forget.data is null",
    ),
    (
        "forget.action",
        lambda c: c.forget.data is not None and not c.forget.gates,
        "neither forget.max_kl nor forget.max_nll_ratio is set",
    ),
    (
        "data.chat_template data.chat_template_kwargs",
        lambda c: c.data.format == "text",
        "data.format: text has no chats",
    ),
    (
        "data.chat_template data.chat_template_kwargs",
        lambda c: record_format(c) == "labelled",
        "train.task reads plain texts",
    ),
    (
        "dpo.label_smoothing",
        lambda c: value_of(c, "dpo.loss_type") in ("hinge", "ipo"),
        "dpo.loss_type is neither sigmoid nor robust",
    ),
    (
        "distill.teacher_quantization",
        lambda c: value_of(c, "distill.teacher") == "base",
        "distill.teacher is base, which is packed as model.quantization says",
    ),
    ("train.compile_cache", lambda c: c.train.compile is False, "train.compile is false"),
    ("data.max_eval_samples", lambda c: c.data.eval is None, "data.eval is null"),
    ("data.shuffle_window", lambda c: not c.data.shuffle, "data.shuffle is false"),
    (
        "data.cache_dir",
        lambda c: c.data.streaming and c.data.eval is None,
        "data.streaming reads the files anew, and data.eval is null",
    ),
    (
        "data.streaming",
        lambda c: isinstance(c.data.train, str) and c.data.train.startswith("builtin:"),
        "a builtin data set is in memory anyway",
    ),
    (
        "output.eval_metrics output.keep_best output.early_stopping",
        lambda c: c.data.eval is None or c.output.eval_every == 0,
        "there are no evaluations (data.eval, output.eval_every)",
    ),
    (
        "output.eval_prompts output.eval_max_new_tokens",
        lambda c: not c.output.eval_metrics,
        "output.eval_metrics is empty",
    ),
    ("output.report_to output.metrics_port", lambda c: not _logs(c), "no step is logged"),
    ("output.resume_force", lambda c: c.output.resume == "none", "output.resume is none"),
)
