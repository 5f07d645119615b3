"""k8s/Dockerfile built without Docker: its COPYs for real, what its RUNs install by name.

A RUN that is not understood is an error, so the tree never has less of the file than it seems to.
"""

import fnmatch
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from k8s_manifests import ROOT

BASES = {  # programs of a base image, beside those of every Linux
    r"python:3\.\d+\.\d+-slim-\w+": ["/usr/local/bin/python", "/usr/local/bin/python3"],
    r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+": [],
}
LINUX = ["/bin/sh", "/bin/bash", "/bin/tar", "/bin/sleep", "/usr/bin/env"]
PROGRAMS = {"tini": ["tini"], "python3": ["python3"], "python3-venv": []}  # of packages of apt
BORING = r"apt-get update|rm -rf /var/lib/apt/lists/\*|groupadd .*"


class BuildError(Exception):
    """The Dockerfile would not build, or says what this does not understand."""


@dataclass
class Image:
    """A stage: its files under `root`, and what a container of it starts with."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = ""
    users: dict[str, str] = field(default_factory=dict)  # id: home
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        """A path of the image's, on this machine."""
        return self.root / str(Path(self.workdir) / path).lstrip("/")

    def touch(self, path: str) -> None:
        target = self.inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()

    def program(self, name: str) -> Path | None:
        """Where a command is found, as exec does it."""
        default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        places = [""] if "/" in name else self.env.get("PATH", default).split(":")
        for place in places:
            found = self.inside(f"{place}/{name}" if place else name)
            if found.is_file():
                return found
        return None


def build(scratch: Path, flavor: str, *, context: Path = ROOT) -> Image:
    """The last stage.

    Raises:
        BuildError: see there.
    """
    text = (context / "k8s" / "Dockerfile").read_text(encoding="utf-8")
    builder = _Builder(context, scratch, {"FLAVOR": flavor})
    for line in instructions(text):
        builder.do(*line.split(maxsplit=1))
    return builder.image


