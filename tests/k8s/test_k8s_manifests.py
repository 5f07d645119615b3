"""Every kustomization of k8s/ builds, and all checks pass on what it renders to, and on nothing
else: each reports the faults that are planted there."""

import re
from collections.abc import Iterator
from typing import Any

import k8s_schema
import pytest
import yaml
from k8s_faults import CHECKS, FAULTS, planted
from k8s_manifests import BUILT, K8S, OVERLAYS, ROOT, Document, documents, pods, read, the, walk

EXPECTED = {
    "cpu-demo": {"Job"},
    "jobset": {"JobSet"},
    "pytorchjob": {"PyTorchJob"},
    "rayjob": {"RayJob"},
    "trainjob": {"TrainJob", "TrainingRuntime"},
}
NEEDED = {"Namespace", "ServiceAccount", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy"}


def test_an_overlay_has_its_job_and_what_that_needs() -> None:
    found = {name: {doc["kind"] for doc in documents(name)} for name in OVERLAYS}
    assert found == {name: kinds | NEEDED for name, kinds in EXPECTED.items()}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", BUILT)
def test_nothing_is_wrong(name: str, check: str) -> None:
    assert CHECKS[check](documents(name)) == []


@pytest.mark.parametrize(("check", "fault"), [(c, f) for c in CHECKS for f in FAULTS[c]])
def test_a_fault_is_reported(check: str, fault: tuple[str, str, Any, str]) -> None:
    found = CHECKS[check](planted(*fault[:3]))
    assert any(fault[3] in line for line in found), found


# Whatever another document or the operator's own definition looks up by name.
FREE = {"kind", "apiVersion", "name", "command", "args", "entrypoint"}


def words_of(doc: Document, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of the values that are one capitalised word, as the API's own choices are."""
    for place, mapping in walk(doc):
        for key, value in mapping.items():
            for end, word in enumerate(value) if isinstance(value, list) else [("", value)]:
                if isinstance(word, str) and re.fullmatch(r"[A-Z][A-Za-z0-9]+", word):
                    yield f"{place}.{key}".lstrip(".") + (f".{end}" if end != "" else ""), word


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_typo_in_a_choice_is_reported(name: str) -> None:
    """The API server lets many through: PyTorchJob's restartPolicy, RayJob's submissionMode, and in
    custom resources all of a pod's own."""
    tried = set()
    for index, doc in enumerate(documents(name)):
        for path, word in words_of(doc):
            *keys, last = [key for key in path.split(".") if not key.isdecimal()][-2:]
            if last in FREE or doc["kind"] == "ConfigMap" or (doc["kind"], *keys, last) in tried:
                continue
            tried.add((doc["kind"], *keys, last))
            docs = documents(name)
            put(docs[index], path, word[0] + word[1:].swapcase())
            reported = [line for check in CHECKS.values() for line in check(docs)]
            assert reported, f"{doc['kind']} {path}: {word}"
    assert len(tried) >= 10


def put(doc: Document, path: str, value: Any) -> None:
    *keys, last = path.split(".")
    target: Any = doc
    for key in keys:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[int(last) if isinstance(target, list) else last] = value


def test_a_runtime_after_its_job_is_reported() -> None:
    docs = documents("trainjob")
    docs.sort(key=lambda doc: doc["kind"] == "TrainingRuntime")
    assert any("no TrainingRuntime dlora before it" in line for line in CHECKS["operators"](docs))


@pytest.mark.skipif(not k8s_schema.FOLDER.is_dir(), reason=k8s_schema.ABSENT)
@pytest.mark.parametrize("name", BUILT)
def test_custom_resources_fit_their_definitions(name: str) -> None:
    assert k8s_schema.check_custom(documents(name)) == []


@pytest.mark.skipif(not k8s_schema.FOLDER.is_dir(), reason=k8s_schema.ABSENT)
@pytest.mark.parametrize(("kind", "path", "value", "says"), FAULTS["custom"])
def test_a_fault_against_a_definition_is_reported(
    kind: str, path: str, value: Any, says: str
) -> None:
    assert says in "\n".join(k8s_schema.check_custom(planted(kind, path, value)))


@pytest.mark.parametrize("name", BUILT)
def test_no_pod_escapes_the_checks(name: str) -> None:
    """Each list of containers belongs to one of the pods that the checks see."""
    for doc in documents(name):
        seen = [id(pod.spec) for pod in pods([doc])]
        found = [id(mapping) for _, mapping in walk(doc) if "containers" in mapping]
        assert sorted(found) == sorted(seen)


def test_sources_are_strict_yaml() -> None:
    sources = [*K8S.rglob("*.yaml"), *ROOT.glob("configs/*.yaml"), ROOT / "configs/Kustomization"]
    assert len(sources) > 25
    for source in sources:
        assert read(source.read_text(encoding="utf-8")), source
    for text in ("a: 1\nb: 2\na: 3\n", "- {name: x, image: y, name: z}\n"):
        with pytest.raises(yaml.YAMLError, match="duplicate key"):
            read(text)


def test_the_config_map_is_the_folder_of_configurations() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("configs/*.yaml")}
    for overlay in OVERLAYS:
        assert the(documents(overlay), "ConfigMap")["data"] == files


def test_ray_is_the_one_that_is_pinned() -> None:
    job = the(documents("rayjob"), "RayJob")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in pinned
