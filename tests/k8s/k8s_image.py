"""Commands, modules, paths and users of the manifests: in the image, or mounted."""

import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath

from k8s_dockerfile import Image
from k8s_manifests import Document, Pod, pods

CACHES = (
    *("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"),
    *("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"),
)
RAY = ("bash", "ray", "python")  # what KubeRay starts in its pods


def check(docs: list[Document], image: Image) -> list[str]:
    """What a pod would not find, or could not write."""
    problems = []
    for pod in pods(docs):
        for container in pod.containers:
            lines = [*_commands(pod, container, docs, image), *_paths(pod, container, docs, image)]
            problems += [f"{pod.where} {container['name']}: {line}" for line in lines]
        user = str(pod.spec.get("securityContext", {}).get("runAsUser"))
        if user != image.user.split(":")[0]:
            problems.append(f"{pod.where}: runs as {user}, the image's user is {image.user}")
    return problems


def words_of(pod: Pod, container: Document, docs: list[Document]) -> list[list[str]]:
    """All command lines of a container, those that others write into it included."""
    lines = [[*container.get("command", []), *container.get("args", [])]]
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    lines += [container[p]["exec"]["command"] for p in probes if "exec" in container.get(p, {})]
    if pod.owner["kind"] == "TrainingRuntime":
        trainers = [doc["spec"]["trainer"] for doc in docs if doc["kind"] == "TrainJob"]
        lines += [[*t.get("command", []), *t.get("args", [])] for t in trainers]
    if pod.owner["kind"] == "RayJob":
        lines += [[program] for program in RAY]
        if container["name"] != "ray-job-submitter":  # it passes the line on
            lines.append(shlex.split(pod.owner["spec"]["entrypoint"]))
    return [line for line in lines if line]


def _commands(pod: Pod, container: Document, docs: list[Document], image: Image) -> Iterator[str]:
    for line in words_of(pod, container, docs):
        programs = [line[0], line[2]] if line[:2] == ["tini", "--"] else [line[0]]
        for program in programs:
            if image.program(program) is None:
                yield f"there is no {program} in the image"
        if "-m" in line:
            module = line[line.index("-m") + 1].replace(".", "/")
            places = image.inside("/opt/venv/lib/site-packages"), image.inside(".")
            if not any((p / f"{module}.py").is_file() for p in places):
                yield f"there is no module {module.replace('/', '.')} in the image"
    work = container.get("workingDir")
    if work is not None and not image.inside(work).is_dir():
        yield f"workingDir: there is no {work} in the image"


def _paths(pod: Pod, container: Document, docs: list[Document], image: Image) -> Iterator[str]:
    mounts = container.get("volumeMounts", [])
    written = [mount["mountPath"] for mount in mounts if not mount.get("readOnly")]
    for line in words_of(pod, container, docs):
        for word in line:
            if not word.startswith("/"):
                continue
            mount = _mount(word, [m["mountPath"] for m in mounts])
            if mount is None and not image.inside(word).exists():
                yield f"{word}: neither in the image nor mounted"
            if mount is not None and (absent := _not_mounted(pod, mounts, mount, word, docs)):
                yield absent
    for name in CACHES:
        place = image.env.get(name)
        variables = {v["name"]: v.get("value") for v in container.get("env", [])}
        place = variables.get(name, place)
        trains = "/runs" in written and pod.owner["kind"] != "Pod"
        if trains and (place is None or _mount(place, written) is None):
            yield f"{name}: {place} cannot be written"


def _mount(path: str, mounts: list[str]) -> str | None:
    """The mount that a path lies in."""
    parents = [str(PurePosixPath(path)), *map(str, PurePosixPath(path).parents)]
    return next((parent for parent in parents if parent in mounts), None)


def _not_mounted(
    pod: Pod, mounts: list[Document], mount: str, word: str, docs: list[Document]
) -> str:
    """Files of a ConfigMap can be looked up; what a claim holds is the user's."""
    name = next(m["name"] for m in mounts if m["mountPath"] == mount)
    volume = next(v for v in pod.spec["volumes"] if v["name"] == name)
    if "configMap" not in volume:
        return ""
    files = [
        doc["data"]
        for doc in docs
        if doc["kind"] == "ConfigMap" and doc["metadata"]["name"] == volume["configMap"]["name"]
    ]
    key = str(PurePosixPath(word).relative_to(mount))
    return "" if any(key in data for data in files) else f"{word}: not in the ConfigMap"
