"""A fault, planted into a rendered manifest."""

import copy
import re
from dataclasses import dataclass
from typing import Any

from k8s_manifests import Document, documents


class Gone:
    """In place of a value: the field is not there."""

    def __repr__(self) -> str:
        return "gone"


GONE = Gone()
POD = {  # the pod template of each kind
    "Job": "spec.template",
    "JobSet": "spec.replicatedJobs.0.template.spec.template",
    "TrainingRuntime": "spec.template.spec.replicatedJobs.0.template.spec.template",
    "PyTorchJob": "spec.pytorchReplicaSpecs.Worker.template",
    "RayJob": "spec.rayClusterSpec.workerGroupSpecs.0.template",
}
KINDS = {
    "Job": "cpu-demo",
    "JobSet": "jobset",
    "TrainingRuntime": "trainjob",
    "TrainJob": "trainjob",
    "PyTorchJob": "pytorchjob",
    "RayJob": "rayjob",
}


@dataclass(frozen=True)
class Fault:
    """A document gets `value` at `path` (GONE: nothing).

    Args:
        kind: its kind, or kind/name.
        path: POD is its pod template, C that one's container; ~ is a dot inside a key.
        says: what the report has to contain.
    """

    check: str
    kind: str
    path: str
    value: Any
    says: str

    def __str__(self) -> str:
        return f"{self.check}-{self.kind}-{self.path.rpartition('.')[2]}-{self.value!r:.20}"

    def planted(self) -> list[Document]:
        docs = copy.deepcopy(documents(KINDS.get(self.kind, "jobset")))
        kind, _, name = self.kind.partition("/")
        target: Any = next(
            doc for doc in docs if doc["kind"] == kind and name in ("", doc["metadata"]["name"])
        )
        path = re.sub(r"^C\.", "POD.spec.containers.0.", self.path).replace(
            "POD", POD.get(kind, "")
        )
        keys = [key.replace("~", ".") for key in path.split(".")]
        for key in keys[:-1]:
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        last: Any = int(keys[-1]) if isinstance(target, list) else keys[-1]
        if self.value is GONE:
            del target[last]
        else:
            target[last] = self.value
        return docs
