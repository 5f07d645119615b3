"""What k8s/README.md says: its commands, the names in them, and its tables."""

import importlib.util
import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest
from k8s_dockerfile import build
from k8s_launch import GPU, agent_of, configuration, environment
from k8s_manifests import BUILT, K8S, OVERLAYS, ROOT, documents, jobs, kustomize, pods, read
from k8s_operators import QUEUE
from k8s_restarts import BROKEN, LOST, STOPPED, WRONG, outcome, outcome_by_exit_code
from k8s_values import amount

from dlora.config.load import parse
from dlora.launch import GRACE_SECONDS
from dlora.plan.command import Machines

TEXT = (K8S / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)
COMMANDS = "\n".join(BLOCKS).splitlines()
NAMES = {  # of what the overlays make, by namespace
    ("dlora-demo" if name in ("cpu-demo", "files-demo") else "dlora", doc["metadata"]["name"])
    for name in BUILT
    for doc in documents(name)
}


def row(first: str) -> list[str]:
    """The cells of a table's row, by its first cell."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_is_there(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    options = dict(zip(words, words[1:], strict=False))
    if words[0] == "docker":
        assert words[-1] == "."
        assert (ROOT / options["-f"]).is_file()
        name, _, flavor = options["--build-arg"].partition("=")
        assert name == "FLAVOR"
        assert build(tmp_path / "stages", flavor).entrypoint
        image = options["-t"]
        images = {c["image"] for n in BUILT for p in pods(documents(n)) for c in p.containers}
        assert image in images
    elif words[:2] == ["kubectl", "apply"]:
        if "-k" in words:
            assert kustomize(ROOT / options["-k"])
        else:
            assert (ROOT / options["-f"]).is_file()
    elif words[:2] == ["dlora", "plan"]:
        config = str(ROOT / options["--config"])
        found = parse([config if w.startswith("configs/") else w for w in words[2:]], "p", Machines)
        assert (found.extra.emit, found.extra.emit_to) == (
            "jobset",
            "k8s/overlays/jobset/plan.yaml",
        )
    else:
        assert words[:2] == ["kubectl", "-n"]
        assert any(namespace == words[2] for namespace, _ in NAMES)
        for name in re.findall(r"(?<=[ /])dlora-[a-z-]+(?=[: ]|$)", command):
            secret = f"name: {name}\n" in sources() or f"secretName: {name}\n" in sources()
            assert (words[2], name) in NAMES or secret, name
        if "-l" in options:
            key, _, value = options["-l"].partition("=")
            assert any(p.labels.get(key) == value for p in pods(documents("jobset")))


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
    assert {(doc["kind"], doc["metadata"]["name"]) for doc in read(kustomize(K8S / "base"))} >= {
        ("Namespace", "dlora"),
        ("PersistentVolumeClaim", "dlora-models"),
        ("PersistentVolumeClaim", "dlora-runs"),
    }


def sources() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in K8S.rglob("*.yaml"))


def test_the_overlays_are_listed() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", TEXT, flags=re.MULTILINE) == [
        *("cpu-demo", "jobset", "trainjob", "pytorchjob", "rayjob")
    ]
    assert len(OVERLAYS) == 5


def test_the_table_of_exit_statuses_is_what_the_manifests_do() -> None:
    words = {"fails": "ends", "again": "again, not counted", "counted": "again, "}
    for first, statuses in (
        ("2:", [WRONG]),
        ("143:", [STOPPED, LOST]),
        ("1:", [BROKEN]),
        ("128", [137]),
    ):
        cells = dict(zip(("jobset", "cpu-demo", "pytorchjob", "rayjob"), row(first), strict=True))
        cells["trainjob"] = cells["jobset"]
        for status in statuses:
            assert cells["pytorchjob"].startswith(words[outcome_by_exit_code(status)].split(",")[0])
        for overlay in ("jobset", "trainjob", "cpu-demo"):
            for _, doc, spec in jobs(documents(overlay)):
                for status in statuses:
                    assert cells[overlay].startswith(words[outcome(doc, spec, status)])
    assert (row("1:")[0], row("1:")[1]) == ("again, 10 times", "again, 3 times")
    (ray,) = [doc["spec"] for doc in documents("rayjob") if doc["kind"] == "RayJob"]
    line = shlex.split(ray["entrypoint"])
    times = line[line.index("--max-failures") + 1]
    assert row("1:")[3] == row("128")[3] == f"Ray Train, {times} times"
    assert (row("2:")[3], ray["backoffLimit"]) == ("ends", 0)
    policies = sources()
    assert policies.count("maxRestarts: 10\n") == 2
    assert policies.count("backoffLimit: 3\n") == 1


def test_the_times_to_stop_are_those_of_the_manifests() -> None:
    assert f"they have {GRACE_SECONDS} s for it, the pod 180" in TEXT
    for overlay in OVERLAYS:
        for pod in pods(documents(overlay)):
            given = pod.spec["terminationGracePeriodSeconds"]
            assert given == (30 if "ray-job-submitter" in str(pod.spec) else 180)


def test_output_lies_where_it_is_said() -> None:
    for overlay in OVERLAYS:
        docs = documents(overlay)
        for pod in pods(docs):
            for container in pod.containers:
                words = [*container.get("command", []), *container.get("args", [])]
                if "--config" in words:
                    assert configuration(words, docs).output.dir == f"/runs/{overlay}"
    (job,) = [doc for doc in documents("rayjob") if doc["kind"] == "RayJob"]
    words = shlex.split(job["spec"]["entrypoint"])
    options = dict(zip(words, words[1:], strict=False))
    run = Path(options["--storage"]) / Path(options["--output.dir"]).name
    assert f"`{run}/`" in TEXT


def test_the_sizes_are_those_of_the_manifests() -> None:
    """Two pods of eight GPUs, the demo's two ranks, and its volume."""
    for overlay, nodes, ranks in (("jobset", 2, 8), ("pytorchjob", 2, 8), ("cpu-demo", 1, 2)):
        docs = documents(overlay)
        (pod,) = pods(docs)
        (container,) = pod.containers
        line = [*container["command"], *container["args"]]
        agent = agent_of(line, environment(pod, container, docs))
        assert str(agent.nnodes).split(":")[-1] == str(nodes)
        assert agent.nproc_per_node == str(ranks)
    claims = [doc for doc in documents("cpu-demo") if doc["kind"] == "PersistentVolumeClaim"]
    assert [claim["spec"]["resources"]["requests"]["storage"] for claim in claims] == ["5Gi"]
    assert claims[0]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_every_rank_gets_the_entries_of_the_secret() -> None:
    wanted = {"secretRef": {"name": "dlora-credentials", "optional": True}}
    for overlay in set(OVERLAYS) - {"cpu-demo"}:
        for pod in pods(documents(overlay)):
            for container in pod.containers:
                if container["name"] != "ray-job-submitter":
                    assert wanted in container["envFrom"], pod.where


