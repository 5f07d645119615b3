"""What a run may go on from, what it sets aside, and what it refuses; on one process."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import edit_json
from ranks import Pools
from refusals import preparation, refusal
from run_training import Runs, figures, same_bits, told, train
from safetensors.torch import load_file, save_file
from tiny import save_chats
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from dlora.adapters.open_adapter import open_adapter
from dlora.checkpoint.format import Checkpoint, read
from dlora.checkpoint.listing import newest
from dlora.checkpoint.writing import write
from dlora.training.check_resume import FREE_KEYS, FREE_SECTIONS

STEPS = 4


@pytest.fixture(scope="module")
def command(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, **settings): the words of a run of 4 steps with a checkpoint at each."""
    return functools.partial(
        words,
        data__train=str(save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 10)),
        output__save_every=1,
        output__keep_last=9,
        train__max_steps=STEPS,
        train__global_batch_size=4,
    )


@pytest.fixture(scope="module")
def finished(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that ended."""
    directory = tmp_path_factory.mktemp("finished")
    pools(1).run(train, command(directory))
    return directory


@pytest.fixture
def refused(command: Any) -> Any:
    """refused(directory, **settings): what the preparation of a run says, once it has refused."""
    return lambda *words, **settings: refusal(preparation, command(*words, **settings))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("step-*"))


def test_what_may_change_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/reliability.md").read_text()
    assert not {key for key in FREE_KEYS if f"`{key}`" not in page}
    assert " and ".join(f"`{name}`" for name in sorted(FREE_SECTIONS, reverse=True)) in page


# -- from a checkpoint that is named ---------------------------------------------------------------


def test_checkpoints_past_the_one_that_is_named_are_set_aside(
    run: Runs, finished: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    checkpoint = directory / "checkpoints" / "step-000001"
    run("run", 1, output__resume=str(checkpoint), output__keep_last=2)
    assert names(directory / "checkpoints") == ["step-000003", "step-000004"]
    assert names(directory / "checkpoints.old-1") == [f"step-00000{step}" for step in (2, 3, 4)]
    assert figures(directory) == figures(finished)
    ours, theirs = (read(d / "checkpoints" / "step-000004") for d in (directory, finished))
    assert same_bits(ours.tensors, theirs.tensors)


def test_what_another_run_left_is_set_aside(run: Runs, finished: Path, tmp_path: Path) -> None:
    """A run that goes on from elsewhere mixes neither metrics nor checkpoints with the others'."""
    _, before = run("run", 1, train__seed=1)
    checkpoint = finished / "checkpoints" / "step-000003"
    _, lines = run("run", 1, output__resume=str(checkpoint))
    assert names(run.root / "run" / "checkpoints") == ["step-000004"]
    assert lines == figures(finished)[3:]
    assert names(run.root / "run" / "checkpoints.old-1") == [f"step-00000{s}" for s in (1, 2, 3, 4)]
    kept = (run.root / "run" / "metrics.jsonl.old-1").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in kept] == [line["loss"] for line in before]


def written(root: Path, step: int) -> Path:
    """A checkpoint of little, the newest two of which are kept."""
    content = Checkpoint({"x": torch.ones(1)}, {"optimizer": {}}, {"step": step})
    return write(content, root, "", keep_last=2)


def test_a_checkpoint_is_not_pruned_by_its_own_writing(tmp_path: Path) -> None:
    for step in (7, 8, 2):
        assert written(tmp_path, step).is_dir()
        assert (tmp_path / "latest").read_text() == f"step-{step:06d}\n"
    assert names(tmp_path) == ["step-000002", "step-000007", "step-000008"]


