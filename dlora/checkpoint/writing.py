"""Writing a checkpoint: beside its place, verified, renamed; older ones are deleted last."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dlora.checkpoint.format import LATEST, Checkpoint, contents_of, verify
from dlora.checkpoint.listing import steps_in
from dlora.errors import UsageError
from dlora.io.files import clear, sync, write_atomically


def write(
    checkpoint: Checkpoint,
    root: Path,
    config_yaml: str,
    keep_last: int,
    rank: int = 0,
    check: Callable[[], None] = lambda: None,
    may_delete: Callable[[Path], bool] = lambda directory: True,
) -> Path:
    """Write a checkpoint under `root` and verify it; then delete all but the newest and this one.

    Several ranks may write the same step at the same time: one of them gives it its name.

    Args:
        config_yaml: the content of `config.yaml`.
        keep_last: how many checkpoints to keep.
        rank: of the writer, for the temporary name.
        check: called before anything is written and before the checkpoint gets its name; raises
            if another run has taken the directory by then.
        may_delete: whether an older one may be deleted this time, or is being read.

    Returns:
        Its directory, `root/step-NNNNNN`.

    Raises:
        OSError: it cannot be written, or what is read back differs; no older one is deleted.
    """
    step = checkpoint.state["step"]
    final = root / f"step-{step:06d}"
    own = f".{rank}-{os.getpid()}.tmp"
    check()
    beside = root / f".step-{step:06d}{own}"
    clear(root, f".step-*{own}")  # left by an earlier save that could not delete it
    beside.mkdir(parents=True)
    try:
        for name, content in contents_of(checkpoint, config_yaml).items():
            write_atomically(beside / name, content)
        check()
        _take_name(beside, final)
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(root)
    try:
        verify(final)
    except UsageError as error:
        raise OSError(f"read back, {error}") from None
    with contextlib.suppress(OSError):  # a hint is no reason to call the save a failure
        write_atomically(root / LATEST, f"{final.name}\n".encode())
    for _, old in steps_in(root)[:-keep_last]:
        if old != final and may_delete(old):
            shutil.rmtree(old, ignore_errors=True)
    return final


def _take_name(beside: Path, final: Path) -> None:
    """Rename `beside` to `final`; another rank may do the same at the same time."""
    aside = beside.with_suffix(".old")
    while True:
        try:
            os.rename(beside, final)
            break
        except OSError:
            if not final.is_dir():
                raise
        if _is_same(beside, final):  # another rank was faster
            shutil.rmtree(beside)
            break
        # The same step of another start, or a damaged one: the newer one takes the name.
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    """Whether `other` verifies and has the same files, byte for byte, as `one`, just written."""
    try:
        verify(other)
        return (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    except (OSError, UsageError):
        return False
