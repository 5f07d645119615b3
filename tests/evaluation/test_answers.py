"""Answers are those of transformers' `generate` one by one, and scores those of their libraries."""

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from programs import start, status
from refusals import preparation, refusal
from rouge_score import rouge_scorer
from run_training import Runs
from tiny import save_chats, tokenizer, whole

from dlora.config.output import Score
from dlora.evaluation.command import main
from dlora.evaluation.metrics import METRICS, scores

ALL = "exact_match,bleu,chrf,rouge1,rouge2,rougeL"
ANSWERS = ["one two three four five", "two two three", "eight nine ten one two six"]
WANTED = [["one two three four"], ["two two three", "two three"], ["seven nine ten one two", "six"]]


def test_scores_are_those_of_their_libraries() -> None:
    """With one reference or several."""
    found = scores(list(METRICS), ANSWERS, WANTED)
    streams = [[wanted[0] for wanted in WANTED], [None, "two three", "six"]]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [
        {k: max(scorer.score(r, a)[k].fmeasure for r in wanted) for k in scorer.rouge_types}
        for a, wanted in zip(ANSWERS, WANTED, strict=True)
    ]
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["bleu"] == sacrebleu.BLEU().corpus_score(ANSWERS, streams).score
    assert found["chrf"] == sacrebleu.CHRF().corpus_score(ANSWERS, streams).score
    for name in scorer.rouge_types:
        assert found[name] == pytest.approx(sum(one[name] for one in rouge) / 3)


