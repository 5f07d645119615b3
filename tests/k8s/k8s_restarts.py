"""What becomes of a run by its exit status: 2 is not tried again; 143 and a lost node are.

Follows the documented meaning of podFailurePolicy, of JobSet's rules and of ExitCode.
"""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import Document, jobs, pods

from dlora.launch import GRACE_SECONDS, PARTING_SECONDS

WRONG, STOPPED, LOST, BROKEN = 2, 143, "DisruptionTarget", 1
BESIDE_GRACE = PARTING_SECONDS + 10  # for the agents, which wait for each other, and the kubelet
# From SIGTERM to a node of Ray's until it ends what runs there, and what that is by default.
DRAIN, RAYS_DRAIN_SECONDS = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30
# From SIGTERM to a job's program, which runs on the head, until SIGKILL.
STOP, RAYS_STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 3


def check(docs: list[Document]) -> list[str]:
    """Restarts that do not match exit statuses, and stops that would be cut short."""
    problems = [*_graces(docs)]
    for where, doc, spec in jobs(docs):
        problems += [f"{where}: {line}" for line in _outcomes(doc, spec)]
    for doc in docs:
        if doc["kind"] == "PyTorchJob":
            problems += [f"PyTorchJob: {line}" for line in _pytorch(doc["spec"])]
        if doc["kind"] == "RayJob" and doc["spec"].get("backoffLimit", 0) != 0:
            problems.append("RayJob: backoffLimit tries exit status 2 again")
    return problems


def _graces(docs: list[Document]) -> Iterator[str]:
    for pod in pods(docs):
        trains = any("/runs" in str(c.get("volumeMounts")) for c in pod.containers)
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.owner["kind"] != "Pod" and trains and given < GRACE_SECONDS + BESIDE_GRACE:
            yield f"{pod.where}: terminationGracePeriodSeconds {given} cuts a commit short"
        for container in pod.containers:
            variables = {v["name"]: v.get("value") for v in container.get("env", [])}
            waits = {}
            if container["name"] in ("ray-head", "ray-worker"):
                waits[DRAIN] = variables.get(DRAIN, RAYS_DRAIN_SECONDS)
            if container["name"] == "ray-head":
                waits[STOP] = variables.get(STOP, RAYS_STOP_SECONDS)
            for name, seconds in waits.items():
                if not re.fullmatch(r"\d+", str(seconds)):
                    yield f"{pod.where}: {name}: {seconds} is no number of seconds"
                elif not GRACE_SECONDS <= int(seconds) < given:
                    yield f"{pod.where}: {name}: Ray's {seconds} s cut a commit short"


def fate(spec: Document, status: Any) -> tuple[str, int | None]:
    """(action, index of the rule) for a failed pod of a Job; no rule: it is counted."""
    for index, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        codes = rule.get("onExitCodes")
        wanted = codes and (status in codes["values"]) == (codes["operator"] == "In")
        if wanted and isinstance(status, int):
            return rule["action"], index
        for condition in rule.get("onPodConditions", []):
            if condition["type"] == status and condition.get("status", "True") == "True":
                return rule["action"], index
    return "Count", None


def outcome(doc: Document, spec: Document, status: Any) -> str:
    """`fails`, `again`, or `counted`: again, but not without end."""
    action, index = fate(spec, status)
    if action == "Ignore":
        return "again"
    counted = "counted" if spec.get("backoffLimit", 6) > 0 else "fails"
    if action == "FailJob" or (action == "Count" and counted == "fails"):
        failed = f"matching FailJob rule at index {index}" if index is not None else "limit"
        reason = "PodFailurePolicy" if index is not None else "BackoffLimitExceeded"
        return _of_the_set(doc, reason, failed)
    return counted


def _of_the_set(doc: Document, reason: str, message: str) -> str:
    """What a JobSet does about a Job that failed."""
    spec = doc["spec"] if doc["kind"] == "JobSet" else doc["spec"].get("template", {}).get("spec")
    if doc["kind"] == "Job":
        return "fails"
    policy = spec.get("failurePolicy", {})
    for rule in policy.get("rules", []):
        reasons = rule.get("onJobFailureReasons") or [reason]
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return {
                "FailJobSet": "fails",
                "RestartJobSetAndIgnoreMaxRestarts": "again",
            }.get(rule["action"], "counted")
    return "counted" if policy.get("maxRestarts", 0) > 0 else "fails"


def _outcomes(doc: Document, spec: Document) -> Iterator[str]:
    wanted = {WRONG: "fails", STOPPED: "again", LOST: "again", BROKEN: "counted"}
    for status, what in wanted.items():
        found = outcome(doc, spec, status)
        if found != what:
            yield f"after {status} it {found}, not {what}"


def outcome_by_exit_code(status: Any) -> str:
    """What the operator does with a replica of restartPolicy ExitCode, whatever its limits are."""
    return "fails" if isinstance(status, int) and status < 128 else "again"


def _pytorch(spec: Document) -> Iterator[str]:
    for role, replica in spec["pytorchReplicaSpecs"].items():
        if replica.get("restartPolicy") != "ExitCode":
            yield f"{role}: restartPolicy {replica.get('restartPolicy')} knows no exit status"
    if spec.get("elasticPolicy", {}).get("maxRestarts", 0) != 0:
        yield "maxRestarts: torch's agent would try exit status 2 again"
