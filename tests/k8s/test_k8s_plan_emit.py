"""`dlora plan --emit`: the patch applies to its overlay, and what comes out is sound."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import k8s_crd
import pytest
import yaml
from k8s_checks import CHECKS
from k8s_launch import configuration
from k8s_manifests import K8S, ROOT, Document, documents, kustomize, pods, read

from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.plan.command import main
from dlora.plan.kustomize import KINDS

CLUSTER = str(ROOT / "configs" / "cluster.yaml")
MACHINES = {"nodes": 3, "gpus_per_node": 4}
GPU = "nvidia.com/gpu"


def emitted(
    capsys: pytest.CaptureFixture[str], model: str, kind: str, *words: str, **machines: int
) -> str:
    """What the command prints."""
    numbers = {**MACHINES, **machines}
    line = [f"--{key.replace('_', '-')}={value}" for key, value in numbers.items()]
    line += [f"--config={CLUSTER}", f"--model.path={model}", "--gpu-memory-gb=80"]
    capsys.readouterr()
    assert main([*line, f"--emit={kind}", *words]) == 0
    return capsys.readouterr().out


def applied(text: str, kind: str, folder: Path) -> list[Document]:
    """The overlay of that name with the patch, as a user would add it to one of their own."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.yaml").write_text(text)
    kustomization = {
        "resources": [os.path.relpath(K8S / "overlays" / kind, folder.resolve())],
        "patches": [{"path": "plan.yaml", "target": {"kind": KINDS[kind]}}],
        "sortOptions": {"order": "fifo"},  # as trainjob's own, which counts no more here
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return read(kustomize(folder))


def the_job(docs: list[Document], kind: str) -> Document:
    (found,) = [doc for doc in docs if doc["kind"] == KINDS[kind]]
    return found


def command_of(job: Document) -> list[str]:
    """The words that reach dlora."""
    spec: Any = job["spec"]
    if job["kind"] == "RayJob":
        return shlex.split(spec["entrypoint"])
    if job["kind"] == "TrainJob":
        return spec["trainer"]["args"]
    (pod,) = pods([job])
    return pod.containers[0]["args"]


def config_of(docs: list[Document], kind: str) -> Config:
    return configuration(command_of(the_job(docs, kind)), docs)


@pytest.fixture(scope="module")
def model(saved_models: Any) -> str:
    return saved_models("llama")


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_becomes_a_sound_manifest(
    kind: str, nodes: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = emitted(capsys, model, kind, nodes=nodes)
    docs = applied(text, kind, tmp_path)
    for name, check in CHECKS.items():
        assert check(docs) == [], name
    spec = the_job(docs, kind)["spec"]
    if kind == "rayjob":
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (nodes,) * 3
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert f"--num-workers {4 * nodes} --use-gpu" in spec["entrypoint"]
    elif kind == "trainjob":
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (nodes, 4)
        resources = spec["trainer"]["resourcesPerNode"]
    else:
        job = spec["replicatedJobs"][0]["template"]["spec"]
        assert (job["parallelism"], job["completions"]) == (nodes, nodes)
        (container,) = job["template"]["spec"]["containers"]
        assert [v["value"] for v in container["env"][:2]] == [str(nodes), "4"]
        resources = container["resources"]
    assert resources == {  # half of what the overlay's eight GPUs have beside them
        "requests": {"cpu": "16", "memory": "128Gi", GPU: 4},
        "limits": {"cpu": "32", "memory": "256Gi", GPU: 4},
    }
    assert config_of(docs, kind).sharding.base == "none", "a small base fits each rank"


@pytest.mark.skipif(k8s_crd.folder() is None, reason=k8s_crd.ABSENT)
@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_the_definition(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert k8s_crd.check(applied(emitted(capsys, model, kind), kind, tmp_path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_placement_and_overrides_reach_the_run(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing of what is called otherwise on the planning machine does."""
    words = ("--adapter.r=4", '--adapter.rank_pattern={"q_proj": 2}', "--sharding.base=node")
    words += ("--sharding.optimizer_state=auto", "--output.dir=here")
    docs = applied(emitted(capsys, model, kind, *words), kind, tmp_path)
    config = config_of(docs, kind)
    assert config.sharding.base == "node"
    assert config.sharding.optimizer_state == "replicated"
    assert (config.adapter.r, config.adapter.rank_pattern) == (4, {"q_proj": 2})
    assert config.model.path == "/models/base"
    assert config.output.dir == f"/runs/{kind}"


def test_the_overlay_is_the_plan_for_its_machines(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The entry point is written whole: it has to be the overlay's, with options added."""
    text = emitted(capsys, model, "rayjob", nodes=2, gpus_per_node=8)
    before, after = (
        the_job(documents("rayjob"), "rayjob"),
        the_job(applied(text, "rayjob", tmp_path), "rayjob"),
    )
    line = before["spec"].pop("entrypoint")
    assert after["spec"].pop("entrypoint").split(" --sharding.")[0] == line
    assert after == before


def test_a_file_is_written_and_the_plan_printed(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    table = emitted(capsys, model, "jobset", f"--emit-to={file}")
    assert "takes      base: none" in table
    assert "- {path: plan.yaml, target: {kind: JobSet}}" in file.read_text()
    printed = emitted(capsys, model, "jobset")
    assert file.read_text() == printed.replace("{path: FILE,", "{path: plan.yaml,")


def test_the_patch_names_the_file_that_the_pods_read(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = emitted(capsys, model, "jobset")
    assert "# The pods read /etc/dlora/cluster.yaml: configs/Kustomization has to list it" in text
    assert "- cluster.yaml\n" in (ROOT / "configs" / "Kustomization").read_text()


def test_an_overlay_that_has_changed_refuses(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = emitted(capsys, model, "jobset").replace("PET_NNODES", "PET_OTHER")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        applied(text, "jobset", tmp_path)
    assert "testing value" in caught.value.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--emit pod --gpu-memory-gb 80", "emit: expected one of rayjob, trainjob, jobset"),
        ("--emit jobset", "--emit needs --gpu-memory-gb"),
        ("--emit-to x.yaml", "--emit-to needs --emit"),
        ("--emit jobset --gpu-memory-gb 80 --format json", "--format: --emit prints a patch"),
        ("--emit jobset --gpu-memory-gb 0.0001", "--emit: "),
        ("--emit jobset --gpu-memory-gb 80 --emit-to /no/such/x.yaml", "--emit-to /no/such/x.yaml"),
    ],
)
def test_a_mistake_is_one_line(words: str, says: str, model: str) -> None:
    with pytest.raises(UsageError, match=f"^{says}"):
        main([*words.split(), "--config", CLUSTER, "--model.path", model])


def test_a_patch_needs_a_file_that_the_pods_read(model: str) -> None:
    words = f"--model.path {model} --data.train x.jsonl --output.dir y --emit jobset"
    with pytest.raises(UsageError, match="^--emit needs --config FILE"):
        main([*words.split(), "--gpu-memory-gb=80"])
