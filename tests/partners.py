"""The environment of `make partners`: packages that would not go together with those of the tests.

A test runs a program there, in a process of its own, and reads what it prints.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLACE = Path(os.environ.get("DLORA_PARTNERS", "~/.cache/dlora/partners")).expanduser()


def partner(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run that environment's Python."""
    python = PLACE / "bin/python"
    assert python.exists(), f"{python} is missing: make partners makes it (DLORA_PARTNERS)"
    done = subprocess.run(
        [str(python), *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def told_by(program: str, *words: str, cwd: Path, **environment: str) -> Any:
    """What a program prints as the last line, which is JSON."""
    printed = partner("-c", program, *words, cwd=cwd, **environment).stdout
    return json.loads(printed.strip().splitlines()[-1])
