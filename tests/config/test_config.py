"""The contract's section 2: defaults, strictness, and one line for every mistake."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from refusals import refusal

from dlora.config import load as config_module
from dlora.config.inert import INERT
from dlora.config.load import (
    SCHEMA,
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    dump_yaml,
    load,
    parse,
    to_dict,
    validate,
    value_of,
)
from dlora.config.options import Given, convert
from dlora.registry import ROOMS, Option, option, plain, room
from dlora.registry.options import members

REQUIRED = "model: {path: org/base}\ndata: {train: train.jsonl}\noutput: {dir: runs/x}\n"

# The block of the contract, without its comments, and with the three required values of REQUIRED.
CONTRACT = """
model: {path: org/base, revision: null, trust_remote_code: false, cache_dir: ~/.cache/dlora,
  dtype: bfloat16, quantization: none, attn_implementation: auto}
adapter: {method: lora, path: null, r: 16, lora_alpha: 32, lora_dropout: 0.0,
  target_modules: all-linear, use_rslora: false, use_dora: false, init_lora_weights: true,
  rank_pattern: {}, alpha_pattern: {}, modules_to_save: [], init_r: 12, target_r: 8, tinit: 0,
  tfinal: 0, deltaT: 1, beta1: 0.85, beta2: 0.85, orth_reg_weight: 0.5}
sharding: {engine: fsdp2, base: auto, activation_checkpointing: false, memory_budget_gb: null,
  timeout_seconds: 600}
data: {train: train.jsonl, eval: null, format: chat, max_length: 1024, shuffle: true,
  packing: auto}
optimizer: {name: adamw, lr: 2.0e-4, loraplus_lr_ratio: 1.0, weight_decay: 0.0, schedule: cosine,
  warmup_ratio: 0.03, max_grad_norm: 1.0}
train: {objective: sft, max_steps: 200, epochs: null, global_batch_size: 32, micro_batch_size: 4,
  seed: 0}
output: {dir: runs/x, log_every: 1, eval_every: 50, save_every: 50, keep_last: 2, resume: auto,
  stop_file: null, resume_force: false, tensorboard: true}
