"""Core kinds against the strict schemas of the newest Kubernetes: unknown fields, types."""

import kubernetes_validate
from k8s_manifests import Document

VERSION = "1.37"
CUSTOM = {  # groups that Kubernetes does not have by itself
    *("ray.io", "kubeflow.org", "trainer.kubeflow.org", "jobset.x-k8s.io", "kueue.x-k8s.io"),
}


def is_custom(doc: Document) -> bool:
    """Whether a definition tells what the document may hold."""
    return doc["apiVersion"].partition("/")[0] in CUSTOM


def check(docs: list[Document]) -> list[str]:
    """What is wrong with the core kinds among the documents."""
    problems = []
    for doc in docs:
        if is_custom(doc):
            continue
        try:
            kubernetes_validate.validate(doc, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            problems.append(f"{doc['kind']} {path}: {error.message[:200]}")
        except kubernetes_validate.SchemaNotFoundError:
            problems.append(f"{doc['kind']}: there is no {doc['apiVersion']}")
    return problems
