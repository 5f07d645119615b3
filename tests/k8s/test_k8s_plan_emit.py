"""`dlora plan --emit`: the patch applies to its overlay, and what comes out is sound."""

import contextlib
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import k8s_schema
import pytest
import yaml
from k8s_faults import CHECKS
from k8s_launch import command_of, understood
from k8s_manifests import K8S, ROOT, Document, documents, kustomize, pods, read, the

from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.plan.command import main
from dlora.plan.kustomize import KINDS

CLUSTER = str(ROOT / "configs" / "cluster.yaml")
Emit = Callable[..., str]


@pytest.fixture(scope="module")
def model(saved_models: Any) -> str:
    return saved_models("llama")


@pytest.fixture(scope="module")
def emitted(model: str) -> Emit:
    """`emitted(kind, words, nodes=3, gpus=4)`: what the command prints."""
    printed: dict[Any, str] = {}

    def emit(kind: str, *words: str, nodes: int = 3, gpus: int = 4) -> str:
        line = [f"--emit={kind}", f"--nodes={nodes}", f"--gpus-per-node={gpus}", *words]
        if tuple(line) not in printed:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                whole = [f"--config={CLUSTER}", f"--model.path={model}", "--gpu-memory-gb=80"]
                assert main([*whole, *line]) == 0
            printed[tuple(line)] = out.getvalue()
        return printed[tuple(line)]

    return emit


def applied(text: str, kind: str, folder: Path) -> list[Document]:
    """The overlay of that name with the patch, as a user would add it to one of their own."""
    (folder / "plan.yaml").write_text(text)
    kustomization = {
        "resources": [os.path.relpath(K8S / "overlays" / kind, folder.resolve())],
        "patches": [{"path": "plan.yaml", "target": {"kind": KINDS[kind]}}],
        "sortOptions": {"order": "fifo"},  # as trainjob's own, which counts no more here
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return read(kustomize(folder))


def config_of(docs: list[Document]) -> Config:
    pod = pods(docs)[-1]  # a RayJob's worker, or the only one
    return understood(command_of(pod, pod.containers[0], docs), docs).config


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_becomes_a_sound_manifest(
    kind: str, nodes: int, emitted: Emit, tmp_path: Path
) -> None:
    """The checks compare ranks, GPUs, pods and nodes with each other; here they are the plan's."""
    text = emitted(kind, nodes=nodes)
    docs = applied(text, kind, tmp_path)
    for name, check in CHECKS.items():
        assert check(docs) == [], name
    written = {tuple(op["path"].split("/")[-2:]): op["value"] for op in yaml.safe_load(text)}
    counts = {
        "jobset": ("parallelism", "completions"),
        "trainjob": ("numNodes",),
        "rayjob": ("replicas", "minReplicas", "maxReplicas"),
    }
    assert {written[key] for key in written if key[1] in counts[kind]} == {nodes}
    resources = {  # half of what the overlay's eight GPUs have beside them
        "requests": {"cpu": "16", "memory": "128Gi", "nvidia.com~1gpu": "4"},
        "limits": {"cpu": "32", "memory": "256Gi", "nvidia.com~1gpu": "4"},
    }
    for part, amounts in resources.items():
        assert {key[1]: value for key, value in written.items() if key[0] == part} == amounts
    assert config_of(docs).sharding.base == "none", "a small base fits each rank"


@pytest.mark.skipif(not k8s_schema.FOLDER.is_dir(), reason=k8s_schema.ABSENT)
@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_the_definition(kind: str, emitted: Emit, tmp_path: Path) -> None:
    assert k8s_schema.check_custom(applied(emitted(kind), kind, tmp_path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_placement_and_overrides_reach_the_run(kind: str, emitted: Emit, tmp_path: Path) -> None:
    """And nothing of what is called otherwise on the planning machine does."""
    words = ("--adapter.r=4", '--adapter.rank_pattern={"q_proj": 2}', "--sharding.base=node")
    words += ("--sharding.optimizer_state=auto", "--output.dir=here")
    config = config_of(applied(emitted(kind, *words), kind, tmp_path))
    assert config.sharding.base == "node"
    assert config.sharding.optimizer_state == "replicated"
    assert (config.adapter.r, config.adapter.rank_pattern) == (4, {"q_proj": 2})
    assert config.model.path == "/models/base"
    assert config.output.dir == f"/runs/{kind}"


def test_the_overlay_is_the_plan_for_its_machines(emitted: Emit, tmp_path: Path) -> None:
    """The entry point is written whole: it has to be the overlay's, with options added."""
    text = emitted("rayjob", nodes=2, gpus=8)
    before, after = (
        the(d, "RayJob") for d in (documents("rayjob"), applied(text, "rayjob", tmp_path))
    )
    line = before["spec"].pop("entrypoint")
    assert after["spec"].pop("entrypoint").split(" --sharding.")[0] == line
    assert after == before


def test_a_file_is_written_and_the_plan_printed(emitted: Emit, tmp_path: Path) -> None:
    file, printed = tmp_path / "plan.yaml", emitted("jobset")
    assert "takes      base: none" in emitted("jobset", f"--emit-to={file}")
    assert "- {path: plan.yaml, target: {kind: JobSet}}" in file.read_text()
    assert file.read_text() == printed.replace("{path: FILE,", "{path: plan.yaml,")
    assert (
        "# The pods read /etc/dlora/cluster.yaml: configs/Kustomization has to list it" in printed
    )
    assert "- cluster.yaml\n" in (ROOT / "configs" / "Kustomization").read_text()


def test_an_overlay_that_has_changed_refuses(emitted: Emit, tmp_path: Path) -> None:
    text = emitted("jobset").replace("PET_NNODES", "PET_OTHER")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        applied(text, "jobset", tmp_path)
    assert "testing value" in caught.value.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--emit pod --gpu-memory-gb 80", "--emit: expected one of rayjob, trainjob, jobset"),
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
