"""Trackers that the tests' own environment lacks: each is asked for what it has of a run.

And a notebook, which shows the bar of a run.
"""

import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from partners import PLACE, partner, told_by
from programs import free_ports

from dlora.metrics.log import read_metrics

READ = {  # argument: the run's id; prints [{step: loss}, train.max_steps]
    "mlflow": """
import json, sys
from mlflow import MlflowClient
client, run = MlflowClient(), sys.argv[1]
history = client.get_metric_history(run, "loss")
assert client.get_run(run).info.status == "FINISHED"
assert len({m.step for m in history}) == len(history)
shown = client.get_run(run).data.params["train.max_steps"]
print(json.dumps([{m.step: m.value for m in history}, shown]))
""",
    "trackio": """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
lines = SQLiteStorage.get_logs("dlora", sys.argv[1])
assert len({line["step"] for line in lines}) == len(lines)
config = SQLiteStorage.get_all_run_configs("dlora")
shown = next(c for c in config.values() if "train.max_steps" in c)
print(json.dumps([{line["step"]: line["loss"] for line in lines}, shown["train.max_steps"]]))
""",
    "aim": """
import json, subprocess, sys
from pathlib import Path
from aim import Repo
reindex = [str(Path(sys.executable).with_name("aim")), "storage", "--repo", ".", "reindex"]
subprocess.run(reindex, input="y\\n", text=True, check=True, stdout=subprocess.DEVNULL)
run = Repo(".").get_run(sys.argv[1])
loss = next(m for m in run.metrics() if m.name == "loss")
_, values = loss.values.sparse_list()
print(json.dumps([sorted(values), run["hparams"]["train.max_steps"]]))
""",
    "comet_ml": """
import json, sys, zipfile
from pathlib import Path
found, shown = {}, None
for path in Path("comet").glob(f"{sys.argv[1]}*.zip"):
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)
            payload = message["payload"]
            metric, param = payload.get("metric") or {}, payload.get("param") or {}
            if metric.get("metricName") == "loss":
                assert metric["step"] not in found
                found[metric["step"]] = metric["metricValue"]
            if param.get("paramName") == "train.max_steps":
                shown = param["paramValue"]
print(json.dumps([found, shown]))
""",
}


@pytest.mark.full
@pytest.mark.parametrize("name", READ)
def test_a_tracker_has_every_step_once_across_a_stop(name: str, words: Any, tmp_path: Path) -> None:
    where = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
    }
    run = tmp_path / "run"
    for steps in (2, 3):
        argv = words(run, output__report_to=[name], output__save_every=1, train__max_steps=steps)
        partner("-m", "dlora.train", *argv, cwd=tmp_path, **where)
    (identity,) = json.loads((run / "trackers.json").read_text()).values()
    found, shown = told_by(READ[name], identity, cwd=tmp_path, **where)
    losses = {str(line["step"]): line["loss"] for line in read_metrics(run / "metrics.jsonl")}
    assert len(losses) == 3
    if name == "aim":
        assert found == pytest.approx(sorted(losses.values()))
    else:
        assert found == pytest.approx(losses)
    assert int(shown) in (2, 3)


@pytest.mark.full
def test_a_server_of_mlflow_has_every_step(words: Any, tmp_path: Path) -> None:
    """As a team runs one: by address, over HTTP."""
    [port] = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--port", str(port)]
    command = [str(PLACE / "bin/python"), "-m", "mlflow", "server", "--host", "127.0.0.1", *store]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 240
            while not answers(f"{address}/health"):
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.5)
            where = {"MLFLOW_TRACKING_URI": address}
            argv = words(tmp_path / "run", output__report_to=["mlflow"], train__max_steps=3)
            partner("-m", "dlora.train", *argv, cwd=tmp_path, **where)
            (identity,) = json.loads((tmp_path / "run/trackers.json").read_text()).values()
            found, _ = told_by(READ["mlflow"], identity, cwd=tmp_path, **where)
        finally:
            server.terminate()
            server.wait(60)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert found == pytest.approx({str(line["step"]): line["loss"] for line in lines})


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


NOTEBOOK = """
import json, sys
import nbformat
from nbclient import NotebookClient
source = f"from dlora.train import main\\nstatus = main({sys.argv[1:]!r})\\nassert status == 0"
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
NotebookClient(book, timeout=300, kernel_name="python3").execute()
widgets = book.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
print(json.dumps([book.cells[0].outputs, widgets]))
"""


@pytest.mark.full
def test_a_notebook_shows_the_bar(words: Any, tmp_path: Path) -> None:
    argv = words(tmp_path / "run", train__max_steps=3)
    shown, widgets = told_by(NOTEBOOK, *argv, cwd=tmp_path)
    views = [o for o in shown if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert views
    states = (widget["state"] for widget in widgets["state"].values())
    texts = [o["data"]["text/html"] for s in states for o in s.get("outputs", []) if "data" in o]
    assert any("step 3/3" in re.sub(r"<[^>]*>", "", text) for text in texts), texts
    printed = "".join(o["text"] for o in shown if o["output_type"] == "stream")
    assert "step 3/3" not in printed