def test_older_ones_stay_until_the_newer_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says yes to every write and keeps zeros; the next save is as any other."""
    for step in (1, 2):
        written(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(
            "dlora.checkpoint.writing.write_atomically",
            lambda path, content: path.write_bytes(bytes(len(content))),
        )
        with pytest.raises(OSError, match=r"read back, .*step-000003/manifest.json"):
            written(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    assert (tmp_path / "latest").read_text() == "step-000002\n"
    skipped: list[str] = []
    assert newest(tmp_path, skipped.append) == tmp_path / "step-000002" and len(skipped) == 1
    written(tmp_path, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_the_base_may_lie_elsewhere(
    run: Runs, finished: Path, saved_models: Any, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(saved_models("llama"), tmp_path / "moved"))
    edit_json(moved / "config.json", transformers_version="0")
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    resume = str(directory / "checkpoints" / "step-000002")
    _, lines = run("run", 1, output__resume=resume, model__path=str(moved))
    assert lines == figures(finished)


# -- what is refused before a weight is read -------------------------------------------------------


def test_another_base_of_the_same_shape(
    refused: Any, finished: Path, saved_models: Any, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(saved_models("llama"), tmp_path / "other"))
    file = other / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    save_file(tensors | {name: tensors[name] * 1.001}, file, metadata={"format": "pt"})
    said = refused(finished, model__path=str(other))
    assert f"model.path: {other} is another base" in said
    saved = saved_models("llama", "bfloat16")
    assert f"model.path: {saved} is another base" in refused(finished, model__path=saved)


def test_gradients_stay_rounded_as_they_were(refused: Any, command: Any, finished: Path) -> None:
    said = refused(finished, sharding__reduce_dtype="bfloat16")
    assert "sharding.reduce_dtype was None and is 'bfloat16'" in said
    preparation(command(finished, sharding__reduce_dtype="float32"), check=True)


def test_other_settings(refused: Any, finished: Path) -> None:
    said = refused(finished, adapter__r=8, optimizer__lr=1e-3)
    assert "belongs to another run: " in said
    assert "adapter.r was 4 and is 8" in said
    assert "optimizer.lr was 0.002 and is 0.001" in said


def test_other_shapes_although_forced(refused: Any, finished: Path) -> None:
    said = refused(finished, adapter__r=8, output__resume_force=True)
    assert said.startswith("output.resume: the checkpoint has model.layers.0")
    assert "[4, 70], this run [8, 70]" in said


def test_a_checkpoint_past_the_end(refused: Any, finished: Path) -> None:
    said = refused(finished, train__max_steps=3)
    assert said.startswith("train.max_steps: ") and "is at step 4 already" in said


def test_a_named_checkpoint_that_is_damaged(refused: Any, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished / "checkpoints" / "step-000002", tmp_path / "copy"))
    (copy / "optimizer.safetensors").unlink()
    said = refused(tmp_path / "run", output__resume=str(copy))
    assert "is missing or has the wrong size" in said


@pytest.mark.parametrize("content", ["[]", "3", '{"format": 1}', '{"format": 1, "files": []}'])
def test_a_manifest_that_is_none_is_skipped(finished: Path, tmp_path: Path, content: str) -> None:
    root = Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))
    (root / "step-000004" / "manifest.json").write_text(content)
    warnings: list[str] = []
    assert newest(root, warnings.append) == root / "step-000003"
    assert len(warnings) == 1 and "manifest.json" in warnings[0]


# -- a schedule that spans other steps -------------------------------------------------------------

SCHEDULES = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


def rates(schedule: str, total: int, lr: float = 2e-3, warmup: int = 1) -> list[float]:
    """transformers' learning rate at each of `total` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = SCHEDULES[schedule](optimizer, warmup, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("step", "changes", "says"),
    [
        (4, {"train__max_steps": 9}, "had its end: the schedule spanned 4 steps and spans 9"),
        (2, {"train__max_steps": 9}, "the schedule spanned 4 steps and spans 9"),
        (2, {"train__max_steps": 3}, "the schedule spanned 4 steps and spans 3"),
        (
            4,
            {"train__max_steps": None, "train__epochs": 4},
            "had its end: the schedule spanned 4 steps and spans 10",
        ),
        (2, {"optimizer__schedule": "linear"}, "optimizer.schedule was cosine and is linear"),
        (2, {"optimizer__lr": 1e-3}, "optimizer.lr was 0.002 and is 0.001"),
        (
            2,
            {"optimizer__warmup_ratio": 0.5},
            "optimizer.warmup_ratio was 0.03 and is 0.5",
        ),
    ],
)
def test_a_rate_that_jumps_is_said_with_both_values(
    finished: Path,
    command: Any,
    capsys: pytest.CaptureFixture[str],
    step: int,
    changes: dict[str, Any],
    says: str,
) -> None:
    checkpoint = finished / "checkpoints" / f"step-{step:06d}"
    forced = any(key.startswith("optimizer__") for key in changes)
    preparation(
        command(finished, output__resume=str(checkpoint), output__resume_force=forced, **changes)
    )
    said = [line for line in capsys.readouterr().out.splitlines() if ": lr was" in line]
    schedule = changes.get("optimizer__schedule", "cosine")
    total = 10 if "train__epochs" in changes else changes.get("train__max_steps", STEPS)
    warmup = 2 if "optimizer__warmup_ratio" in changes else 1
    before = rates("cosine", STEPS)
    after = rates(schedule, total, changes.get("optimizer__lr", 2e-3), warmup)
    assert said == [line for line in said if line.endswith(says)] and len(said) == 1
    assert f"lr was {before[step - 1]:.3g} at step {step}, " in said[0]
    assert f"is {after[step]:.3g} at step {step + 1}, " in said[0]
    assert step == STEPS or f"that saved had {before[step]:.3g}: " in said[0]