def instructions(text: str) -> list[str]:
    """The lines of a Dockerfile, comments dropped and continued ones joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line.strip() for line in joined.splitlines() if line.strip()]


class _Builder:
    def __init__(self, context: Path, scratch: Path, arguments: dict[str, str]) -> None:
        self._context, self._scratch, self._arguments = context, scratch, arguments
        self._stages: dict[str, Image] = {}
        self._included = [
            line[1:]
            for line in (context / "k8s" / "Dockerfile.dockerignore").read_text().splitlines()
            if line.startswith("!")
        ]
        self.image = Image(scratch)

    def do(self, word: str, rest: str) -> None:
        """One instruction."""
        step = getattr(self, f"_{word.lower()}", None)
        if step is None:
            raise BuildError(f"{word}: not understood")
        step(rest)

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._arguments.setdefault(name, default)

    def _from(self, rest: str) -> None:
        base, _, name = rest.partition(" AS ")
        base = base.replace("${FLAVOR}", self._arguments["FLAVOR"])
        root = self._scratch / name
        if base in self._stages:
            below = self._stages[base]
            shutil.copytree(below.root, root, symlinks=True)
            self.image = replace(below, root=root, env=dict(below.env), users=dict(below.users))
        else:
            known = [programs for image, programs in BASES.items() if re.fullmatch(image, base)]
            if not known:
                raise BuildError(f"FROM {base}: neither a stage nor a pinned image that is known")
            self.image = Image(root)
            for program in (*LINUX, *known[0]):
                self.image.touch(program)
        self._stages[name] = self.image

    def _env(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            path = self.image.env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
            self.image.env[name] = value.replace("$PATH", path)

    def _workdir(self, rest: str) -> None:
        self.image.workdir = rest
        self.image.inside(rest).mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        if rest.split(":")[0] not in self.image.users:
            raise BuildError(f"USER {rest}: no such user")
        self.image.user = rest

    def _entrypoint(self, rest: str) -> None:
        self.image.entrypoint = re.findall(r'"([^"]*)"', rest)

    def _cmd(self, rest: str) -> None:
        self.image.command = re.findall(r'"([^"]*)"', rest)

    def _copy(self, rest: str) -> None:
        words = shlex.split(rest)
        options = dict(word[2:].split("=") for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        for source in sources:
            if "from" in options:
                found = self._stages[options["from"]].inside(source)
            else:
                found = self._of_context(source)
            if not found.exists():
                raise BuildError(f"COPY {source}: there is no such file")
            into = self.image.inside(target)
            if found.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, into, dirs_exist_ok=True, ignore=ignored)
            else:
                into = into / found.name if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, into)

    def _of_context(self, source: str) -> Path:
        if not any(source == name or source.startswith(f"{name}/") for name in self._included):
            raise BuildError(f"COPY {source}: .dockerignore keeps it out")
        return self._context / source

    def _run(self, rest: str) -> None:
        for command in re.split(r"\s*&&\s*", rest):
            if re.fullmatch(BORING, command):
                continue
            command = re.sub(r"\$\{\w+:\+[^}]*\}", "", command)  # an argument that is not given
            words = shlex.split(command)
            if words[:2] == ["apt-get", "install"]:
                self._apt([word for word in words[2:] if not word.startswith("-")])
            elif words[0] == "useradd":
                options = dict(zip(words, words[1:], strict=False))
                self.image.users[options["--uid"]] = options["--home-dir"]
            elif words[1:3] == ["-m", "venv"] and self.image.program(words[0]):
                for name in ("python", "python3", "pip"):
                    self.image.touch(f"{words[3]}/bin/{name}")
            elif words[:2] == ["pip", "install"] and self.image.program("pip"):
                self._pip(words[2:])
            else:
                raise BuildError(f"RUN {command}: not understood")

    def _apt(self, packages: list[str]) -> None:
        for package in packages:
            name, _, version = package.partition("=")
            if not version or name not in PROGRAMS:
                raise BuildError(f"apt-get install {package}: not pinned, or not known")
            for program in PROGRAMS[name]:
                self.image.touch(f"/usr/bin/{program}")

    def _pip(self, words: list[str]) -> None:
        options = dict(zip(words, words[1:], strict=False))
        pins = options.get("--constraint", "/missing")
        if not self.image.inside(pins).is_file():
            raise BuildError(f"pip install {words}: nothing pins the versions")
        names = (*("--target", "--constraint"), options.get("--target"), pins)
        for word in words:
            if word in names or word.startswith("--"):
                continue
            if not word.startswith("."):
                if not re.search(rf"(?im)^{word}==", self.image.inside(pins).read_text()):
                    raise BuildError(f"pip install {word}: not pinned")
                self._package(word, options.get("--target"))
                continue
            extras = re.fullmatch(r"\.\[(.*)\]", word)
            self._project(extras[1].split(",") if extras else [])

    def _package(self, name: str, target: str | None) -> None:
        """What a package brings, as far as the environment of the tests has it too."""
        try:
            there = distribution(name)
        except PackageNotFoundError:
            return
        if target is not None:
            for file in there.files or []:
                self.image.touch(f"{target}/{file}")
            return
        for entry in there.entry_points.select(group="console_scripts"):
            self.image.touch(f"/opt/venv/bin/{entry.name}")

    def _project(self, extras: list[str]) -> None:
        source = self.image.inside(".")
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
        patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
        for package in sorted(source.iterdir()):
            if any(fnmatch.fnmatch(package.name, pattern) for pattern in patterns):
                target = f"/opt/venv/lib/site-packages/{package.name}"
                shutil.copytree(package, self.image.inside(target))
        for name in project["project"]["scripts"]:
            self.image.touch(f"/opt/venv/bin/{name}")
        listed = project["project"]["optional-dependencies"]
        for extra in extras:
            if extra not in listed:
                raise BuildError(f"pip install .[{extra}]: there is no such extra")
        needed = [*project["project"]["dependencies"], *(r for e in extras for r in listed[e])]
        for requirement in needed:
            self._package(re.split(r"[^A-Za-z0-9_.-]", requirement)[0], None)
