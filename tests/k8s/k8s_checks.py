"""The checks that need nothing beside the documents, by name."""

from collections.abc import Callable

import k8s_launch
import k8s_operators
import k8s_policy
import k8s_restarts
import k8s_schema
import k8s_values
from k8s_manifests import Document

CHECKS: dict[str, Callable[[list[Document]], list[str]]] = {
    module.__name__.removeprefix("k8s_"): module.check
    for module in (*(k8s_schema, k8s_values, k8s_operators, k8s_restarts, k8s_policy, k8s_launch),)
}
