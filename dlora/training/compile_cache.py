"""`train.compile_cache`: where torch's compiler keeps what it has made.

torch unpickles what it finds there and loads it as machine code. So the directory is the user's
own, nobody else may write to it or put another in its place, it is never part of what a run writes
(which may be copied to other machines), and nothing is ever fetched into it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import torch

from dlora.errors import UsageError

KEY = "train.compile_cache"
_ENVIRONMENT = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def check_cache(setting: str | None, output: Path) -> None:
    """Check a cache, as far as it exists, without writing anything.

    Args:
        output: `output.dir`.

    Raises:
        UsageError: it may be written by others, is a link or no directory, or lies in `output.dir`.
    """
    if setting is None:
        return
    path = Path(setting).expanduser().absolute()
    if path.is_symlink():
        raise UsageError(f"{KEY}: {path} is a link; name the directory itself")
    path = path.parent.resolve() / path.name
    inside = output.expanduser().resolve()
    if path == inside or inside in path.parents:
        raise UsageError(f"{KEY}: {path} lies in output.dir, which may be copied elsewhere")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{KEY}: {path} is no directory")
    existing = [place for place in (path, *path.parents) if place.exists()]
    for place in existing:
        _check_own(place, is_cache=place == path)
    if not os.access(existing[0], os.W_OK):
        raise UsageError(f"{KEY}: {path} cannot be written")


def unusable(setting: str | None, output: Path) -> str:
    """Why a cache cannot be used, as `check_cache` says it; "": it can."""
    try:
        check_cache(setting, output)
    except UsageError as error:
        return str(error)
    return ""


def use_cache(setting: str | None) -> None:
    """Let torch's compiler use the directory, which is made; of none, a new one until the exit.

    Raises:
        UsageError: it cannot be made, or is not the user's alone.
    """
    if setting is None:
        path = Path(tempfile.mkdtemp(prefix="dlora-compile-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        torch._inductor.config.force_disable_caches = True
    else:
        path = Path(setting).expanduser().absolute()
        try:
            for place in (*reversed(path.parents), path):  # whatever the umask is
                place.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{KEY}: {path} cannot be made: {error.strerror}") from error
        _check_own(path, is_cache=True)  # it may have come from elsewhere since it was checked
    for name, folder in _ENVIRONMENT.items():
        os.environ[name] = str(path / folder)


def _check_own(place: Path, *, is_cache: bool) -> None:
    """Raise a `UsageError` if others than this user and root may change what a path leads to."""
    found = place.lstat()
    if found.st_uid not in ({os.geteuid()} if is_cache else {os.geteuid(), 0}):
        raise UsageError(f"{KEY}: {place} belongs to another user")
    open_to_all = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if open_to_all and (is_cache or not found.st_mode & stat.S_ISVTX):
        raise UsageError(
            f"{KEY}: others may write to {place}, and torch unpickles what it finds there; "
            "chmod go-w, or name another directory"
        )


def end_workers() -> None:
    """End the processes that the compiler has started for itself."""
    workers = sys.modules.get("torch._inductor.async_compile")
    if workers is not None:
        workers.shutdown_compile_workers()
