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

# The path of a Job's spec in each kind that makes Jobs, and of all pod templates; * is every item.
JOBS = {
    "Job": "spec",
    "JobSet": "spec.replicatedJobs.*.template.spec",
    "TrainingRuntime": "spec.template.spec.replicatedJobs.*.template.spec",
}
TEMPLATES = {kind: [f"{path}.template"] for kind, path in JOBS.items()} | {
    "Pod": [""],
    "PyTorchJob": ["spec.pytorchReplicaSpecs.*.template"],
    "RayJob": [
        "spec.submitterPodTemplate",
        "spec.rayClusterSpec.headGroupSpec.template",
        "spec.rayClusterSpec.workerGroupSpecs.*.template",
    ],
}


class StrictLoader(yaml.CSafeLoader):
    """Refuses duplicate keys, which kubectl drops before a server could see them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Document:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            problem = f"duplicate key among {keys}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read(text: str) -> list[Document]:
    """All documents of a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping has a key twice.
    """
    return [found for found in yaml.load_all(text, Loader=StrictLoader) if found is not None]


def installed(program: str) -> str:
    """The path of a program that a package of the test extras installs."""
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    assert found, f"{program} is not installed: pip install '.[test]'"
    return found


def kustomize(directory: Path) -> str:
    """What `kubectl kustomize` prints.

    Raises:
        subprocess.CalledProcessError: the overlay does not build.
    """
    command = [installed("kubectl"), "kustomize", str(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


rendered = functools.cache(lambda name: kustomize(BUILT[name]))


def documents(name: str) -> list[Document]:
    """A fresh copy of what one of `BUILT` renders to."""
    return read(rendered(name))


def the(docs: list[Document], kind: str) -> Document:
    """The one document of a kind."""
    (found,) = [doc for doc in docs if doc["kind"] == kind]
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that a document makes."""

    owner: Document
    metadata: Document
    spec: Document

    @property
    def where(self) -> str:
        return f"pod of {self.owner['kind']}"

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def labels(self) -> dict[str, str]:
        return self.metadata.get("labels", {})

    def volume_at(self, container: Document, place: str) -> Document:
        """The volume that a container mounts at a path; empty if there is none."""
        names = [m["name"] for m in container.get("volumeMounts", []) if m["mountPath"] == place]
        return next((v for v in self.spec.get("volumes", []) if v["name"] in names), {})

    def trains(self, container: Document) -> bool:
        """Whether ranks run in a container."""
        return self.owner["kind"] != "Pod" and bool(self.volume_at(container, "/runs"))


def at(value: Any, path: str) -> Iterator[Any]:
    """All that a path with * leads to; nothing where it leads nowhere."""
    head, _, rest = path.partition(".")
    if head == "":
        yield value
    elif head == "*":
        for inner in value.values() if isinstance(value, dict) else value:
            yield from at(inner, rest)
    elif head in value:
        yield from at(value[head], rest)


def pods(docs: list[Document]) -> list[Pod]:
    """All pods that the documents make."""
    return [
        Pod(doc, template.get("metadata", {}), template["spec"])
        for doc in docs
        for path in TEMPLATES.get(doc["kind"], [])
        for template in at(doc, path)
    ]


def jobs(docs: list[Document]) -> list[tuple[Document, Document]]:
    """(document, spec) of all Jobs that the documents make."""
    return [
        (doc, spec) for doc in docs if doc["kind"] in JOBS for spec in at(doc, JOBS[doc["kind"]])
    ]


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, mapping) of all mappings in a document."""
    if isinstance(value, dict):
        yield path, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list):
            yield from walk(inner, f"{path}.{key}".lstrip("."))
