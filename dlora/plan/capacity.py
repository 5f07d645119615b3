"""The memory that is free on this machine for one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, ranks: int) -> int | None:
    """Bytes that one of this machine's `ranks` ranks may take: of its GPU, or of the host's memory.

    None if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not available:
        return None
    return min([*available, *_left_in_groups()]) // ranks


def _left_in_groups() -> Iterator[int]:
    """What the limits of this process's control groups leave, file cache counted as free."""
    for folder, limit_file, use_file, cache in _groups():
        try:
            limit = (folder / limit_file).read_text(encoding="ascii").strip()
            use = int((folder / use_file).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        if limit.isdigit():  # "max" is no limit
            figures = dict(line.split() for line in stat.splitlines())
            yield max(0, int(limit) - use + int(figures.get(cache, 0)))


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, file of the limit, of the use, name of the file cache) of each, and of those above.

    Version 2 has one hierarchy, version 1 one for memory; in a container both begin at its own.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = Path(path)
        for above in (folder, *folder.parents):
            yield (root / str(above).lstrip("/"), *names)
