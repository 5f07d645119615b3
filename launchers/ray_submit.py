"""`python -m launchers.ray_submit --address URL --config FILE …`: hand a run to a Ray cluster.

    python -m launchers.ray_submit --address http://HEAD:8265 --working-dir . \\
        --config configs/cluster.yaml --num-workers 4 --use-gpu --storage s3://bucket/runs

Packs the working directory, submits `python -m launchers.ray_train` with what remains of the
command line, prints the job's log and ends with its exit status. Ctrl-C asks whether to stop the
job or leave it running. The configuration is read here first, so that a mistake costs no
submission.

The cluster's token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, as Ray
itself does; `--no-auth` is for a cluster that wants none.
"""

from __future__ import annotations

import asyncio
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.load import Config, UsageError, option, parse
from dlora.errors import TransientError
from dlora.train import exit_with

from . import NAME
from .argv import names_of, word, words_of
from .ray_train import Workers, check_options, place_of

# Not copied: what is large, what is made anew there, and what is secret.
EXCLUDED = (
    *(".env*", ".netrc", ".pypirc", ".git-credentials", "*.pem", "*.key", "id_*", "kubeconfig"),
    *(".aws", ".ssh", ".kube", ".ray", ".config"),
    *(".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info"),
    *(".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "wandb"),
    *("/runs", "/models", "checkpoints", "*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth"),
)
POLL_SECONDS, SILENT_SECONDS = 0.5, 300.0
STOP_VARIABLES = {
    "RAY_JOB_STOP_WAIT_TIME_S": "150"
}  # from a stop's SIGTERM to SIGKILL: time to commit
CONNECTION = "dashboard of the head node, as http://HEAD:8265"


@dataclass(frozen=True)
class Submission(Workers):
    """How the job is submitted; the others are launchers.ray_train's."""

    address: str = option("http://127.0.0.1:8265", CONNECTION)
    working_dir: str = option(".", "directory that the job's processes get a copy of")
    exclude: list[str] = option([], f"patterns not to copy, as in .gitignore, beside {EXCLUDED}")
    env: dict[str, str] = option(
        {}, 'environment of the job\'s processes, as {"NCCL_DEBUG": "INFO"}; no secrets'
    )
    submission_id: str | None = option(None, "the job's name; null: Ray makes one")
    no_auth: bool = option(False, "the cluster needs no token")
    no_wait: bool = option(False, "submit and return, without printing the job's log")


def main(argv: list[str]) -> int:
    """Submit and follow; returns the job's exit status."""
    options = parse(argv, prog=f"{NAME}.ray_submit", extra=Submission)
    if options.check:
        raise UsageError("--check is an option of dlora.train, which reads the same configuration")
    wanted: Submission = options.extra
    check_options(options.config, wanted)
    place_of(options.config, wanted, submitted=True)
    root = Path(wanted.working_dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"--working-dir: {root} is not a directory")
    excluded = [*EXCLUDED, *wanted.exclude]
    words = forwarded(argv, root)
    check_packed(options.config, words, root, excluded)
    client = connect(wanted)
    try:
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", f"{NAME}.ray_train", *words]),
            submission_id=wanted.submission_id,
            runtime_env={
                "working_dir": str(root),
                "excludes": excluded,
                "env_vars": STOP_VARIABLES | wanted.env,
            },
        )
    except ConnectionError as error:
        raise TransientError(f"the cluster did not accept the job: {first_line(error)}") from None
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the cluster did not accept the job: {first_line(error)}") from None
    print(f"submitted {job} to {wanted.address}", flush=True)
    return 0 if wanted.no_wait else Following(client, job, wanted.address).status()


def forwarded(argv: list[str], root: Path) -> list[str]:
    """The options of launchers.ray_train, with the configuration's path relative to `root`.

    Raises:
        UsageError: the configuration is not inside `root`.
    """
    kept, own = [], names_of(Submission)
    for name, value in words_of(argv, Submission):
        if name == "config" and value is not None:
            file, packed = Path(value).resolve(), root.resolve()
            if not file.is_relative_to(packed):
                raise UsageError(f"--config: {value} is not inside the working directory {root}")
            value = str(file.relative_to(packed))
        if name not in own:
            kept.append(word(name, value))
    return kept


def check_packed(config: Config, words: list[str], root: Path, excluded: Iterable[str]) -> None:
    """Check that what a relative path names is copied to the cluster.

    Raises:
        UsageError: it is left out, by `excluded` or by an ignore file, which Ray obeys as well.
    """
    import pathspec

    ignored = [root / name for name in (".gitignore", ".rayignore")]
    lines = [line for file in ignored if file.is_file() for line in file.read_text().splitlines()]
    left_out = pathspec.GitIgnoreSpec.from_lines([*lines, *excluded])
    named = [("--config", w.partition("=")[2]) for w in words if w.startswith("--config=")]
    named += [("model.path", config.model.path), ("adapter.path", config.adapter.path or "")]
    for key, value in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        entries = value if isinstance(value, list) else [value or ""]
        named += [(key, str(e["path"]) if isinstance(e, dict) else e) for e in entries]
    for key, path in named:
        for file in files_of(root, key, path):
            if left_out.match_file(file):
                raise UsageError(
                    f"{key}: {file} is not copied to the cluster (ignored or excluded); name a "
                    "path that its nodes see, or a hub id"
                )


