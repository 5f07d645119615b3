"""Adapters of the Hugging Face hub: PEFT's files, by way of huggingface_hub."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlora.adapters.write import CONFIG, ROUTER, WEIGHTS
from dlora.errors import UsageError
from dlora.io.files import path_of

_FILES = [CONFIG, WEIGHTS, ROUTER, f"experts/*/{CONFIG}", f"experts/*/{WEIGHTS}"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


def adapter_directory(path: str | Path, option: str = "adapter.path") -> Path:
    """The directory of an adapter; one that is not here and is named like an id is downloaded.

    Args:
        option: what the user set, for errors.

    Raises:
        UsageError: the hub does not have it, or cannot be reached.
    """
    local = path_of(path, option)
    is_id = isinstance(path, str) and _ID.fullmatch(path) and not local.parent.exists()
    return local if local.exists() or not is_id else _downloaded(str(path), option)


@functools.lru_cache(maxsize=8)  # its settings are read before its weights
def _downloaded(repository: str, option: str) -> Path:
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = snapshot_download(repository, allow_patterns=_FILES)
    except Exception as error:  # of the network and of the hub
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UsageError(
            f"{option}: {repository} is no directory here, and cannot be had from the Hugging Face "
            f"hub: {said}"
        ) from None
    return Path(found)


def upload(
    files: Path | Callable[[str], None],
    repository: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    **others: Any,
) -> Any:
    """Upload an adapter's files, to a repository that is made if need be.

    Args:
        files: their directory, or what writes them into a directory.
        others: of huggingface_hub's `upload_folder`.

    Returns:
        huggingface_hub's record of the commit.

    Raises:
        UsageError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as made:
        if callable(files):
            files(made)
        hub = HfApi(token=token)
        try:
            name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
            return hub.upload_folder(
                repo_id=name,
                folder_path=made if callable(files) else files,
                commit_message=commit_message or "Upload adapter",
                **{key: value for key, value in others.items() if value is not None},
            )
        except Exception as error:  # of the network and of the hub
            said = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise UsageError(f"push_to_hub: {repository}: {said}") from None
