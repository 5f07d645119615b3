"""lm-eval's tasks: as its own class for transformers' models answers them."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from programs import start, status
from refusals import refusal
from sampling import full
from tiny import tokenizer, whole

from dlora.evaluation.command import main

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question * 40}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: chrf}}]
"""
NAMES = ["choices", "rolling", "writing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    records = [
        {"question": f"{a} and {b}", "choices": [f" {a}", f" {b} {a}", " none"], "answer": i % 3}
        for i, (a, b) in enumerate(zip(words, reversed(words), strict=True))
    ]
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in (("choices", CHOICES), ("rolling", ROLLING), ("writing", WRITING)):
        (root / f"{name}.yaml").write_text(text.format(data=data))
    return root


@pytest.mark.parametrize("world", [1, full(2)])
def test_the_tasks_have_the_results_of_lm_eval_s_own_model(
    folder: Path, saved_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """By their files' names, and by their own in a folder; on 2 ranks with a sharded base."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    base, files = saved_models("llama"), [f"{folder / name}.yaml" for name in NAMES[1:]]
    reference = lm_eval.simple_evaluate(
        model=HFLM(pretrained=whole(base), tokenizer=tokenizer(), batch_size=1, max_length=256),
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=100,
        num_fewshot=1,
    )["results"]
    to, log = tmp_path / "to.json", tmp_path / "log"
    words = ["--base", base, "--dtype", "float32", "--tasks", ",".join([NAMES[0], *files])]
    words += ["--include-path", str(folder), "--few-shot", "1", "--batch-size", "3"]
    words += ["--to", str(to)]
    if world == 1:
        assert main(words) == 0
    else:
        ranks = start(world, ["dlora.evaluation.command", *words], log)
        assert status(ranks) == 0, log.read_text()
    found = json.loads(to.read_text())["tasks"]
    for name in NAMES:
        figures = {
            key.removesuffix(",none"): value
            for key, value in reference[name].items()
            if isinstance(value, float) and "chrf_stderr" not in key  # of random draws
        }
        assert figures
        for key, value in figures.items():
            assert found[name][key] == pytest.approx(value, rel=1e-5), (name, key)


def test_tasks_that_cannot_be_run(
    folder: Path, saved_models: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(CHOICES.format(data=tmp_path / "none.jsonl"))
    for task, said in (
        ("no/where.yaml", "--tasks: file no/where.yaml does not exist"),
        (str(bad), f"--tasks: {bad} cannot be loaded: "),
    ):
        assert said in refusal(main, ["--base", saved_models("llama"), "--tasks", task])