def test_a_rate_that_does_not_jump_is_not_spoken_of(
    finished: Path, run: Runs, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command; and more steps at a constant rate, as transformers' schedule has them."""
    checkpoint = str(finished / "checkpoints" / "step-000002")
    preparation(command(finished, output__resume=checkpoint))
    constant = {"optimizer__schedule": "constant"}
    run("run", 1, train__max_steps=2, **constant)
    capsys.readouterr()
    preparation(command(run.root / "run", train__max_steps=9, **constant))
    assert rates("constant", 9)[2] == rates("constant", 4)[2]
    assert "lr was" not in capsys.readouterr().out


def test_what_is_forced_is_named(
    finished: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    preparation(command(finished, optimizer__max_grad_norm=0.5, output__resume_force=True))
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "resume_force: " in s]
    assert line.endswith("although optimizer.max_grad_norm was 1.0 and is 0.5")


# -- epochs ----------------------------------------------------------------------------------------


def test_epochs_cannot_be_added_after_a_smaller_step(
    run: Runs, refused: Any, tmp_path: Path
) -> None:
    """10 sequences in steps of 4: the third has 2, and a fourth would begin with the 13th."""
    twice = {"train__max_steps": None, "train__epochs": 2}
    run("run", 1, **twice | {"train__epochs": 1})
    said = refused(tmp_path / "run", **twice)
    assert said.startswith("train.epochs: step 3 of ") and "would skip sequences" in said
    # From the step before it nothing is skipped, and the run is the one of two epochs.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    _, lines = run("run", 1, **twice, output__resume=str(checkpoint))
    assert [line["tokens"] > 0 for line in lines] == [True] * 5
    _, whole = run("whole", 1, **twice)
    assert [line["batch_hash"] for line in lines] == [line["batch_hash"] for line in whole]


# -- a run that started from an adapter ------------------------------------------------------------


def from_adapter(adapter: Path) -> dict[str, Any]:
    return {"adapter__path": str(adapter), "adapter__r": None, "adapter__lora_alpha": None}


def test_a_run_that_started_from_an_adapter_needs_it_no_more(
    run: Runs, finished: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(finished / "adapter", tmp_path / "start"))
    [whole], _ = run("whole", 1, **from_adapter(adapter))
    run("run", 1, **from_adapter(adapter), train__max_steps=2)
    shutil.rmtree(adapter)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert (open_adapter(checkpoint).config.r, open_adapter(checkpoint).config.lora_alpha) == (4, 8)
    [(result, printed)], _ = run("run", 1, work=told, **from_adapter(adapter))
    assert "resuming after step 2" in printed
    assert same_bits(result["tensors"], whole["tensors"])


def test_another_adapter_to_start_from_is_another_run(
    run: Runs, refused: Any, finished: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(finished / "adapter", tmp_path / "start"))
    run("run", 1, **from_adapter(adapter), train__max_steps=2)
    edit_json(adapter / "adapter_config.json", lora_alpha=64)
    said = refused(tmp_path / "run", **from_adapter(adapter))
    assert "lora_alpha of the adapter was 8 and is 64" in said


FORMS: dict[str, Any] = {
    "exp_avg": lambda t: t.t().contiguous(),
    "exp_avg_sq": lambda t: t.to(torch.int64),
    "step": lambda t: t.expand(3).contiguous(),
}


@pytest.mark.parametrize("slot", FORMS)
def test_a_state_of_another_form_is_refused(
    run: Runs, finished: Path, tmp_path: Path, slot: str
) -> None:
    """Of a checkpoint whose hashes agree; torch would take it, and fail or broadcast later."""
    saved = read(finished / "checkpoints" / "step-000003")
    states = saved.states["optimizer"]
    key = next(k for k in states if k.endswith(f"lora_A.{slot}"))
    states[key] = FORMS[slot](states[key])
    forged = write(saved, tmp_path / "forged", (finished / "config.yaml").read_text(), keep_last=1)
    with pytest.raises(AssertionError, match=rf"optimizer\.safetensors .* has {key} as "):
        run("run", 1, output__resume=str(forged))


# -- what a run says at its end --------------------------------------------------------------------


def test_the_held_out_loss_before_is_that_of_the_first_start(run: Runs, tmp_path: Path) -> None:
    data = str(save_chats(tmp_path / "held.jsonl", 3))
    settings = {"data__eval": data, "output__eval_every": 2}
    run("run", 1, train__max_steps=2, **settings)
    [(_, printed)], lines = run("run", 1, work=told, **settings)
    losses = {line["step"]: line.get("eval_loss") for line in lines}
    assert list(losses) == [0, 1, 2, 3, 4]
    change = losses[4] / losses[0] - 1
    assert (
        f"held-out loss: {losses[0]:.4f} before, {losses[4]:.4f} after ({change:+.1%})" in printed
    )


def test_a_loss_that_is_no_number_is_said_and_leaves_valid_json(run: Runs, tmp_path: Path) -> None:
    settings = {"optimizer__lr": 1e38, "optimizer__schedule": "constant"}
    [(_, printed)], _ = run("run", 1, work=told, **settings)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    bad = [r["step"] for r in records if r["loss"] is None or r["grad_norm"] is None]
    assert bad and bad[-1] == STEPS
    said = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert said[0].startswith(f"warning: step {bad[0]} has loss ")
    assert said[1].startswith(f"warning: loss or gradient was not finite in {len(bad)} steps")
    assert len(said) == 2
