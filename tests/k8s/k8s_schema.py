"""Documents against schemas: Kubernetes' own, and the definitions of the operators' kinds.

Does on create what the API server does: defaults, types, unknown fields, enums, patterns, bounds,
unique keys of lists, and the CEL rules that do not compare with an older object (`oldSelf`).
"""

import copy
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
from celpy.adapter import json_to_cel
from k8s_manifests import ROOT, Document, pods

VERSION = "1.37"
GROUPS = {"ray.io", "kubeflow.org", "trainer.kubeflow.org", "jobset.x-k8s.io", "kueue.x-k8s.io"}
FOLDER = Path(os.environ.get("DLORA_TEST_CRDS", ROOT.parent / "shared" / "crds"))
ABSENT = "the folder of custom resource definitions is absent (../shared/crds, or DLORA_TEST_CRDS)"
Schema = dict[str, Any]

FORMATS = jsonschema.FormatChecker(formats=())
for name, limit in (("int32", 2**31), ("int64", 2**63)):
    FORMATS.checks(name)(lambda n, limit=limit: not isinstance(n, int) or -limit <= n < limit)


def check_core(docs: list[Document]) -> list[str]:
    """What is wrong with core kinds, and with the pods inside all kinds."""
    templates = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": pod.metadata, "spec": pod.spec}
        for pod in pods(docs)
    ]
    core = [doc for doc in docs if doc["apiVersion"].partition("/")[0] not in GROUPS]
    return [line for doc in core + templates for line in _core(json.dumps(doc))]


@functools.cache
def _core(text: str) -> list[str]:
    doc = json.loads(text)
    try:
        kubernetes_validate.validate(doc, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        return [f"{doc['kind']} {path}: {error.message[:200]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{doc['kind']}: there is no {doc['apiVersion']}"]
    return []


@functools.cache
def definitions() -> dict[tuple[str, str], Schema]:
    """The schema of each (apiVersion, kind)."""
    specs = [json.loads(file.read_text(encoding="utf-8"))["spec"] for file in FOLDER.glob("*.json")]
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): version["schema"][
            "openAPIV3Schema"
        ]
        for spec in specs
        for version in spec["versions"]
        if version["served"]
    }


def check_custom(docs: list[Document]) -> list[str]:
    """What is wrong with the custom resources among the documents."""
    problems = []
    for doc in docs:
        schema = definitions().get((doc["apiVersion"], doc["kind"]))
        if doc["apiVersion"].partition("/")[0] not in GROUPS:
            continue
        if schema is None:
            problems.append(f"{doc['kind']}: no definition of {doc['apiVersion']}")
            continue
        doc = copy.deepcopy(doc)
        _apply_defaults(schema, doc)
        errors = jsonschema.Draft4Validator(schema, format_checker=FORMATS).iter_errors(doc)
        found = [f"{error.json_path[1:]}: {error.message[:200]}" for error in errors]
        problems += [f"{doc['kind']}{line}" for line in found or _rules(schema, doc, "")]
    return problems


def _field(schema: Schema, name: str) -> Schema | None:
    """The schema of a field; None for an unknown one."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or "properties" not in schema:
        more = schema.get("additionalProperties")
        return schema.get("properties", {}).get(name, more if isinstance(more, dict) else {})
    return schema["properties"].get(name)


def _apply_defaults(schema: Schema, value: Any) -> None:
    """As the API server does before it validates."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if "default" in inner:
                value.setdefault(name, copy.deepcopy(inner["default"]))
        for name, found in value.items():
            _apply_defaults(_field(schema, name) or {}, found)
    elif isinstance(value, list):
        for found in value:
            _apply_defaults(schema.get("items", {}), found)


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _rules(schema: Schema, value: Any, path: str) -> Iterator[str]:
    """Unknown fields, repeated keys of lists, and CEL rules that do not hold."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue
        try:
            holds = bool(_program(rule["rule"]).evaluate({"self": json_to_cel(value)}))
        except celpy.CELEvalError as error:
            yield f"{path}: {rule['rule']}: {error.args[0]}"
            continue
        if not holds:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, found in value.items():
            inner = _field(schema, name)
            if inner is None:
                yield f"{path}: unknown field {name}"
            else:
                yield from _rules(inner, found, f"{path}.{name}")
    elif isinstance(value, list):
        kind = schema.get("x-kubernetes-list-type")
        keys = schema.get("x-kubernetes-list-map-keys", [])
        names = [json.dumps([i.get(k) for k in keys] if kind == "map" else i) for i in value]
        if kind in ("map", "set") and len(set(names)) < len(names):
            yield f"{path}: a key is there twice among {', '.join(names)}"
        for index, found in enumerate(value):
            yield from _rules(schema.get("items", {}), found, f"{path}[{index}]")