def by_transformers(model: Any, prompt: str, most: int) -> str:
    """The answer to one prompt alone, greedily."""
    tok = tokenizer()
    ids = tok(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    end = tok.convert_tokens_to_ids("<|im_end|>")
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    return tok.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def chat(question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.fixture(scope="module")
def trained(
    pools: Any, words: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run that has learned to answer in words of ASCII, some answers longer than others."""
    root = tmp_path_factory.mktemp("trained")
    held = str(save_chats(root / "held.jsonl", 7))
    own: dict[str, Any] = {"optimizer__lr": 2e-2, "train__max_steps": 30, "data__eval": held}
    own |= {"output__eval_metrics": ["bleu", "exact_match"], "output__eval_max_new_tokens": 12}
    own |= {"output__eval_every": 15, "sharding__base": "world", "adapter__r": 8}
    _, lines = Runs(pools, lambda place: words(place, **own), root)("run", 2)
    assert all({"eval_bleu", "eval_exact_match"} <= line.keys() for line in (lines[0], lines[-1]))
    return root, lines


def test_answers_of_a_sharded_base_are_those_of_each_prompt_alone(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    """On 2 ranks that have prompts of different lengths; in batches, of a PEFT model in float32."""
    from peft import PeftModel

    root, lines = trained
    base = json.loads((root / "run/adapter/adapter_config.json").read_text())
    model = PeftModel.from_pretrained(whole(base["base_model_name_or_path"]), root / "run/adapter")
    records = [json.loads(line) for line in (root / "held.jsonl").read_text().splitlines()]
    wanted = [by_transformers(model, chat(r["messages"][0]["content"]), 12) for r in records]
    answers, to, log = tmp_path / "answers.jsonl", tmp_path / "to.json", tmp_path / "log"
    words = ["--adapter", str(root / "run/adapter"), "--data", str(root / "held.jsonl")]
    words += ["--metrics", ALL, "--max-new-tokens", "12", "--batch-size", "2"]
    words += ["--answers", str(answers), "--to", str(to)]
    assert status(start(2, ["dlora.evaluation.command", *words], log)) == 0, log.read_text()
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [one["answer"] for one in found] == wanted
    assert len({len(tokenizer()(answer)["input_ids"]) for answer in wanted}) > 1
    references = [[r["messages"][1]["content"]] for r in records]
    assert [one["references"] for one in found] == references
    figures = json.loads(to.read_text())["figures"]
    for name, value in scores(list(METRICS), wanted, references).items():
        assert figures[name] == pytest.approx(value)
    # The run has the same numbers at its last step.
    for name in ("bleu", "exact_match"):
        assert lines[-1][f"eval_{name}"] == pytest.approx(figures[name])


@pytest.mark.full  # each placement is three more runs; one of them is in the default run
@pytest.mark.parametrize("placement", ["zero3 world", "fsdp2 none", "fsdp2 node"])
def test_scores_in_a_run_do_not_depend_on_the_placement(
    run: Runs, tmp_path: Path, placement: str
) -> None:
    engine, base = placement.split()
    held = str(save_chats(tmp_path / "held.jsonl", 5))
    own: dict[str, Any] = {"data__eval": held, "output__eval_metrics": ["chrf"]}
    own |= {"output__eval_every": 3, "train__max_steps": 3, "output__eval_max_new_tokens": 9}
    wanted = run("one", 1, **own)[1]
    found = run("two", 2, **own, sharding__engine=engine, sharding__base=base)[1]
    scored = [line["eval_chrf"] for line in wanted if "eval_chrf" in line]
    assert [line["eval_chrf"] for line in found if "eval_chrf" in line] == pytest.approx(scored)


def test_prompts_with_references(
    trained: tuple[Path, Any], saved_models: Any, tmp_path: Path
) -> None:
    """Several of a prompt, and a prompt of messages; the loss is of the first reference."""
    data, to, chats = tmp_path / "prompts.jsonl", tmp_path / "to.json", tmp_path / "chats.jsonl"
    prompts = [
        {"prompt": "one two", "reference": "three"},
        {"prompt": [{"role": "user", "content": "four"}], "references": ["five six", "seven"]},
    ]
    data.write_text("\n\n".join(json.dumps(prompt) for prompt in prompts) + "\n")
    as_chats = [("one two", "three"), ("four", "five six")]
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in as_chats
    ]
    chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    losses, answers = [], tmp_path / "answers.jsonl"
    adapter = ["--adapter", str(trained[0] / "run/adapter")]
    scored = ["--metrics", "rouge1", "--max-new-tokens", "4", "--answers", str(answers)]
    for words in (["--data", str(data), *scored], ["--data", str(chats)]):
        to.unlink(missing_ok=True)
        assert main([*adapter, *words, "--to", str(to)]) == 0
        losses.append(json.loads(to.read_text())["figures"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [one["references"] for one in found] == [["three"], ["five six", "seven"]]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [{"prompt": "a", "reference": "b"}, {"prompt": "a"}],
            ":2: expected a text in 'reference'",
        ),
        ([{"prompt": "a", "references": []}], ":1: expected a text in 'reference'"),
        ([{"prompt": "a", "reference": "b", "references": ["c"]}], ":1: has both 'reference' and"),
        ([{"prompt": " ", "reference": "b"}], ":1: expected a text or a list of messages"),
        ([{"prompt": "a", "reference": "b", "c": 1}], ":1: has the field 'c'"),
        (
            [{"prompt": word, "reference": "b"} for word in ("a", "a" * 900)],
            "1 of 2 prompts leave no token",
        ),
        ([{"prompt": [{"role": "user"}], "reference": "b"}], "prompts.jsonl:1: "),
    ],
)
def test_prompts_that_cannot_be_used(
    saved_models: Any, tmp_path: Path, no_weights_are_read: None, records: list[Any], said: str
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--base", saved_models("llama"), "--data", str(data), "--max-length", "200"]
    assert said in refusal(main, words)


def test_texts_without_prompts_have_no_answers(
    words: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "one two three"}) + "\n")
    own = {"data__eval": str(held), "data__format": "text", "output__eval_metrics": ["bleu"]}
    said = refusal(preparation, words(tmp_path / "run", **own | {"data__train": str(held)}))
    assert said.startswith("output.eval_metrics: data.eval: the sequence 1 is a text without")


def test_every_score_has_its_name_in_the_configuration() -> None:
    assert set(METRICS) == set(Score.__args__)  # type: ignore[attr-defined]
