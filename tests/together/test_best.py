"""Of several adapters in one run, each keeps its own best and has its own scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import preparation, refusal
from tiny import save_chats
from together_runs import Together, crashed_together

from dlora.evaluation.command import main
from dlora.together.prepare import prepare_together

WILD = {"lr": 0.5, "schedule": "constant", "max_grad_norm": 0.0}
MEMBERS = [
    {"name": "wild", "adapter": {"r": 3}, "optimizer": WILD},
    {"name": "tame", "adapter": {"r": 4, "use_dora": True}, "optimizer": {"lr": 1e-3}},
]


def test_each_keeps_its_best(together: Together, tmp_path: Path) -> None:
    """Also of a run that was lost behind its last evaluation, and has committed a snapshot."""
    held = str(save_chats(tmp_path / "held.jsonl", 6))
    settings = {"data__eval": held, "output__eval_every": 2, "output__save_every": 0}
    settings |= {"output__eval_metrics": ["chrf"], "output__eval_max_new_tokens": 4}
    settings |= {"output__keep_best": {"metric": "eval_loss"}, "sharding__base": "world"}
    for work, arguments in ((crashed_together, (7, True)), (None, ())):
        more = {"work": work, "arguments": arguments} if work else {}
        results = together("run", 2, MEMBERS, **settings, **more)
    assert [(result["status"], result["start"]) for result in results] == [(0, 7)] * 2
    steps = []
    for member in MEMBERS:
        name = str(member["name"])
        found = {line["step"]: line for line in together.lines("run", name) if "eval_loss" in line}
        assert all("eval_chrf" in line for line in found.values())
        losses = {step: line["eval_loss"] for step, line in found.items() if step}
        place, to = tmp_path / "run/adapters" / name / "best", tmp_path / f"{name}.json"
        about = json.loads((place / "best.json").read_text())
        assert about["value"] == losses[about["step"]] == min(losses.values())
        assert main(["--adapter", str(place), "--data", held, "--to", str(to)]) == 0
        loss = json.loads(to.read_text())["figures"]["loss"]
        assert loss == pytest.approx(about["value"], rel=1e-5)
        steps.append(about["step"])
    assert len(set(steps)) > 1


def test_early_stopping_is_of_one_adapter(
    together: Together, tmp_path: Path, no_weights_are_read: None
) -> None:
    held = str(save_chats(tmp_path / "held.jsonl", 6))
    patient: Any = {"metric": "eval_loss", "patience": 2}
    own = {"data__eval": held, "output__early_stopping": patient}
    said = refusal(preparation, together.words("run", MEMBERS, **own), how=prepare_together)
    assert said.startswith("output.early_stopping: ") and "one adapter at a time" in said