def files_of(root: Path, key: str, path: str) -> Iterator[str]:
    """The files below `root` that a relative path or pattern names, relative to it.

    Raises:
        UsageError: it leads out of the directory, or is no pattern.
    """
    if not path or Path(path).is_absolute() or "://" in path:
        return
    steps = Path(os.path.normpath(path)).parts
    if not steps:
        return  # the directory itself, of which some files are always left out
    if steps[0] == "..":  # links may lead out: Ray packs their targets
        raise UsageError(f"{key}: {path} is not inside the working directory {root}")
    try:
        matches = sorted(root.glob(path))
    except ValueError as error:
        raise UsageError(f"{key}: {path}: {error}") from None
    for found in matches:
        inside = [p for p in found.rglob("*") if p.is_file()] if found.is_dir() else [found]
        yield from (file.relative_to(root).as_posix() for file in inside)


def connect(wanted: Submission) -> Any:
    """Connect to the cluster; returns Ray's client.

    Raises:
        UsageError: there is no token, or it is the wrong one.
        TransientError: the cluster does not answer.
    """
    if not wanted.no_auth and not has_token():
        raise UsageError(
            "--address: no token found; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or add "
            "--no-auth if the cluster needs none"
        )
    os.environ["RAY_AUTH_MODE"] = "disabled" if wanted.no_auth else "token"
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(wanted.address)
    except ConnectionError as error:
        raise TransientError(f"--address: {wanted.address}: {first_line(error)}") from None
    except (AuthenticationError, RuntimeError) as error:
        raise UsageError(f"--address: {wanted.address}: {first_line(error)}") from None


def has_token() -> bool:
    """Whether a token is where Ray looks for it; without one, Ray ends the process."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.is_file() and bool(path.read_text().strip())


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    return str(error).strip().partition("\n")[0]


class Following:
    """A job whose log is printed until it ends."""

    def __init__(self, client: Any, job: str, address: str) -> None:
        self._client, self._job, self._address = client, job, address
        self._printed = 0  # characters of the log
        self._failing = math.inf  # since when the cluster has not answered

    def status(self) -> int:
        """Follow the job to its end; returns its exit status.

        130 if it was stopped or left running, 1 if the cluster no longer answers.
        """
        from aiohttp import ClientError  # Ray's own client's

        is_again = False
        while True:
            try:
                if is_again:  # the connection was closed, or the log is not there yet
                    time.sleep(POLL_SECONDS)
                is_again = True
                asyncio.run(self._follow())
                info = self._client.get_job_info(self._job)
                self._failing = math.inf
                if info.status.is_terminal():
                    return self._ended(info)
            except (OSError, RuntimeError, ClientError) as error:
                self._failing = min(self._failing, now := time.monotonic())
                if now - self._failing >= SILENT_SECONDS:
                    print(
                        f"dlora: error: {self._address} no longer answers ({first_line(error)}); "
                        f"{self._job} continues without this program",
                        file=sys.stderr,
                        flush=True,
                    )
                    return 1
            except KeyboardInterrupt:
                if not self.ask():
                    return 130

    async def _follow(self) -> None:
        """Print the log as it grows, without what was printed before."""
        passed = 0
        async for text in self._client.tail_job_logs(self._job):
            new = text[max(0, self._printed - passed) :]
            passed += len(text)
            self._printed = max(self._printed, passed)
            self._failing = math.inf
            print(new, end="", flush=True)

    def _ended(self, info: Any) -> int:
        print(f"{self._job}: {info.status.value.lower()}", flush=True)
        if info.status.value == "STOPPED":
            return 130
        return 0 if info.status.value == "SUCCEEDED" else info.driver_exit_code or 1

    def ask(self) -> bool:
        """Ask what to do after Ctrl-C; returns whether to follow on."""
        how = f"ray job logs --address {self._address} --follow {self._job}"
        if not sys.stdin.isatty():
            print(f"\n{self._job} continues without this program; {how}", flush=True)
            return False
        try:
            answer = input(f"\nstop {self._job}? [y] stop, [l] leave it running, [N] follow on: ")
        except (EOFError, KeyboardInterrupt):
            answer = "l"
        if answer.strip().lower().startswith("y"):
            try:
                self._client.stop_job(self._job)
            except (OSError, RuntimeError) as error:
                print(f"{self._job} could not be stopped: {first_line(error)}", flush=True)
            else:
                print("stopping; submit it again to resume from its last checkpoint", flush=True)
            return True
        if answer.strip().lower().startswith("l"):
            print(f"{self._job} continues; {how}", flush=True)
            return False
        return True


if __name__ == "__main__":
    exit_with(main)
