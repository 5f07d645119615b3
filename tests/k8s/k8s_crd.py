"""Custom resources against the schemas of their definitions, CEL rules included.

Does on create what the API server does: defaults, types, unknown fields, enums, patterns, bounds,
unique keys of lists, and the rules that do not compare with an older object (`oldSelf`).
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
from celpy.adapter import json_to_cel
from k8s_manifests import ROOT, Document
from k8s_schema import is_custom

Schema = dict[str, Any]
KEPT = {
    *("type", "enum", "pattern", "minimum", "maximum", "multipleOf", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "required"),
}
BOUNDS = {"int32": 2**31, "int64": 2**63}
ABSENT = "the folder of custom resource definitions is absent (../shared/crds, or DLORA_TEST_CRDS)"


def folder() -> Path | None:
    """Where the definitions lie, if they do."""
    named = os.environ.get("DLORA_TEST_CRDS")
    place = Path(named) if named else ROOT.parent / "shared" / "crds"
    return place if place.is_dir() else None


@functools.cache
def schemas() -> dict[tuple[str, str], Schema]:
    """The schema of each (apiVersion, kind)."""
    place = folder()
    found = {}
    for file in sorted(place.glob("*.json")) if place else []:
        spec = json.loads(file.read_text(encoding="utf-8"))["spec"]
        for version in spec["versions"]:
            if version["served"]:
                name = f"{spec['group']}/{version['name']}"
                found[name, spec["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


def check(docs: list[Document]) -> list[str]:
    """What is wrong with the custom resources among the documents."""
    problems = []
    for doc in docs:
        key = doc["apiVersion"], doc["kind"]
        if key not in schemas():
            if is_custom(doc):
                problems.append(f"{doc['kind']}: no definition of {key[0]}")
            continue
        schema = schemas()[key]
        doc = copy.deepcopy(doc)
        _apply_defaults(schema, doc)
        found = [
            f"{doc['kind']}{error.json_path[1:]}: {error.message[:200]}"
            for error in _validator(key).iter_errors(doc)
        ]
        problems += found or [f"{doc['kind']}{line}" for line in _rules(schema, doc, "")]
    return problems


@functools.cache
def _validator(key: tuple[str, str]) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(_strict(schemas()[key], root=True))


def _strict(schema: Schema, *, root: bool = False) -> Schema:
    """A structural schema as a JSON schema that allows no unknown field."""
    out = {key: schema[key] for key in KEPT & schema.keys()}
    for bound in ("Minimum", "Maximum"):
        if schema.get(f"exclusive{bound}"):
            out[f"exclusive{bound}"] = out.pop(bound.lower())
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            out[key] = [_loose(part) for part in schema[key]]
    if "not" in schema:
        out["not"] = _loose(schema["not"])
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if schema.get("type") == "integer" and (limit := BOUNDS.get(schema.get("format", ""))):
        out["minimum"] = max(out.get("minimum", -limit), -limit)
        out["maximum"] = min(out.get("maximum", limit - 1), limit - 1)
    if schema.get("nullable"):
        kinds = out.get("type", [])
        out["type"] = [*(kinds if isinstance(kinds, list) else [kinds]), "null"]
    properties = {name: _strict(inner) for name, inner in schema.get("properties", {}).items()}
    if root or schema.get("x-kubernetes-embedded-resource"):
        texts = dict.fromkeys(("apiVersion", "kind"), {"type": "string"})
        properties = {**texts, "metadata": {"type": "object"}, **properties}
    if properties:
        out["properties"] = properties
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        out["additionalProperties"] = _strict(more)
    elif properties and not more and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if "items" in schema:
        out["items"] = _strict(schema["items"])
    return out


def _loose(schema: Schema) -> Schema:
    """A branch of anyOf and the like, which adds conditions and allows all fields."""
    return {**_strict(schema), "additionalProperties": True}


def _apply_defaults(schema: Schema, value: Any) -> None:
    """As the API server does before it validates."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if "default" in inner and name not in value:
                value[name] = copy.deepcopy(inner["default"])
        for name, found in value.items():
            _apply_defaults(_field(schema, name), found)
    elif isinstance(value, list):
        for found in value:
            _apply_defaults(schema.get("items", {}), found)


def _field(schema: Schema, name: str) -> Schema:
    more = schema.get("additionalProperties")
    found = schema.get("properties", {}).get(name, more if isinstance(more, dict) else {})
    assert isinstance(found, dict)
    return found


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _rules(schema: Schema, value: Any, path: str) -> Iterator[str]:
    """Rules and unique keys that do not hold."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue
        try:
            holds = bool(_program(rule["rule"]).evaluate({"self": json_to_cel(value)}))
        except celpy.CELEvalError as error:
            holds = False
            rule = {"rule": rule["rule"], "message": f"{rule['rule']}: {error.args[0]}"}
        if not holds:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, found in value.items():
            yield from _rules(_field(schema, name), found, f"{path}.{name}")
    elif isinstance(value, list):
        yield from _duplicates(schema, value, path)
        for index, found in enumerate(value):
            yield from _rules(schema.get("items", {}), found, f"{path}[{index}]")


def _duplicates(schema: Schema, items: list[Any], path: str) -> Iterator[str]:
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("map", "set"):
        return
    keys = schema.get("x-kubernetes-list-map-keys", [])
    names = [json.dumps([i.get(k) for k in keys] if kind == "map" else i) for i in items]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{path}: {name} stands there twice"
