"""Where figures go beside the files: trackers, Prometheus, and the program that calls a run."""

import json
import os
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from refusals import refusal
from run_training import figures, prepared_run
from tiny import save_chats
from wandb.proto import wandb_internal_pb2

from dlora.hooks import Hooks
from dlora.metrics.log import read_metrics
from dlora.train import main
from dlora.training.rates import flops_per_token, peak_of

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
BLOCK = 32768  # of a .wandb file, which is a log in LevelDB's format


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """For the worker processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_API_KEY", raising=False)
        yield


def records(path: Path) -> Iterator[Any]:
    """W&B's records in one of its files."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def stored(run: Path) -> list[tuple[str, dict[int, dict[str, Any]], dict[str, Any]]]:
    """(id, {step: figures}, configuration) of each time that W&B was started in a run."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        lines, settings = {}, {}
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                lines[line["_step"]] = line
            if record.WhichOneof("record_type") == "config":
                settings |= {i.key: json.loads(i.value_json) for i in record.config.update}
            if record.WhichOneof("record_type") == "run":
                updates = record.run.config.update
                settings |= {i.key: json.loads(i.value_json) for i in updates}
        found.append((path.stem.removeprefix("run-"), lines, settings))
    return found


def check_lines(lines: dict[int, dict[str, Any]], of_run: list[dict[str, Any]]) -> None:
    """What W&B has of these lines is what stands in the file."""
    for line in of_run:
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        assert numbers.items() <= lines[line["step"]].items()


def test_wandb_has_every_step_once_across_a_stop(words: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"output__report_to": ["wandb"], "output__save_every": 2}
    assert main(words(run, **settings, train__max_steps=3)) == 0
    before = read_metrics(run / "metrics.jsonl")
    place = str(run / "checkpoints/step-000002")
    assert main(words(run, **settings, train__max_steps=4, output__resume=place)) == 0
    (first, early, shown), (second, late, _) = stored(run)
    assert first == second == json.loads((run / "trackers.json").read_text())["wandb"]
    assert (list(early), list(late)) == ([1, 2, 3], [4])
    check_lines(early, before)
    check_lines(late, read_metrics(run / "metrics.jsonl")[3:])
    assert shown["train.max_steps"] == 3
    assert shown["sharding.base"] == "none"
    assert shown["output.report_to"] == '["wandb"]'
    # Another run in the same directory is another run there.
    assert main(words(run, **settings, train__max_steps=1, output__resume="none")) == 0
    assert stored(run)[-1][0] != first


def test_rank_0_alone_reports_and_all_ranks_hear(run: Any, tmp_path: Path) -> None:
    results, lines = run("two", 2, work=heard, output__report_to=["wandb"], train__max_steps=2)
    ((_, sent, _),) = stored(tmp_path / "two")
    check_lines(sent, read_metrics(tmp_path / "two/metrics.jsonl"))
    for result in results:
        assert [step for step, _ in result] == [line["step"] for line in lines] == [1, 2]
        for (_, got), line in zip(result, lines, strict=True):
            own = {"wire_bytes"}  # each rank's
            assert {k: got[k] for k in line if k not in own} == {
                k: v for k, v in line.items() if k not in own
            }


def heard(argv: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """What a rank's `Hooks.logged` gets."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")  # of this worker
    got: list[tuple[int, dict[str, Any]]] = []
    run = prepared_run(argv, Hooks(logged=lambda step, figures: got.append((step, dict(figures)))))
    assert run.train() == 0
    run.checkpoints.close()
    return got


def test_prometheus_reads_the_latest_figures(words: Any, tmp_path: Path) -> None:
    port, seen = free_port(), []

    def scrape(step: int, figures: Any) -> None:
        for accept, parse in ((OPENMETRICS, openmetrics), ("text/plain", plain_text)):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics")
            request.add_header("Accept", accept)
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.headers["Content-Type"].startswith(accept.split(";")[0])
                families = list(parse(answer.read().decode()))
            samples = {s.name: s for family in families for s in family.samples}
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            for name, value in numbers.items():
                assert samples[f"dlora_{name}"].value == value
            assert samples["dlora_run_info"].labels["dir"] == str(tmp_path / "run")
            assert samples["dlora_eval_loss"].value > 0  # stays until it is evaluated again
        seen.append(step)

    held = str(save_chats(tmp_path / "held.jsonl", 2))
    settings = {"data__eval": held, "train__max_steps": 3, "output__eval_every": 3}
    argv = words(tmp_path / "run", **settings, output__metrics_port=port)
    assert main(argv, Hooks(logged=scrape)) == 0
    assert seen == [0, 1, 2, 3]
    with socket.create_server(("127.0.0.1", port)):  # free again
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


