#!/usr/bin/env -S python3 -IS
"""A pod's liveness: `dlora-alive DIRECTORY SECONDS` for the run whose output.dir is DIRECTORY.

Rank 0 locks DIRECTORY/.lock, which names its host, and renews the file's time every 5 s for as long
as its process lives (dlora/runtime/run_lock.py), also while weights are read. The status is 1 only
if the lock names this pod and was last renewed since this container started, but not in the last
SECONDS: the process is frozen, or its volume is. All else is 0: a run that has not taken the lock
yet, one that is led by another pod, a lock of an earlier pod of this name, no directory at all. A
run that hangs in a collective is no matter of this: `sharding.timeout_seconds` ends it.

No part of the package: a probe must not load torch every minute.
"""

import json
import os
import socket
import sys
import time


def started() -> float:
    """When process 1 started, in seconds since 1970; in a container that is its command."""
    with open("/proc/stat", encoding="ascii") as file:
        boot = next(int(line.split()[1]) for line in file if line.startswith("btime "))
    with open("/proc/1/stat", encoding="ascii") as file:
        after_name = file.read().rpartition(")")[2].split()
    return boot + int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def is_alive(directory: str, seconds: float, *, host: str, since: float, now: float) -> bool:
    """Whether nothing speaks against it; `since` is when this container started."""
    path = os.path.join(directory, ".lock")
    try:
        with open(path, encoding="utf-8") as file:
            renewed = os.fstat(file.fileno()).st_mtime
            owner = json.load(file)["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return owner != host or renewed < since or now - renewed <= seconds


if __name__ == "__main__":
    alive = is_alive(
        sys.argv[1],
        float(sys.argv[2]),
        host=socket.gethostname(),
        since=started(),
        now=time.time(),
    )
    if not alive:
        print(f"{sys.argv[1]}: no heartbeat for {sys.argv[2]} s")
    raise SystemExit(0 if alive else 1)
