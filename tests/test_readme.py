"""Every command of the README, typed as it stands there, in a copy of the tree.

In the README's order, since later commands use what earlier ones wrote. `make test` is this test
run; `make lint` belongs to CI; commands for several nodes get their syntax checked.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {"make test", "make lint"}
LIMIT_SECONDS = 1200


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The lines of the README's shell blocks without their comments."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tracked files, beside the installed environment and the model of this checkout."""
    tree = tmp_path_factory.mktemp("clone") / "dlora"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.splitlines()):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (tree / ".venv").symlink_to(ROOT / ".venv")
    # Newer than the copies, so that make does not install this tree in place of the checkout.
    (ROOT / ".venv" / ".installed").touch()
    (tree / "models").symlink_to(ROOT / "models")
    yield tree
    shutil.rmtree(tree)


def run(command: str, tree: Path) -> str:
    """Standard output of a command, typed into a shell whose environment is activated."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE"))}
    environment["PATH"] = f"{tree / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a time-out ends all that the command started
    )
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, f"{command}\n{out[-3000:]}\n{err[-3000:]}"
    return out


def read_metrics(tree: Path, run_name: str) -> list[dict]:
    text = (tree / "runs" / run_name / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def check_quickstart(out: str, tree: Path) -> None:
    """`make train` keeps the promises that the README makes of it."""
    for promised in ("W0 ", "A and B", "wire, per step", "before training", "after training"):
        assert promised in out
    assert "adapter: runs/quickstart/adapter" in out
    records = read_metrics(tree, "quickstart")
    before = records[0]["eval_loss"]
    after = records[-1]["eval_loss"]
    assert after <= 0.6 * before, f"held-out loss {before:.3f} -> {after:.3f}"
    assert [record["step"] for record in records] == list(range(len(records)))
    adapter = tree / "runs" / "quickstart" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_make_leaves_the_environment_alone(tree: Path):
    """`make train` in the copy would otherwise point the checkout's environment at the copy."""
    planned = run("make --dry-run train", tree)
    assert "torchrun" in planned
    assert "pip install" not in planned


@pytest.mark.timeout(2400)
def test_every_command_runs(tree: Path):
    ran = []
    for command in commands():
        if command in NOT_RUN:
            continue
        if "--nnodes" in command:
            check_syntax(command)
            continue
        out = run(command, tree)
        ran.append(command)
        if command == "make train":
            check_quickstart(out, tree)
        if "dlora.generate" in command:
            assert out.strip()
    assert "make train" in ran
    assert len(ran) > 8


def check_syntax(command: str) -> None:
    """torchrun understands the first part of `dlora launch`, dlora.config.load the rest."""
    from torch.distributed import run as torchrun

    from dlora.config.load import parse
    from dlora.launch import split

    words = command.split()
    assert words[:2] == ["dlora", "launch"]
    agent, training = split(words[2:])
    assert torchrun.parse_args([*agent, "script"]).nnodes == "2"
    assert parse([str(ROOT / w) if w.endswith(".yaml") else w for w in training], "dlora").config


LOOP = """
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG)
model.save_pretrained("base")
ids = torch.randint(0, 32, (2, 6))
loader = [{"input_ids": ids, "labels": ids}] * 3
"""
AFTERWARDS = """
logits = model(input_ids=ids).logits
if dist.get_rank() == 0:
    from safetensors.torch import save_file

    save_file({"ids": ids, "logits": logits.detach()}, "trained.st")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loop_in_the_readme_runs(tmp_path: Path, ranks: int):
    """The Python block as it stands, under torchrun, around a tiny model and three batches."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    (block,) = blocks("python")
    (tmp_path / "loop.py").write_text(LOOP + block + AFTERWARDS)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    run(f"PYTHONPATH={ROOT} torchrun --nproc-per-node {ranks} loop.py", tmp_path)

    got = load_file(tmp_path / "trained.st")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    before = base(input_ids=got["ids"]).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(loaded(input_ids=got["ids"]).logits, got["logits"])
    assert not torch.equal(got["logits"], before)
