"""docs/life_of_an_adapter.md: its blocks, run in their order, and PEFT on what they leave.

The page is the test's source, so it is run here and not by test_readme.py. `base/` is a tiny model.
Each command is a process of its own, forked from one that has imported torch.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mixes import apart, loaded, updates
from programs import start, status
from safetensors.torch import load_file
from tiny import save_chats, whole

PAGE = Path(__file__).parents[2] / "docs/life_of_an_adapter.md"
SCRIPTS = ("swap.py", "compare.py")  # its Python blocks, as it names them
SAVED = """
from safetensors.torch import save_file

if torch.distributed.get_rank() == 0:
    save_file({"question": question, "before": before, "after": after}, "swapped.safetensors")
torch.distributed.barrier()  # a peer that closes first may leave gloo's threads at work
torch.distributed.destroy_process_group()
"""


def process(command: str, directory: Path) -> str:
    """What a line of the page prints."""
    words, world = shlex.split(command), 1
    if words[:2] == ["torchrun", "--nproc-per-node"]:
        world, words = int(words[2]), words[3:]
    elif words[0] == "python":
        words = words[1:]
    if words[0] in SCRIPTS:
        words[0] = words[0].removesuffix(".py")
    elif words[0] == "-m":
        words = words[1:]
    assert words[0] in ("dlora", "dlora.train", "swap", "compare"), command
    log = directory / "log"
    log.unlink(missing_ok=True)
    assert status(start(world, words, log, directory=directory)) == 0, f"{command}\n{read(log)}"
    return read(log)


def read(log: Path) -> str:
    return log.read_text(encoding="utf-8") if log.exists() else ""


@dataclass(frozen=True)
class Life:
    """The directory in which the page was run; of each command its line, what it printed, and where
    `library/active/support` led after it."""

    directory: Path
    ran: list[tuple[str, str, Path]]

    def printed(self, words: str) -> str:
        """By the first command that has these words."""
        return next(printed for line, printed, _ in self.ran if words in line)

    def active(self, words: str) -> list[Path]:
        """After each command that has these words."""
        return [active for line, _, active in self.ran if words in line]


@pytest.fixture(scope="module")
def life(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Life:
    directory = tmp_path_factory.mktemp("life")
    shutil.copytree(saved_models("llama"), directory / "base")
    for name, count in (("first", 8), ("second", 12), ("held_out", 4)):
        save_chats(directory / f"{name}.jsonl", count)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    scripts = [text for language, text in blocks if language == "python"]
    for name, text in zip(SCRIPTS, scripts, strict=True):
        (directory / name).write_text(text + (SAVED if name == "swap.py" else ""))
    active = directory / "library/active/support"
    lines = "".join(text for language, text in blocks if language == "bash").splitlines()
    return Life(directory, [(line, process(line, directory), active.resolve()) for line in lines])


def logits(directory: Path, adapter: Path, question: torch.Tensor) -> torch.Tensor:
    """PEFT's."""
    with torch.no_grad():
        return loaded(whole(directory / "base"), adapter).eval()(question).logits


def test_others_read_what_each_command_says(life: Life) -> None:
    index = json.loads((life.directory / "library/library.json").read_text())
    entry = index["adapters"]["support"]
    assert [state["action"] for state in entry["history"]] == [
        *["add"] * 3,
        *("rollback", "activate", "rollback"),
    ]
    assert [state["active"] for state in entry["history"]] == [1, 2, 3, 2, 3, 2]
    first, second, third = life.active("library add")
    assert len({first, second, third}) == 3
    assert life.active("library rollback") == [second, second]
    assert life.active("library activate") == [third]


def test_what_the_library_tells(life: Life) -> None:
    shown = life.printed("library show")
    first, second = shown.split("support@2")[:2]
    assert "trial" in first and "more-data" in second and "from    support@1\n" in second
    for version in (first, second):
        assert "eval_loss" in version and "data    " in version and "identity" in version
    assert "rating 4.5" in second
    assert "2 versions, active 2" in life.printed("library list")
    difference = life.printed("library diff")
    assert difference.startswith("support@1 -> support@2") and "q_proj" in difference


def test_a_running_model_computes_with_what_it_was_given(life: Life) -> None:
    directory = life.directory
    swapped = load_file(directory / "swapped.safetensors")
    for key, run in (("before", "first"), ("after", "second")):
        wanted = logits(directory, directory / f"runs/{run}/adapter", swapped["question"])
        torch.testing.assert_close(swapped[key], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(swapped["before"], swapped["after"], rtol=1e-3, atol=1e-3)


def test_the_exported_adapter_is_the_active_version(life: Life) -> None:
    """`compare.py` has compared logits; here the tensors."""
    directory = life.directory
    exported, active = (
        load_file(directory / place / "adapter_model.safetensors")
        for place in ("exported/adapter", "runs/second/adapter")
    )
    assert exported.keys() == active.keys()
    assert all(torch.equal(exported[key], active[key]) for key in active)


def test_the_mix_is_peft_s_weighted_adapter(life: Life) -> None:
    directory = life.directory
    adapters = [directory / f"runs/{run}/adapter" for run in ("first", "second")]
    both = loaded(whole(directory / "base"), *adapters)
    for kind, made in (("cat", "exported/mix"), ("svd", "runs/mixed")):
        rank = {"svd_rank": 8} if kind == "svd" else {}
        both.add_weighted_adapter(["0", "1"], [0.7, 0.6], kind, combination_type=kind, **rank)
        ours = updates(loaded(whole(directory / "base"), directory / made), "0")
        assert apart(ours, updates(both, kind)) < 1e-5
