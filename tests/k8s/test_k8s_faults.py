"""Faults planted into rendered manifests: each is reported by the check that is meant to."""

import k8s_crd
import k8s_image
import pytest
from k8s_checks import CHECKS
from k8s_dockerfile import Image
from k8s_fault import Fault
from k8s_faults_of_policy import POLICY
from k8s_faults_of_runs import IMAGE, LAUNCH, OPERATORS, RESTARTS
from k8s_faults_of_values import CRD, SCHEMA, VALUES
from k8s_manifests import documents


@pytest.mark.parametrize(
    "fault", [*SCHEMA, *VALUES, *OPERATORS, *RESTARTS, *LAUNCH, *POLICY], ids=str
)
def test_a_fault_is_reported(fault: Fault) -> None:
    found = CHECKS[fault.check](fault.planted())
    assert any(fault.says in line for line in found), found


def test_a_runtime_after_its_job_is_reported() -> None:
    docs = documents("trainjob")
    docs.sort(key=lambda doc: doc["kind"] == "TrainingRuntime")
    assert any("comes after it" in line for line in CHECKS["operators"](docs))


@pytest.mark.skipif(k8s_crd.folder() is None, reason=k8s_crd.ABSENT)
@pytest.mark.parametrize("fault", CRD, ids=str)
def test_a_fault_against_a_definition_is_reported(fault: Fault) -> None:
    found = k8s_crd.check(fault.planted())
    assert any(fault.says in line for line in found), found


@pytest.mark.parametrize("fault", IMAGE, ids=str)
def test_what_an_image_lacks_is_reported(fault: Fault, image: Image) -> None:
    found = k8s_image.check(fault.planted(), image)
    assert any(fault.says in line for line in found), found