MISTAKES = {  # settings; what the line says
    "package": (
        {"output__report_to": ["comet_ml"]},
        "output.report_to: comet_ml is not installed: pip install comet_ml",
    ),
    "name": ({"output__report_to": ["wnadb"]}, "output.report_to: expected a list of tensorboard"),
    "twice": ({"output__report_to": ["wandb", "wandb"]}, "output.report_to: wandb is there twice"),
    "board": (
        {"output__report_to": ["tensorboard"], "output__tensorboard": False},
        "output.report_to: tensorboard contradicts output.tensorboard: false",
    ),
    "idle": (
        {"output__report_to": ["wandb"], "output__log_every": 0},
        "output.report_to: ['wandb'] cannot act: no step is logged",
    ),
    "idle port": (
        {"output__metrics_port": 9100, "output__log_every": 0},
        "output.metrics_port: 9100 cannot act: no step is logged",
    ),
    "port": ({"output__metrics_port": 70000}, "output.metrics_port: must be >= 1 and <= 65535"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, words: Any, tmp_path: Path, no_weights_are_read: None, monkeypatch: Any
) -> None:
    (tmp_path / "comet_ml").mkdir()  # a directory of that name is no package
    monkeypatch.syspath_prepend(tmp_path)
    settings, said = MISTAKES[mistake]
    assert said in refusal(main, words(tmp_path / "run", **settings))


def test_a_tracker_that_cannot_start_is_one_line(words: Any, tmp_path: Path) -> None:
    """In a process of its own: W&B reads its environment once."""
    away = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "dlora.train",
            *words(tmp_path / "run", output__report_to=["wandb"]),
        ],
        env=os.environ | away | {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "dlora: error: output.report_to: wandb cannot start: "
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_port_that_is_taken_is_one_line(
    words: Any, tmp_path: Path, no_weights_are_read: None
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        said = refusal(main, words(tmp_path / "run", output__metrics_port=port))
    assert said == f"output.metrics_port: {port} cannot be opened: Address already in use"


def test_tensorboard_shows_the_configuration(words: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on = {"output__tensorboard": True, "train__max_steps": 1}
    assert main(words(tmp_path / "run", **on, output__report_to=["tensorboard"])) == 0
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert "loss" in board.Tags()["scalars"]
    (event,) = board.Tensors("config/text_summary")
    assert b"max_steps: 1" in event.tensor_proto.string_val[0]


def test_operations_of_a_token_do_not_count_what_is_computed_again(run: Any) -> None:
    (once,), _ = run("once", 1, work=counted)
    (again,), _ = run("again", 1, work=counted, sharding__activation_checkpointing=True)
    assert once == again
    flops, matrices = once
    # Forward, and backward to the inputs; A and B, attention and fewer targets are the rest.
    assert 0.8 * 4 * matrices < flops < 1.5 * 4 * matrices


def counted(argv: list[str]) -> tuple[float, int]:
    """Operations of a token, and elements of the frozen matrices that it is multiplied with."""
    run = prepared_run(argv)
    run.checkpoints.close()
    frozen = (p for n, p in run.model.named_parameters() if "embed" not in n and "lora" not in n)
    matrices = sum(p.numel() for p in frozen if p.ndim == 2)
    return flops_per_token(run.config, run.prepared, "cpu"), matrices


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_rates_are_those_of_the_line(words: Any, tmp_path: Path) -> None:
    assert main(words(tmp_path / "run", train__max_steps=1)) == 0
    (line,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert line["all_tokens_per_second_per_device"] == line["all_tokens_per_second"]
    assert "mfu" not in line  # of a CPU no peak is known
    assert "all_tokens_per_second_per_device" not in figures(tmp_path / "run")[0]
