"""What becomes of a run by its exit status: 2 is not tried again; 143 and a lost node are.

Follows the documented meaning of podFailurePolicy, of JobSet's rules and of ExitCode.
"""

import re
from collections.abc import Iterator
from typing import Any

from k8s_manifests import Document, Pod, jobs, pods

from dlora.launch import GRACE_SECONDS, PARTING_SECONDS

WRONG, STOPPED, LOST, BROKEN = 2, 143, "DisruptionTarget", 1
OUTCOMES = {WRONG: "fails", STOPPED: "again", LOST: "again", BROKEN: "counted"}
BESIDE_GRACE = PARTING_SECONDS + 10  # for the agents, which wait for each other, and the kubelet
# Ray's own seconds from SIGTERM until a node ends what runs there, and from the stop of a job until
# its program, which runs on the head, is killed; by container, with Ray's default.
DRAIN = ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30")
STOP = ("RAY_JOB_STOP_WAIT_TIME_S", "3")
RAY_WAITS = {"ray-head": (DRAIN, STOP), "ray-worker": (DRAIN,)}


def check(docs: list[Document]) -> list[str]:
    """Restarts that do not match exit statuses, and stops that would be cut short."""
    problems = [f"{pod.where}: {line}" for pod in pods(docs) for line in _grace(pod)]
    for doc, spec in jobs(docs):
        found = {status: outcome(doc, spec, status) for status in OUTCOMES}
        problems += [
            f"{doc['kind']}: after {status} it {found[status]}, not {what}"
            for status, what in OUTCOMES.items()
            if found[status] != what
        ]
    for doc in docs:
        if doc["kind"] == "PyTorchJob":
            problems += _pytorch(doc["spec"])
        if doc["kind"] == "RayJob" and doc["spec"].get("backoffLimit", 0) != 0:
            problems.append("RayJob: backoffLimit tries exit status 2 again")
    return problems


def _grace(pod: Pod) -> Iterator[str]:
    given = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in pod.containers:
        if pod.trains(container) and given < GRACE_SECONDS + BESIDE_GRACE:
            yield f"terminationGracePeriodSeconds {given} cuts a commit short"
        variables = {v["name"]: v.get("value", "") for v in container.get("env", [])}
        for name, default in RAY_WAITS.get(container["name"], ()):
            seconds = variables.get(name, default)
            if not (seconds.isdecimal() and GRACE_SECONDS <= int(seconds) < given):
                yield f"{name}: Ray's {seconds!r} s cut a commit short"


def fate(spec: Document, status: Any) -> tuple[str, int | None]:
    """(action, index of the rule) for a failed pod of a Job; no rule: it is counted.

    Args:
        spec: the Job's.
        status: an exit status, or the type of a pod's condition.
    """
    for index, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        codes = rule.get("onExitCodes", {})
        is_listed = status in codes.get("values", [])
        if codes and isinstance(status, int) and is_listed == (codes["operator"] == "In"):
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
    if action == "Count" and spec.get("backoffLimit", 6) > 0:
        return "counted"
    if doc["kind"] == "Job":
        return "fails"
    if index is None:
        return _of_the_set(doc, "BackoffLimitExceeded", "limit")
    return _of_the_set(doc, "PodFailurePolicy", f"matching FailJob rule at index {index}")


def _of_the_set(doc: Document, reason: str, message: str) -> str:
    """What a JobSet does about a Job that failed."""
    spec = doc["spec"] if doc["kind"] == "JobSet" else doc["spec"]["template"]["spec"]
    policy = spec.get("failurePolicy", {})
    for rule in policy.get("rules", []):
        reasons = rule.get("onJobFailureReasons") or [reason]
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            ends = {"FailJobSet": "fails", "RestartJobSetAndIgnoreMaxRestarts": "again"}
            return ends.get(rule["action"], "counted")
    return "counted" if policy.get("maxRestarts", 0) > 0 else "fails"


def outcome_by_exit_code(status: Any) -> str:
    """What the operator does with a replica of restartPolicy ExitCode, whatever its limits are."""
    return "fails" if isinstance(status, int) and status < 128 else "again"


def _pytorch(spec: Document) -> Iterator[str]:
    for role, replica in spec["pytorchReplicaSpecs"].items():
        if replica.get("restartPolicy") != "ExitCode":
            yield f"{role}: restartPolicy {replica.get('restartPolicy')} knows no exit status"
    if spec["elasticPolicy"].get("maxRestarts", 0) != 0:
        yield "maxRestarts: torch's agent would try exit status 2 again"