def test_ray_s_probes_need_no_token() -> None:
    """Its own lists of paths that are open say so."""
    found = importlib.util.find_spec("ray")
    assert found is not None and found.submodule_search_locations
    dashboard = Path(found.submodule_search_locations[0]) / "dashboard"
    agent, head = (
        (dashboard / f"http_server_{name}.py").read_text(encoding="utf-8")
        for name in ("agent", "head")
    )
    of_agent = re.search(r"PUBLIC_EXACT_PATHS = \[(.*?)\]", agent, flags=re.DOTALL)
    of_head = re.search(r"public_exact_paths = \{(.*?)\}", head, flags=re.DOTALL)
    assert of_agent and of_head
    asked = [
        (container[probe]["httpGet"]["port"], container[probe]["httpGet"]["path"])
        for pod in pods(documents("rayjob"))
        for container in pod.containers
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if probe in container
    ]
    assert len(asked) == 6
    for port, path in asked:
        assert f'"{path}"' in {52365: of_agent[1], 8265: of_head[1]}[port]


@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"cpu-demo"}))
def test_the_queue_to_begin_with_has_room_for_it(overlay: str) -> None:
    """Kueue never starts what asks for more, or for a resource that the queue does not cover."""
    (queue,) = [doc for doc in documents("kueue") if doc["kind"] == "ClusterQueue"]
    (group,) = queue["spec"]["resourceGroups"]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
    assert set(quota) == set(group["coveredResources"])
    asked = dict.fromkeys(quota, Decimal(0))
    for pod in pods(documents(overlay)):
        times = 2 if GPU in str(pod.spec["containers"]) else 1
        for container in pod.containers:
            for name, value in container["resources"]["requests"].items():
                asked[name] += times * amount(value)
    assert asked[GPU] == 16
    assert all(asked[name] <= quota[name] for name in asked), asked
    names = {doc["metadata"]["name"] for doc in documents("kueue") if doc["kind"] == "LocalQueue"}
    assert {doc["metadata"].get("labels", {}).get(QUEUE) for doc in documents(overlay)} - {
        None
    } == names
