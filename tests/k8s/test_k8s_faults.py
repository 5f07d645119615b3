"""Faults planted into rendered manifests: each is reported by the check that is meant to."""

import k8s_schema
import pytest
from k8s_faults import CHECKS, FAULTS, Fault
from k8s_manifests import documents


@pytest.mark.parametrize(("check", "fault"), [(c, f) for c in CHECKS for f in FAULTS[c]], ids=str)
def test_a_fault_is_reported(check: str, fault: Fault) -> None:
    found = CHECKS[check](fault.planted())
    assert any(fault.says in line for line in found), found


@pytest.mark.skipif(not k8s_schema.FOLDER.is_dir(), reason=k8s_schema.ABSENT)
@pytest.mark.parametrize("fault", FAULTS["custom"], ids=str)
def test_a_fault_against_a_definition_is_reported(fault: Fault) -> None:
    found = k8s_schema.check_custom(fault.planted())
    assert any(fault.says in line for line in found), found


def test_a_runtime_after_its_job_is_reported() -> None:
    docs = documents("trainjob")
    docs.sort(key=lambda doc: doc["kind"] == "TrainingRuntime")
    assert any("comes after it" in line for line in CHECKS["operators"](docs))