"""

ADDED = {  # change nothing
    ("sharding", "ranks_per_node"): None,
    ("sharding", "optimizer_state"): "auto",
    ("sharding", "cpu_offload"): False,
    ("sharding", "reduce_dtype"): None,
    ("sharding", "audit"): "stop",
    ("sharding", "loading_timeout_seconds"): 3600,
    ("adapter", "target_parameters"): [],
    ("adapter", "exclude_modules"): None,
    ("adapter", "layers_to_transform"): None,
    ("adapter", "layers_pattern"): None,
    ("train", "task"): "causal",
    ("dpo", "beta"): 0.1,
    ("dpo", "loss_type"): "sigmoid",
    ("dpo", "label_smoothing"): 0.0,
    ("dpo", "sft_weight"): 0.0,
    ("dpo", "kl_weight"): 0.0,
    ("dpo", "reference"): "auto",
    ("orpo", "lambda"): 0.1,
    ("simpo", "beta"): 2.0,
    ("simpo", "gamma"): 1.0,
    ("train", "num_labels"): None,
    ("adapter", "importance"): "uncertainty",
    ("adapter", "budget_unit"): "triplets",
    ("adapter", "flora_r_out"): None,
    ("adapter", "flora_kernel_r"): None,
    ("adapter", "experts"): 8,
    ("adapter", "top_k"): 2,
    ("adapter", "balance_coef"): 1e-3,
    ("adapter", "router_init_std"): 0.02,
    ("adapter", "experts_from"): [],
    ("adapter", "lora_ga_gamma"): 16.0,
    ("adapter", "lora_ga_batches"): 2,
    ("optimizer", "lora_pro_moments"): "low",
    ("data", "cache_dir"): None,
    ("output", "report_to"): [],
    ("output", "eval_metrics"): [],
    ("output", "eval_prompts"): None,
    ("output", "eval_max_new_tokens"): 128,
    ("output", "keep_best"): None,
    ("output", "early_stopping"): None,
    ("output", "metrics_port"): None,
    ("data", "columns"): {},
    ("data", "streaming"): False,
    ("data", "shuffle_window"): 10_000,
    ("data", "chat_template"): None,
    ("data", "chat_template_kwargs"): {},
    ("data", "max_eval_samples"): None,
    ("data", "on_error"): "stop",
    ("train", "allow_unused"): False,
    ("train", "tokens_per_micro_batch"): None,
    ("train", "deterministic"): False,
    ("train", "compile"): "auto",
    ("train", "compile_cache"): "~/.cache/dlora/compile",
    ("output", "remote"): None,
    ("output", "snapshot_every"): 1,
    ("output", "samples"): 0,
    ("forget", "data"): None,
    ("forget", "texts"): 64,
    ("forget", "text_tokens"): 64,
    ("forget", "max_kl"): None,
    ("forget", "max_nll_ratio"): None,
    ("forget", "action"): "stop",
    ("output", "report"): False,
    ("distill", "teacher"): "base",
    ("distill", "teacher_adapter"): None,
    ("distill", "teacher_quantization"): "none",
    ("distill", "temperature"): 1.0,
    ("distill", "weight"): 1.0,
    ("distill", "ce_weight"): 1.0,
    ("distill", "top_k"): None,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(REQUIRED)
    return path


def in_python(**sections) -> Config:
    """A `Config` built in Python, with the required values filled in."""
    required = {
        "model": ModelConfig(path="org/base"),
        "data": DataConfig(train="train.jsonl"),
        "output": OutputConfig(dir="runs/x"),
    }
    return Config(**(required | sections))


# Defaults, and what loads -----------------------------------------------------------------------


def test_defaults_are_the_contract_s(base):
    contract = yaml.safe_load(CONTRACT)
    for config in (in_python(), load(base)):
        sections = to_dict(config)
        for (section, key), default in ADDED.items():
            assert sections[section].pop(key) == default
        sections = {name: body for name, body in sections.items() if body}
        assert sections == contract
        assert [list(section) for section in sections.values()] == [
            list(section) for section in contract.values()
        ]
    assert {k for k, opt in SCHEMA.items() if opt.default is MISSING} == {
        "model.path",
        "data.train",
        "output.dir",
    }


def test_contract_s_block_itself_is_valid(tmp_path):
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    config = load(path)
    assert config == in_python()
    assert config.user_set == SCHEMA.keys() - {".".join(key) for key in ADDED}


def other_value(opt: Option) -> Any:
    """A value that the option accepts and that is not its default."""
    if get_origin(opt.type) is Literal:
        return next(choice for choice in get_args(opt.type) if choice != opt.default)
    if isinstance(opt.default, bool):
        return not opt.default
    if isinstance(opt.default, float):
        return opt.default / 2 or 0.25
    if isinstance(opt.default, list):
        return ["other"]
    return (opt.default or 0) + 1 if "int" in opt.spelling else "other"


def beyond(opt: Option, kind: str, bound: float) -> Any:
    """A value just outside a bound, as the option holds values."""
    step = {"ge": -1, "gt": 0, "le": 1, "lt": 0}[kind]
    value = bound + step if "int" in opt.spelling else bound + 0.1 * step
    return {"q": value} if get_origin(opt.type) is dict else value


@pytest.mark.parametrize("key", SCHEMA)
def test_option(base, key):
    """The default is a value; what is outside the bounds, infinite or empty is refused by name."""
    opt = SCHEMA[key]
    assert opt.doc and "later" not in opt.spelling
    if opt.default is not MISSING:
        value = convert(opt, Given(opt.default))
        assert value == opt.default and type(value) in (type(opt.default), float)
    wrong = [(beyond(opt, kind, bound), opt.range) for kind, bound in opt.bounds.items()]
    if float in members(opt.type):
        wrong += [(value, "finite") for value in (".nan", ".inf", "1e999")]
    if str in members(opt.type):
        wrong.append(("  ", "is empty"))
    for value, says in wrong:
        message = refusal(load, base, [f"--{key}={value}"])
        assert key in message and says in message


@pytest.mark.parametrize("key", [key for key, opt in SCHEMA.items() if opt.owners])
def test_option_of_what_is_not_chosen_cannot_act(base, key):
    opt = SCHEMA[key]
    message = refusal(load, base, [f"--{key}", plain(other_value(opt))])
    names = " or ".join(map(str, opt.owners))
    assert (
        message.startswith(f"{key}: ")
        and f"cannot act: {ROOMS[opt.room]} is not {names}" in message
    )
    assert load(base, [f"--{key}", plain(opt.default)])  # the default, said aloud


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, opt in SCHEMA.items() for value in opt.later]
)
def test_what_is_not_built_says_later(base, key, value, capsys):
    message = refusal(load, base, [f"--{key}", plain(value)])
    assert message == f"{key}: {plain(value)} is planned for later and does not work yet"
    assert value not in get_args(SCHEMA[key].type) and SCHEMA[key].default != value


def test_what_comes_later_is_the_contract_s():
    later = {(key, plain(value)) for key, opt in SCHEMA.items() for value in opt.later}
    assert later == {
        ("model.dtype", "float16"),
        ("data.format", "unpaired"),
        ("train.objective", "kto"),
    }


def needing_packages() -> list[tuple[str, str, str, str]]:
    return [
        (key, str(part.name), package, install)
        for name, key in ROOMS.items()
        for part in room(name).values()
        for package, install in part.says.get("requires", {}).items()
    ]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("key", "name", "package", "install"), needing_packages())
def test_missing_package_is_named(base, monkeypatch, key, name, package, install, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    if installed:
        assert value_of(load(base, [f"--{key}", name]), key) == name
    else:
        wanted = f"{key}: {name} needs {package}: pip install {install}"
        assert refusal(load, base, [f"--{key}", name]) == wanted


def test_packages_are_the_extras():
    assert {(name, install) for _, name, _, install in needing_packages()} == {
        ("zero3", "'dlora[zero3]'"),
        ("adamw8bit", "'dlora[quant]'"),
        ("paged_adamw8bit", "'dlora[quant]'"),
    }


def test_what_parts_say_names_existing_options():
    said = {key for keys, _, _ in INERT for key in keys.split()}
    for name, key in ROOMS.items():
        section = key.partition(".")[0]
        for part in room(name).values():
            own = {*part.says.get("unused", ()), *part.says.get("instead", ())}
            said |= {f"{section}.{option}" for option in own}
            said |= {clash[0] for clash in part.says.get("clashes", ())}
    assert said <= SCHEMA.keys()


def test_defaults_are_not_shared():
    one, two = in_python(), in_python()
    one.adapter.rank_pattern["q_proj"] = 4
    assert two.adapter.rank_pattern == {}


COMMAND_LINES = [  # words, key, the value that they mean
    (["--optimizer.lr", "2e-4"], "optimizer.lr", 2e-4),
    (["--optimizer.lr=1"], "optimizer.lr", 1.0),
    (["--adapter.lora_alpha", "8"], "adapter.lora_alpha", 8),
    (["--adapter.lora_alpha", "0.5"], "adapter.lora_alpha", 0.5),
    (["--train.epochs", "null"], "train.epochs", None),
    (["--train.epochs", "3"], "train.epochs", 3),
    (["--adapter.use_rslora", "true"], "adapter.use_rslora", True),
    (["--adapter.init_lora_weights", "true"], "adapter.init_lora_weights", True),
    (["--adapter.target_modules", "[q,v_proj]"], "adapter.target_modules", ["q", "v_proj"]),
    (["--adapter.target_modules", "q_proj"], "adapter.target_modules", "q_proj"),
    (["--adapter.target_modules", "[qv]_proj$"], "adapter.target_modules", "[qv]_proj$"),
    (["--adapter.target_modules", r".*\.(q|v)_proj"], "adapter.target_modules", r".*\.(q|v)_proj"),
    (["--adapter.rank_pattern", '{"q_proj": 8}'], "adapter.rank_pattern", {"q_proj": 8}),
    (
        ["--adapter.rank_pattern", '{"layers.0.self_attn.q_proj": 4, ".*mlp.*": 8}'],
        "adapter.rank_pattern",
        {"layers.0.self_attn.q_proj": 4, ".*mlp.*": 8},
    ),
    (["--adapter.alpha_pattern={q: 4, v: 1e1}"], "adapter.alpha_pattern", {"q": 4, "v": 10.0}),
    (["--model.revision", "null"], "model.revision", None),
    (["--model.revision", "1234567"], "model.revision", "1234567"),
    (["--model.revision", "12e4567"], "model.revision", "12e4567"),
    (["--model.quantization", "none"], "model.quantization", "none"),
    (["--output.resume", "none"], "output.resume", "none"),
    (["--output.eval_every", "0"], "output.eval_every", 0),
    (["--data.train", '["a b.jsonl", c.jsonl]'], "data.train", ["a b.jsonl", "c.jsonl"]),
    (["--data.eval", "builtin:docstrings-heldout"], "data.eval", "builtin:docstrings-heldout"),
    (["--data.chat_template", "{{ messages }}"], "data.chat_template", "{{ messages }}"),
    (
        ["--data.chat_template_kwargs", "{a: false, b: '1', c: 1, d: 1.5, e: x, f: null}"],
        "data.chat_template_kwargs",
        {"a": False, "b": "1", "c": 1, "d": 1.5, "e": "x", "f": None},
    ),
    (["--output.dir", "2026-01-31"], "output.dir", "2026-01-31"),
    (["--output.dir=--odd"], "output.dir", "--odd"),
]


@pytest.mark.parametrize(("words", "key", "value"), COMMAND_LINES)
def test_override(base, words, key, value):
    config = load(base, words)
    assert value_of(config, key) == value
    assert type(value_of(config, key)) is type(value)
    assert config.user_set == {"model.path", "data.train", "output.dir", key}


FILES = [  # lines after REQUIRED, key, the value that they mean
    ("optimizer: {lr: 2e-4}", "optimizer.lr", 2e-4),
    ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
    ("adapter: {target_modules: [q_proj]}", "adapter.target_modules", ["q_proj"]),
    ("adapter: {target_modules: '[a]'}", "adapter.target_modules", "[a]"),
    ("adapter: {rank_pattern: {layers.0.q: 4, .*mlp.*: 8}}", "adapter.rank_pattern",
     {"layers.0.q": 4, ".*mlp.*": 8}),
    ("adapter: {path: 2026-01-31}", "adapter.path", "2026-01-31"),
    ("adapter:\n  <<: {r: 4, lora_alpha: 5}\n  r: 3", "adapter.r", 3),
    ("adapter:\n  <<: {r: 4, lora_alpha: 5}\n  r: 3", "adapter.lora_alpha", 5),
    ("train: {seed: &n 7, max_steps: *n}", "train.max_steps", 7),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "key", "value"), FILES)
def test_file(base, lines, key, value):
    base.write_text(REQUIRED + lines)
    assert value_of(load(base), key) == value


def test_json_file(tmp_path):
    path, content = tmp_path / "run.json", yaml.safe_load(REQUIRED)
    content["optimizer"] = {"lr": 1e-5}
    content["output"]["dir"] = "été/😀"
    for text in (json.dumps(content), json.dumps(content, indent="\t", ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        config = load(path)
        assert config.optimizer.lr == 1e-5 and config.output.dir == "été/😀"


def test_file_written_on_windows(base):
    base.write_bytes(b"\xef\xbb\xbf" + REQUIRED.replace("\n", "\r\n").encode())
    assert load(base) == in_python()


def test_overrides_win_wherever_they_stand(base):
    base.write_text(REQUIRED + "adapter: {r: 4}")
    for argv in (
        ["--adapter.r", "8", "--config", str(base)],
        ["--config", str(base), "--adapter.r=8"],
    ):
        assert parse(argv, "train").config.adapter.r == 8


def test_no_file_is_needed():
    words = ["--model.path", "m", "--data.train", "t", "--output.dir", "o"]
    options = parse(words, "train")
    assert options.config.output.dir == "o" and not options.check
    assert parse([*words, "--check"], "train").check


def test_a_chat_template_s_file_is_read_at_once(base, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ é }}\n", encoding="utf-8")
    config = load(base, ["--data.chat_template", str(tmp_path / "t.jinja")])
    assert config.data.chat_template == "{{ é }}\n"
    (tmp_path / "t.jinja").write_text(" ")
    said = refusal(load, base, ["--data.chat_template", str(tmp_path / "t.jinja")])
    assert said.startswith(f"data.chat_template: {tmp_path / 't.jinja'} is empty")


def test_epochs_govern_when_set(base):
    assert load(base).train.governed_by == "max_steps"
    assert load(base, ["--train.epochs", "2"]).train.governed_by == "epochs"


# One line for every mistake ----------------------------------------------------------------------

MISTAKES = [  # words of the command line, what the one line has to say
    (["--adapter.rnak", "8"], ["adapter.rnak", "did you mean --adapter.rank_pattern?"]),
    (["--adapter.rank", "8"], ["adapter.rank is not", "adapter.rank_pattern"]),  # no abbreviations
    (["--adapter.alpha", "8"], ["did you mean --adapter.lora_alpha?"]),
    (["--adaptor.r", "8"], ["did you mean --adapter.r?"]),
    (["--lr", "1"], ["did you mean --optimizer.lr?"]),
    (["--data.lr", "1"], ["did you mean --optimizer.lr?"]),
    (["--path", "x"], ["did you mean --model.path or --adapter.path?"]),
    (["--chek"], ["did you mean --check?"]),
    (["--optimizer.learning_rate", "1"], ["optimizer.learning_rate", "optimizer.lr,"]),
    (["--zzz"], ["zzz", "--help"]),
    (["--adapter", "8"], ["adapter is not an option", "adapter.r,"]),
    (["--adapter.rank_pattern.q", "8"], ["did you mean --adapter.rank_pattern?"]),
    (["--adapter.r", "8", "--adapter.r=8"], ["adapter.r is given twice"]),
    (["--adapter.rank_pattern", "{q: 1, q: 2}"], ["adapter.rank_pattern", "duplicate"]),
    (["--check", "--check"], ["check is given twice"]),
    (["--check=true"], ["check takes no value"]),
    (["stray"], ["stray: unexpected"]),
    (["-x"], ["-x: unexpected"]),
    (["--adapter.r"], ["adapter.r needs a value"]),
    (["--adapter.use_rslora", "--check"], ["adapter.use_rslora needs a value"]),
    (["--adapter.r", "abc"], ["adapter.r: expected int, got 'abc'"]),
    (["--adapter.r", "1.5"], ["adapter.r: expected int, got '1.5'"]),
    (["--adapter.r", "true"], ["adapter.r: expected int, got 'true'"]),
    (["--adapter.r", "null"], ["adapter.r: expected int, got 'null'"]),
    (["--adapter.r="], ["adapter.r: expected int, got ''"]),
    (["--adapter.use_dora", "maybe"], ["adapter.use_dora: expected true or false, got 'maybe'"]),
    (["--sharding.engine", "ddp"], ["sharding.engine: expected one of fsdp2, zero3, got 'ddp'"]),
    (["--train.objective", "ppo"], ["train.objective: expected one of sft, ", "got 'ppo'"]),
    (["--model.quantization", "null"], ["model.quantization: expected one of none, fp8"]),
    (["--adapter.init_lora_weights", "false"], ["adapter.init_lora_weights: expected one of true"]),
    (["--adapter.rank_pattern", "{q: a}"], ["rank_pattern: expected a mapping of names to int"]),
    (["--adapter.modules_to_save", "head"], ["modules_to_save: expected a list of str"]),
    (["--train.epochs", "1.5"], ["train.epochs: expected int or null"]),
    (["--data.chat_template", "no.jinja"], ["data.chat_template: no.jinja: No such file", "Jinja"]),
    (["--data.chat_template_kwargs", "{a: [1]}"], ["kwargs: expected a mapping of names"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_mistake_on_the_command_line(base, words, says):
    message = refusal(load, base, words)
    for part in says:
        assert part in message


FILE_MISTAKES = [  # text of the file, line (None: no line to name), what the one line has to say
    ("", None, "is empty"),
    ("# nothing\n", None, "is empty"),
    ("- a\n", 1, "expected a mapping of sections"),
    ("model: {path: x\ndata: [", 2, "not valid YAML"),
    ("model:\n\tpath: x\n", 2, "not valid YAML"),
    (REQUIRED + "\0", 4, "not valid YAML"),
    (REQUIRED + "adapter: " + "[" * 3000, None, "not valid YAML"),
    (REQUIRED + "adapter: {r: !!int x}", None, "not valid YAML"),
    (REQUIRED + "adapter: !!python/object:os.system {}", 4, "not valid YAML"),
    (REQUIRED + "adapter: *a", 4, "not valid YAML"),
    (REQUIRED + "[a]: 3", 4, "not valid YAML"),
    (REQUIRED + "adapter: 3", 4, "adapter must be a mapping of options, got 3"),
    (REQUIRED + "adapter:\n", 4, "adapter must be a mapping of options, got null"),
    (REQUIRED + "adapter:\n  - r\n", 4, "adapter must be a mapping"),
    (REQUIRED + "adapter:\n  r: 3\n  rnak: 3", 6, "adapter.rnak is not an option (did you mean"),
    (REQUIRED + "adapter:\n  lr: 3", 5, "adapter.lr is not an option (did you mean optimizer.lr?)"),
    (REQUIRED + "lr: 3", 4, "lr is not an option (did you mean optimizer.lr?)"),
    (REQUIRED + "adaptor:\n  r: 3", 4, "adaptor is not an option (did you mean adapter?)"),
    (REQUIRED + "adapter.r: 3", 4, "write adapter.r as r: indented under adapter:"),
    (REQUIRED + "1: 3", 4, "1 is not an option"),
    (REQUIRED + "user_set: [a]", 4, "user_set is not an option"),
    (REQUIRED + "adapter:\n  r: 3\n  r: 4", 6, "adapter.r is a duplicate key, set in line 5"),
    (REQUIRED + "output: {dir: y}", 4, "output is a duplicate key, set in line 3"),
    (REQUIRED + "adapter:\n  rank_pattern:\n    q: 1\n    q: 2", 7, "adapter.rank_pattern.q is a"),
    (REQUIRED + "adapter: &a {r: 3}\noptimizer:\n  <<: *a", 4, "optimizer.r is not an option"),
    (REQUIRED + "adapter:\n\n  r: abc", 6, "adapter.r: expected int, got 'abc'"),
    (REQUIRED + "adapter: {r: 1.5}", 4, "adapter.r: expected int, got 1.5"),
    (REQUIRED + "adapter: {r: true}", 4, "adapter.r: expected int, got true"),
    (REQUIRED + "adapter:\n  r:\n", 5, "adapter.r: expected int, got null"),
    (REQUIRED + "adapter: &a\n  r: *a", 5, "adapter.r: expected int"),
    (REQUIRED + "adapter: {init_lora_weights: 1}", 4, "adapter.init_lora_weights: expected one of"),
    (REQUIRED + "data2: no", 4, "did you mean data?"),
    ("output: {dir: 2026}", 1, "output.dir: expected str, got 2026"),
    ("output: {resume: no}", 1, "output.resume: expected str, got false"),
    ("adapter: {use_dora: maybe}", 1, "adapter.use_dora: expected true or false, got 'maybe'"),
    ("output: {dir: x}", None, "required but not set: model.path, data.train"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "says"), FILE_MISTAKES)
def test_mistake_in_a_file(base, text, line, says):
    base.write_text(text)
    message = refusal(load, base)
    assert says in message
    if line is not None:
        assert message.startswith(f"{base}:{line}: ")


def test_file_that_cannot_be_read(tmp_path):
    assert "nowhere.yaml" in refusal(load, tmp_path / "nowhere.yaml")
    assert str(tmp_path) in refusal(load, tmp_path)  # a directory
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model:\n  path: café\n".encode("latin-1"))
    assert refusal(load, latin) == f"{latin}:2: not UTF-8 text"


def test_json_mistakes_name_the_line_too(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"model": {"path": "a",\n\t"path": "b"}}')
    assert refusal(load, path).startswith(f"{path}:2: model.path is a duplicate key")


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{q: 0}", "must be"),
        ("{'(': 4}", "is not a regular expression"),
        (
            "{'(?i)q': 4}",
            "is not a regular expression",
        ),  # PEFT's rule wraps it: flags come too late
        ("{3: 4}", "the name 3 must be quoted"),
    ],
)
def test_bad_pattern(base, name, pattern, says):
    message = refusal(load, base, [f"--adapter.{name}", pattern])
    assert message.startswith(f"adapter.{name}") and says in message


CANNOT_ACT = [  # words, the key that cannot act, the key that is why
    ("--sharding.cpu_offload true", "sharding.cpu_offload", "zero3"),
    *(
        (f"--adapter.path old --adapter.{key} {value}", f"adapter.{key}", "adapter.path")
        for key, value in {
            "r": 8, "lora_alpha": 8, "target_modules": "q_proj", "use_rslora": "true",
            "use_dora": "true", "init_lora_weights": "gaussian", "rank_pattern": '{"q":8}',
            "alpha_pattern": '{"q":8}', "modules_to_save": "[head]",
        }.items()
    ),
    ("--adapter.method flora --optimizer.name lora_pro", "adapter.method: flora",
     "optimizer.name: lora_pro"),
    ("--adapter.method flora --adapter.path old", "adapter.path", "flora cannot start from"),
    *(
        (f"--model.quantization nf4 --adapter.init_lora_weights {value} --adapter.use_dora true",
         "adapter.use_dora", "packs the residual")
        for value in ("pissa", "milora")
    ),
    ("--model.quantization nf4 --adapter.init_lora_weights lora_ga",
     "adapter.init_lora_weights: lora_ga", "model.quantization: nf4"),
    ("--adapter.method adalora --adapter.init_lora_weights pissa", "adapter.init_lora_weights",
     "adalora starts every module with"),
    ("--model.path x.gguf --model.revision main", "model.revision", "model.path"),
    ("--model.path x.gguf --model.trust_remote_code true", "model.trust_remote_code", "gguf"),
    ("--model.cache_dir elsewhere", "model.cache_dir", "gguf"),
    ("--output.eval_every 10", "output.eval_every", "data.eval"),
    ("--optimizer.name lora_pro --optimizer.loraplus_lr_ratio 4", "optimizer.loraplus_lr_ratio",
     "one rate"),
    ("--optimizer.name adamw8bit --sharding.optimizer_state divided", "sharding.optimizer_state",
     "optimizer.name: adamw8bit"),
    ("--optimizer.name adamw8bit --adapter.method adalora", "adapter.method: adalora",
     "optimizer.name: adamw8bit"),
    ("--output.resume none --output.resume_force true", "output.resume_force", "output.resume"),
    ("--adapter.method adalora --adapter.importance magnitude --adapter.beta1 0.5", "adapter.beta1",
     "adapter.importance is not uncertainty"),
    ("--adapter.method adalora --adapter.r 16", "adapter.r", "adapter.init_r"),
    ("--adapter.method adalora --adapter.use_dora true", "adapter.use_dora", "adapter.method"),
    ("--train.epochs 2 --train.max_steps 200", "train.max_steps", "train.epochs"),
]  # fmt: skip


def without_model_path(tmp_path: Path) -> Path:
    path = tmp_path / "no_model.yaml"
    path.write_text(REQUIRED.partition("\n")[2])
    return path


@pytest.mark.parametrize(("words", "key", "because"), CANNOT_ACT)
def test_what_cannot_act_is_refused(base, tmp_path, words, key, because):
    file = without_model_path(tmp_path) if "--model.path" in words else base
    message = refusal(load, file, words.split(" "))
    clause = next(clause for clause in message.split("; ") if clause.startswith(key))
    assert because in clause


CAN_ACT = [
    "--adapter.path old --adapter.lora_dropout 0.1",
    "--adapter.path old --adapter.r 16",  # the default, said aloud
    "--adapter.init_r 12",
    "--adapter.use_dora true --model.quantization nf4 --optimizer.loraplus_lr_ratio 4",
    "--adapter.use_dora true --optimizer.name lora_pro",
    "--data.eval held.jsonl --output.eval_every 10",
    "--output.eval_every 0",
    "--output.resume_force true",
    "--model.revision main --model.trust_remote_code true",
    "--optimizer.schedule constant --optimizer.warmup_ratio 0.1",
    "--optimizer.max_grad_norm 0",
    "--optimizer.name lora_pro --optimizer.lora_pro_moments full --optimizer.weight_decay 0.1",
    "--optimizer.name lora_pro --sharding.optimizer_state divided",
    "--optimizer.name adamw8bit --optimizer.loraplus_lr_ratio 4",
    "--train.epochs null --train.max_steps 10",
    "--train.global_batch_size 1",
]


@pytest.mark.parametrize("words", CAN_ACT)
def test_what_can_act_is_accepted(base, words):
    load(base, words.split(" "))


def test_revision_of_a_local_directory_cannot_act(tmp_path):
    words = ["--model.path", str(tmp_path), "--model.revision", "main"]
    assert refusal(load, without_model_path(tmp_path), words).startswith("model.revision: 'main'")


def test_all_problems_stand_in_the_one_line(base):
    message = refusal(load, base, ["--adapter.r", "0", "--model.dtype", "float16"])
    assert "adapter.r: " in message and "; model.dtype: " in message


def test_a_config_built_in_python_is_held_to_the_same_rules():
    train = replace(in_python().train, epochs=2, max_steps=10)
    assert "train.max_steps: train.epochs is set" in refusal(validate, in_python(train=train))
    validate(in_python(train=replace(train, max_steps=200)))  # left at its default


# Output ------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    [],
    ["--train.epochs", "2"],  # max_steps must not come back as set
    ["--optimizer.lr", "1e-5", "--adapter.rank_pattern", '{"layers.0.q": 4, ".*é.*": 8}'],
    ["--output.dir=2026-01-31", "--model.revision", "12e4", "--data.train", "[a, 'b: c', '1']"],
    ["--adapter.target_modules", "[qv]_proj$", "--data.eval", "x" * 200 + " y"],
]


@pytest.mark.parametrize("words", ROUND_TRIPS)
def test_dump_loads_back_equal(base, tmp_path, words):
    words = [*words, "--output.dir", "o"] if not any("output.dir" in w for w in words) else words
    config = load(base, words)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config), encoding="utf-8")
    assert load(copy) == config
    assert dump_yaml(load(copy)) == dump_yaml(config)
    assert list(yaml.safe_load(copy.read_text())) == list(SECTIONS)


def test_dump_of_adalora_leaves_out_the_r_that_would_contradict_it():
    adapter = replace(in_python().adapter, method="adalora")
    assert "r" not in yaml.safe_load(dump_yaml(in_python(adapter=adapter)))["adapter"]


def test_print_config(base, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--print_config", "--config", str(base), "--adapter.r", "4"], "train")
    assert stop.value.code == 0
    assert capsys.readouterr().out == dump_yaml(load(base, ["--adapter.r", "4"]))
    assert "adapter.r" in refusal(
        parse, ["--config", str(base), "--print_config", "--adapter.r=0"], "p"
    )


def test_help_lists_every_option_that_works(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--adapter.r", "--help"], "python -m dlora.train")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: python -m dlora.train ")
    for key, opt in SCHEMA.items():
        assert f"--{key} VALUE {opt.help} (type: {opt.spelling}" in text
    assert "(type: int, >= 1 and <= 65536, default: 16)" in text
    assert "one of lora, adalora, flora, mola, default: lora" in text
    assert text.count(", required)") == 3
    assert not {"kto", "float16", "unpaired", "later"} & set(re.findall(r"\w+", text))
    for flag in ("--config", "--check", "--print_config"):
        assert f"{flag} " in text


@dataclass(frozen=True)
class Cluster:
    """Options of one command only, as `dlora.plan` has them."""

    nodes: int = option(1, "machines", ge=1)
    gpus_per_node: int = option(8, "accelerators in each", ge=1)


def test_extra_options_of_one_command(base, capsys):
    words = ["--config", str(base), "--gpus-per-node", "4"]
    assert parse(words, "plan", Cluster).extra == Cluster(gpus_per_node=4)
    assert "--gpus-per-node is not an option" in refusal(parse, words, "train")
    assert "gpus-per-node: must be >= 1" in refusal(parse, [*words[:-1], "0"], "plan", Cluster)
    assert "gpus-per-node: expected int" in refusal(parse, [*words[:-1], "x"], "plan", Cluster)
    with pytest.raises(SystemExit):
        parse(["--help"], "plan", Cluster)
    assert "--gpus-per-node VALUE" in capsys.readouterr().out


def test_importing_the_configuration_is_cheap():
    """`import dlora` loads torch; the configuration by itself must not, nor anything else heavy."""
    code = (
        "import sys, types; package = types.ModuleType('dlora'); "
        f"package.__path__ = {[str(Path(config_module.__file__).parents[1])]!r}; "
        "sys.modules['dlora'] = package; import dlora.config.load; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
