"""Weights by examples: the objective beside transformers' loss, and where its minimum is found."""

import json
from pathlib import Path

import cma
import pytest
import torch
from mixes import composed, loaded, save_random
from tiny import save_chats, tokenizer, whole

from dlora.errors import UsageError
from dlora.library import search
from dlora.library.compose import main


def test_the_minimum_is_found_inside_the_bounds():
    wanted = torch.tensor([0.8, -0.4, 3.0])  # the last lies outside

    def objective(point):
        return float((torch.tensor(point) - wanted).square().sum())

    found = search.minimum(objective, 3, 300, 0, cma)
    assert found == pytest.approx((0.8, -0.4, 1.5), abs=0.05)
    assert found == search.minimum(objective, 3, 300, 0, cma)
    assert search.minimum(lambda p: abs(p[0] - 0.5), 1, 60, 0, cma) == pytest.approx(
        (0.5,), abs=0.1
    )


def test_the_budget_is_what_is_tried():
    for budget in (1, 2, 7, 20):
        tried: list[tuple[float, ...]] = []

        def objective(point, tried=tried):
            tried.append(point)
            return sum((x - 0.3) ** 2 for x in point)

        search.minimum(objective, 2, budget, 0, cma)
        assert len(tried) == budget
        assert tried[0] == (0.0, 0.0)


@pytest.fixture(scope="module")
def two(saved_models, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    fresh = lambda: whole(saved_models("llama"))  # noqa: E731
    return [
        save_random(
            fresh(),
            root / str(i),
            i,
            r=2 + i,
            target_modules=["q_proj", "up_proj"],
            task_type="CAUSAL_LM",
        )
        for i in range(2)
    ]


def test_the_objective_is_the_loss_of_that_mix(two, saved_models, tmp_path, monkeypatch, capsys):
    """Every mix that is tried has the loss of what PEFT makes of `cat` with these weights."""
    chats, tried = save_chats(tmp_path / "chats.jsonl", 5), []
    minimum = search.minimum

    def watched(objective, *rest):
        def each(point):
            tried.append((point, objective(point)))
            return tried[-1][1]

        return minimum(each, *rest)

    monkeypatch.setattr(search, "minimum", watched)
    monkeypatch.setattr("dlora.cli.native_dtype", lambda _: "float32")  # on any machine
    mix = ["--adapters", *map(str, two), "--method", "svd", "--to", str(tmp_path / "made")]
    assert main([*mix, "--search", str(chats), "--budget", "7", "--seed", "3"]) == 0
    best, least = min(tried, key=lambda one: one[1])
    assert len(tried) == 7 and "mix 1 of 7" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "made/composition.json").read_text())["adapters"]
    assert [one["weight"] for one in recorded] == list(best)
    for number, (point, value) in enumerate([tried[0], (best, least)]):
        wanted = loss_of(two, point, chats, saved_models, tmp_path / f"cat-{number}")
        assert value == pytest.approx(wanted + 0.05 * sum(map(abs, point)) / 2, rel=1e-4)


def loss_of(adapters, weights, chats: Path, saved_models, to: Path) -> float:
    """Σ cross entropy / Σ targets by PEFT and transformers, of the answers with their ends."""
    model, text = whole(saved_models("llama")), tokenizer()
    if any(weights):
        model = loaded(model, composed(to, "cat", adapters, weights))
    total = targets = 0.0
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = text.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        answer = f"{messages[1]['content']}<|im_end|>"
        ids = torch.tensor([text(prompt)["input_ids"] + text(answer)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(text(prompt)["input_ids"])] = -100
        count = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        targets += count
    return total / targets


def test_a_weight_that_is_given_stays(two, tmp_path):
    chats = save_chats(tmp_path / "chats.jsonl", 3)
    mix = [
        "--adapters",
        f"{two[0]}=0.5",
        str(two[1]),
        "--method",
        "cat",
        "--to",
        str(tmp_path / "made"),
    ]
    assert main([*mix, "--search", str(chats), "--budget", "3"]) == 0
    [first, _] = json.loads((tmp_path / "made/composition.json").read_text())["adapters"]
    assert first["weight"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "made"}


def test_examples_that_cannot_be_read(two, tmp_path, no_weights_are_read):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    mix = ["--adapters", *map(str, two), "--method", "cat", "--to", str(tmp_path / "made")]
    for file, message in (("nix.jsonl", "nix.jsonl"), ("bad.jsonl", "bad.jsonl:1")):
        with pytest.raises(UsageError, match=message):
            main([*mix, "--search", str(tmp_path / file)])
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl"}
