"""Checkpoints: the whole state of a run, verified, readable with safetensors and JSON alone.

    checkpoints/step-000050/
        adapter.safetensors      A, B and trained copies under their names in the model, and the
                                 frozen A0, B0 of adapters that start from a matrix
        optimizer.safetensors    `<parameter>.<state>`, as the optimizer stores it
        <state>.safetensors      of a method with a state of its own: `<parameter>.<name>`
        state.json               step, schedule, random state, data cursor
        config.yaml              the resolved configuration
        manifest.json            sizes and SHA-256 of the files above and of itself, versions; and
                                 `method`: what a method with a state records beside tensors

One rank writes it without a collective, because every rank has the whole state; only an optimizer
state that is divided over ranks is sent to rank 0 first. A directory gets its name last, so that
name means complete. It is read back before an older one is deleted. `checkpoints/latest` contains
the name of the newest, for people and scripts; dlora does not read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dlora.errors import UsageError
from dlora.io.files import inside, read_object

FORMAT = 2  # 1 had no hash of the manifest
FILES = {"adapter.safetensors", "optimizer.safetensors", "state.json", "config.yaml"}
ADAPTER = "adapter.safetensors"
LATEST = "latest"
STEP_DIRECTORY = re.compile(r"step-(\d{6,})")


@dataclass
class Checkpoint:
    """The content of a checkpoint in host memory.

    Attributes:
        tensors: what is trained, and what is frozen beside it.
        states: of the optimizer and of the method, by the name of their file.
        state: `state.json`.
        record: what the method records beside tensors, as JSON.
    """

    tensors: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    record: dict[str, Any] | None = None


def contents_of(checkpoint: Checkpoint, config_yaml: str) -> dict[str, bytes]:
    """The files of a checkpoint by name; the manifest, which tells of all others, comes last."""
    files = {
        "adapter.safetensors": save(checkpoint.tensors),
        **{f"{name}.safetensors": save(states) for name, states in checkpoint.states.items()},
        "state.json": _json(checkpoint.state),
        "config.yaml": config_yaml.encode(),
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"torch": torch.__version__},
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    if checkpoint.record is not None:
        manifest["method"] = checkpoint.record
    manifest["sha256"] = _digest_of(manifest)
    return files | {"manifest.json": _json(manifest)}


def read(directory: Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises:
        UsageError: as for `verify`; or a file is no safetensors file, or has a state of a tensor
            that does not exist.
    """
    files = verify(directory)
    tensors = _tensors(directory / ADAPTER)
    states = {}
    for name in (
        n.removesuffix(".safetensors") for n in files if n.endswith(".safetensors") and n != ADAPTER
    ):
        states[name] = _tensors(directory / f"{name}.safetensors")
        for key in states[name]:
            if key.rpartition(".")[0] not in tensors:
                raise UsageError(f"{directory / name}.safetensors: {key} is of no trained tensor")
    state = read_object(directory / "state.json")
    return Checkpoint(tensors, states, state, method_record(directory))


def method_record(directory: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest records of the adapters' method; None where that is nothing.

    Its content is checked by `LoraAdapter.check_record`.

    Raises:
        UsageError: the manifest is damaged.
    """
    manifest = _manifest(directory)
    return manifest.get("method", manifest.get("triplets"))  # its name in dlora 0.1's first files


def verify(directory: Path, names: Collection[str] | None = None) -> Collection[str]:
    """Check the files called `names`, by default all, against the manifest; returns their names.

    Raises:
        UsageError: a file is missing, is a link out of the directory, has another size or hash than
            in the manifest, or cannot be read; or the directory has another step's name.
    """
    files = _manifest(directory)["files"]
    names = files.keys() if names is None else names
    for name in names:
        path, expected = inside(directory, name), files.get(name)
        try:
            if (
                not isinstance(expected, dict)
                or not path.is_file()
                or path.stat().st_size != expected.get("bytes")
            ):
                raise UsageError(
                    f"{path}: is missing or has the wrong size; the checkpoint is damaged"
                )
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
        if digest != expected.get("sha256"):
            raise UsageError(f"{path}: does not match its SHA-256; the checkpoint is damaged")
    if "state.json" in names:
        _check_step(directory)
    return names


def _manifest(directory: Path) -> dict[str, Any]:
    """Read a manifest and check that it is whole and lists the files."""
    path = inside(directory, "manifest.json")
    manifest = read_object(path)
    if manifest.get("format") not in (1, FORMAT):
        raise UsageError(f"{directory}: checkpoint format {manifest.get('format')} is unknown")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files.keys() >= FILES:
        raise UsageError(f"{path}: does not list the checkpoint's files")
    digest = manifest.get("sha256")
    if digest != _digest_of(manifest) and (digest is not None or manifest["format"] != 1):
        raise UsageError(f"{path}: does not match its SHA-256; the checkpoint is damaged")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without its own."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_step(directory: Path) -> None:
    """Check that a checkpoint has a step, and that its directory has not another step's name."""
    path = directory / "state.json"
    step, named = read_object(path).get("step"), STEP_DIRECTORY.fullmatch(directory.name)
    if type(step) is not int or step < 0:
        raise UsageError(f"{path}: step: expected a number of steps, got {step!r}")
    if named and int(named[1]) != step:
        raise UsageError(f"{path}: step is {step}, but the directory has another step's name")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: is damaged or not a safetensors file: {error}") from None
