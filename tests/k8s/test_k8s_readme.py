"""What k8s/README.md says: its commands, the names in them, and its tables."""

import importlib.util
import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest
from k8s_launch import GPU, agent_of, command_of, environment, understood
from k8s_manifests import (
    BUILT,
    K8S,
    OVERLAYS,
    ROOT,
    at,
    documents,
    jobs,
    kustomize,
    pods,
    read,
    the,
)
from k8s_operators import QUEUE
from k8s_restarts import BROKEN, LOST, STOPPED, WRONG, outcome, outcome_by_exit_code
from k8s_values import amount

from dlora.config.load import parse
from dlora.launch import GRACE_SECONDS
from dlora.plan.command import Machines

TEXT = (K8S / "README.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)).splitlines()
SOURCES = "".join(path.read_text(encoding="utf-8") for path in K8S.rglob("*.yaml"))
PODS = [(name, pod) for name in BUILT for pod in pods(documents(name))]
TRAINING = [(n, p, c) for n, p in PODS for c in p.containers if p.trains(c)]
NAMES = {  # of what the overlays make, by namespace
    ("dlora-demo" if name in ("cpu-demo", "files-demo") else "dlora", doc["metadata"]["name"])
    for name in BUILT
    for doc in documents(name)
}


def row(first: str) -> list[str]:
    """The cells of a table's row, by its first cell."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_names_what_is_there(command: str) -> None:
    words = shlex.split(command)
    options = dict(zip(words, words[1:], strict=False))
    if words[0] == "docker":
        flavor = options["--build-arg"].removeprefix("FLAVOR=")
        assert words[-1] == "."
        assert f" AS {flavor}\n" in (ROOT / options["-f"]).read_text(encoding="utf-8")
        assert options["-t"] in {c["image"] for _, pod in PODS for c in pod.containers}
    elif words[:2] == ["kubectl", "apply"]:
        is_file = "-f" in words and (ROOT / options["-f"]).is_file()
        assert is_file or kustomize(ROOT / options["-k"])
    elif words[:2] == ["dlora", "plan"]:
        config = str(ROOT / options["--config"])
        found = parse([config if w.startswith("configs/") else w for w in words[2:]], "p", Machines)
        assert found.extra.emit == "jobset"
        assert found.extra.emit_to == "k8s/overlays/jobset/plan.yaml"
    else:
        assert words[:2] == ["kubectl", "-n"]
        for name in re.findall(r"(?<=[ /])dlora-[a-z-]+(?=[: ]|$)", command.partition(" -n ")[2]):
            is_secret = re.search(rf"(name|secretName): {name}\n", SOURCES)
            assert is_secret or (words[2], name) in NAMES, name
        assert words[2] in {namespace for namespace, _ in NAMES}
        if "-l" in options:
            key, _, value = options["-l"].partition("=")
            assert any(pod.labels.get(key) == value for _, pod in PODS)


def test_the_base_model_is_there_before_the_job() -> None:
    """A job that does not find it ends with 2, which nobody tries again."""
    steps = (
        "kubectl apply -k k8s/base",
        "kubectl apply -k k8s/files",
        "kubectl -n dlora wait --for=condition=Ready --timeout=15m pod/dlora-files",
        "kubectl -n dlora cp BASE dlora-files:/models/base",
        "kubectl apply -k k8s/kueue",
        "kubectl apply -k k8s/overlays/jobset",
    )
    lines = [COMMANDS.index(step) for step in steps]
    assert lines == sorted(lines)
    made = {(doc["kind"], doc["metadata"]["name"]) for doc in read(kustomize(K8S / "base"))}
    claims = {("PersistentVolumeClaim", name) for name in ("dlora-models", "dlora-runs")}
    assert made >= claims | {("Namespace", "dlora")}


def test_the_overlays_are_listed() -> None:
    assert sorted(re.findall(r"(?m)^\| `([a-z-]+)` \|", TEXT)) == OVERLAYS


def test_the_table_of_exit_statuses_is_what_the_manifests_do() -> None:
    words = {"fails": "ends", "again": "again, not counted", "counted": "again, "}
    kinds = ("jobset", "cpu-demo", "pytorchjob", "rayjob")
    table = {"2:": [WRONG], "143:": [STOPPED, LOST], "1:": [BROKEN], "128": [137]}
    for first, statuses in table.items():
        cells = dict(zip(kinds, row(first), strict=True))
        cells["trainjob"] = cells["jobset"]
        for status in statuses:
            assert cells["pytorchjob"].startswith(words[outcome_by_exit_code(status)].split(",")[0])
            for overlay in ("jobset", "trainjob", "cpu-demo"):
                for doc, spec in jobs(documents(overlay)):
                    assert cells[overlay].startswith(words[outcome(doc, spec, status)])
    assert row("1:")[:2] == row("128")[:2] == ["again, 10 times", "again, 3 times"]
    assert SOURCES.count("maxRestarts: 10\n") == 2
    assert SOURCES.count("backoffLimit: 3\n") == 1
    ray = the(documents("rayjob"), "RayJob")["spec"]
    times = re.findall(r"--max-failures (\d+)", ray["entrypoint"])
    assert row("1:")[3] == row("128")[3] == f"Ray Train, {times[0]} times"
    assert (row("2:")[3], ray["backoffLimit"]) == ("ends", 0)


def test_the_times_to_stop_are_those_of_the_manifests() -> None:
    assert f"they have {GRACE_SECONDS} s for it, the pod 180" in TEXT
    assert {pod.spec["terminationGracePeriodSeconds"] for _, pod, _ in TRAINING} == {180}


def test_output_is_where_it_is_said() -> None:
    for overlay, pod, container in TRAINING:
        docs = documents(overlay)
        line = command_of(pod, container, docs)
        assert understood(line, docs).config.output.dir == f"/runs/{overlay}"
        if overlay == "rayjob":
            options = dict(zip(line, line[1:], strict=False))
            run = Path(options["--storage"]) / Path(options["--output.dir"]).name
            assert f"`{run}/`" in TEXT


def test_the_sizes_are_those_of_the_manifests() -> None:
    """Two pods of eight GPUs, the demo's two ranks, and its volume."""
    found = {}
    for overlay, pod, container in TRAINING:
        if overlay != "rayjob":
            docs = documents(overlay)
            variables = environment(pod, container, docs)
            agent = agent_of(command_of(pod, container, docs), variables)
            found[overlay] = str(agent.nnodes).split(":")[-1], agent.nproc_per_node
    gpus = dict.fromkeys(("jobset", "trainjob", "pytorchjob"), ("2", "8"))
    assert found == {"cpu-demo": ("1", "2"), **gpus}
    claim = the(documents("cpu-demo"), "PersistentVolumeClaim")["spec"]
    storage = claim["resources"]["requests"]["storage"]
    assert (storage, claim["accessModes"]) == ("5Gi", ["ReadWriteOnce"])


def test_every_rank_gets_the_entries_of_the_secret() -> None:
    wanted = {"secretRef": {"name": "dlora-credentials", "optional": True}}
    for overlay, pod, container in TRAINING:
        assert overlay == "cpu-demo" or wanted in container["envFrom"], pod.where


def test_ray_s_probes_need_no_token() -> None:
    """Its own lists of paths that are open say so."""
    found = importlib.util.find_spec("ray")
    assert found is not None and found.submodule_search_locations
    dashboard = Path(found.submodule_search_locations[0]) / "dashboard"
    agent = (dashboard / "http_server_agent.py").read_text(encoding="utf-8")
    head = (dashboard / "http_server_head.py").read_text(encoding="utf-8")
    is_open = {
        52365: re.findall(r"PUBLIC_EXACT_PATHS = \[(.*?)\]", agent, flags=re.DOTALL)[0],
        8265: re.findall(r"public_exact_paths = \{(.*?)\}", head, flags=re.DOTALL)[0],
    }
    asked = [
        probe
        for pod in pods(documents("rayjob"))
        for kind in ("startupProbe", "livenessProbe", "readinessProbe")
        for probe in at(pod.spec, f"containers.*.{kind}.httpGet")
    ]
    assert len(asked) == 6
    assert all(f'"{probe["path"]}"' in is_open[probe["port"]] for probe in asked)


@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"cpu-demo"}))
def test_the_queue_to_begin_with_has_room_for_it(overlay: str) -> None:
    """Kueue never starts what asks for more, or for a resource that the queue does not cover."""
    (group,) = the(documents("kueue"), "ClusterQueue")["spec"]["resourceGroups"]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
    assert set(quota) == set(group["coveredResources"])
    asked = dict.fromkeys(quota, Decimal(0))
    for pod in pods(documents(overlay)):
        times = 2 if GPU in str(pod.spec["containers"]) else 1
        for requests in at(pod.spec, "containers.*.resources.requests"):
            for name, value in requests.items():
                asked[name] += times * amount(value)
    assert asked[GPU] == 16
    assert all(asked[name] <= quota[name] for name in asked), asked
    queue = the(documents("kueue"), "LocalQueue")["metadata"]["name"]
    labels = [doc["metadata"].get("labels", {}) for doc in documents(overlay)]
    assert {found[QUEUE] for found in labels if QUEUE in found} == {queue}
