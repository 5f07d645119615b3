"""README and the pages of docs/: their commands, typed as they are, in a copy of the tree.

In the order of each page, since later commands use what earlier ones wrote. `make train` runs once,
for all pages. Python blocks run around a tiny model, links lead somewhere, figures were measured.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from plan_table import check_plan_was_kept
from programs import start, status
from tracked import copy_tracked

from dlora.config.load import parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LIFE = ROOT / "docs" / "life_of_an_adapter.md"  # library/test_life.py runs its blocks
RUN_HERE = [page for page in (README, *PAGES) if page != LIFE]
OTHERS = [ROOT / name / "README.md" for name in ("benchmarks", "launchers", "k8s")]
NOT_RUN = {
    "make test",  # is this test run
    "make lint",
    "pip install .",  # test_wheel.py
    "make train",  # the fixture `quickstart`
    "torchrun --nproc-per-node 2 -m dlora.train --config configs/quickstart.yaml",  # make runs it
}
# Demo runs of half a minute, whose words alone are read by default: both engines train in
# tests/sharding, a packed base in training/test_quantized_runs.py, and pairs of answers in
# training/test_preference_runs.py.
LONG_RUNS = ("configs/zero3.yaml", "configs/qlora.yaml", "configs/dpo.yaml")
LIMIT_SECONDS = 1200


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks without their comments."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def is_long(command: str) -> bool:
    return "dlora.train" in command and any(config in command for config in LONG_RUNS)


def of_name(page: Path) -> str:
    return page.stem


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tracked files, beside the installed environment and the model of this checkout."""
    tree = tmp_path_factory.mktemp("clone") / "dlora"
    copy_tracked(tree)
    (tree / ".venv").symlink_to(ROOT / ".venv")
    # Old, so that make finds nothing to install.
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        os.utime(tree / name, (0, 0))
    (tree / "models").symlink_to(ROOT / "models")
    yield tree
    shutil.rmtree(tree)


@pytest.fixture(scope="module")
def quickstart(tree: Path) -> str:
    """What `make train` prints."""
    planned = run("make --dry-run train", tree)
    assert "pip install" not in planned  # it would point the checkout's environment at the copy
    assert "torchrun --nproc-per-node 2 -m dlora.train --config configs/quickstart.yaml" in planned
    return run("make train", tree)


def run(command: str, tree: Path) -> str:
    """Standard output of a command, typed into a shell whose environment is activated."""
    # Names first: pytest changes the environment while threads of `ran` are here.
    known = {name: os.environ.get(name) for name in list(os.environ)}
    environment = {
        k: v for k, v in known.items() if v is not None and not k.startswith(("PYTEST", "MAKE"))
    }
    environment["PATH"] = f"{tree / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(tree)
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


@pytest.mark.timeout(LIMIT_SECONDS)
def test_make_train_does_what_the_readme_promises(quickstart: str, tree: Path) -> None:
    for promised in ("W0 ", "A and B", "wire, per step", "before training", "after training"):
        assert promised in quickstart
    assert "adapter: runs/quickstart/adapter" in quickstart
    check_plan_was_kept(quickstart)
    records = read_metrics(tree, "quickstart")
    before = records[0]["eval_loss"]
    after = records[-1]["eval_loss"]
    assert after <= 0.6 * before, f"held-out loss {before:.3f} -> {after:.3f}"
    assert [record["step"] for record in records] == list(range(len(records)))
    adapter = tree / "runs" / "quickstart" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.fixture(scope="module")
def ran(tree: Path, request: pytest.FixtureRequest) -> Iterator[dict[Path, Future[None]]]:
    """The pages whose commands are tested, two at a time: one command leaves a core idle."""
    items = [i for i in request.session.items if getattr(i, "originalname", "") == EVERY_COMMAND]
    pages = [item.callspec.params["page"] for item in items]
    if any("runs/quickstart" in command for page in pages for command in commands(page)):
        request.getfixturevalue("quickstart")
    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(run_page, page, tree) for page in pages}


@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("page", [p for p in RUN_HERE if blocks(p, "bash")], ids=of_name)
def test_every_command_runs(page: Path, ran: dict[Path, Future[None]]) -> None:
    ran[page].result()


EVERY_COMMAND = test_every_command_runs.__name__


def run_page(page: Path, tree: Path) -> None:
    for command in commands(page):
        if command in NOT_RUN:
            continue
        if "--nnodes" in command:
            check_syntax(command)
            continue
        if is_long(command):
            check_training(command.partition("dlora.train")[2].split())
            continue
        out = run(command, tree)
        if "dlora.generate" in command:
            assert out.strip()
        if "dlora.plan" in command:
            (table,) = blocks(page, "text")
            printed = {" ".join(line.split()) for line in out.splitlines()}
            assert {" ".join(line.split()) for line in table.splitlines()} <= printed


def check_syntax(command: str) -> None:
    """torchrun understands the first part of `dlora launch`, dlora.config.load the rest."""
    from torch.distributed import run as torchrun

    from dlora.launch import split

    words = command.split()
    assert words[:2] == ["dlora", "launch"]
    agent, training = split(words[2:])
    assert torchrun.parse_args([*agent, "script"]).nnodes == "2"
    check_training(training)


def check_training(words: list[str]) -> None:
    assert parse([str(ROOT / w) if w.endswith(".yaml") else w for w in words], "dlora").config


@pytest.mark.full
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("config", LONG_RUNS)
def test_a_long_command_runs(config: str, tree: Path, request: pytest.FixtureRequest) -> None:
    if "runs/quickstart" in (ROOT / config).read_text(encoding="utf-8"):
        request.getfixturevalue("quickstart")
    [command] = [c for page in PAGES for c in commands(page) if is_long(c) and config in c]
    run(command, tree)


MODEL = """
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
ids = torch.randint(0, 32, (2, 6))
loader = [{"input_ids": ids, "labels": ids}] * 3
rows = torch.randint(0, 32, (6, 6))
dataset = [{"input_ids": row, "labels": row} for row in rows]
"""
SAVED = """
model.save_pretrained("base")
"""
SEEN = """
seen = []
model.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
)
"""
AFTERWARDS = """
from safetensors.torch import save_file

logits = model(input_ids=ids).logits
seen = torch.cat(seen[:-1])
save_file({"ids": ids, "logits": logits.detach(), "rows": rows, "seen": seen}, f"{rank}.st")
if dist.is_initialized():
    dist.barrier()  # a peer that closes first may leave gloo's threads at work as this one ends
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_in_the_readme_runs(tmp_path: Path, tree: Path, world: int) -> None:
    """The Python block as it is, under torchrun and without, around a tiny model and six rows.

    Each epoch each row is on one rank.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    (block,) = blocks(README, "python")
    (tmp_path / "loop.py").write_text(MODEL + SAVED + SEEN + block + AFTERWARDS)
    starter = "python" if world == 1 else f"torchrun --nproc-per-node {world}"
    run(f"cd {tmp_path} && {starter} loop.py", tree)

    results = [load_file(tmp_path / f"{rank}.st") for rank in range(world)]
    got = results[0]
    for epoch in range(2):
        halves = [result["seen"].chunk(2)[epoch] for result in results]
        together = sorted(torch.cat(halves).tolist())
        assert together == sorted(got["rows"].tolist())
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    before = base(input_ids=got["ids"]).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    torch.testing.assert_close(loaded(input_ids=got["ids"]).logits, got["logits"])
    assert not torch.equal(got["logits"], before)


UPDATED = """
if "optimizer" in globals():
    before = [p.detach().clone() for p in replica.named.values()]
    model(**loader[0]).loss.backward()
    replica.reduce_gradients()
    optimizer.step()
    optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, replica.named.values(), strict=True))
    del optimizer
assert torch.isfinite(model(**loader[0]).loss)
"""


@pytest.mark.parametrize(
    "page", [p for p in RUN_HERE if p != README and blocks(p, "python")], ids=of_name
)
def test_every_python_block_runs(page: Path, tmp_path: Path) -> None:
    """Each around a new tiny model, on two ranks; its optimizer makes one more step, which moves
    what is trained."""
    script = ["import torch\ntorch.distributed.init_process_group('gloo')"]
    script += [MODEL + block + UPDATED for block in blocks(page, "python")]
    (tmp_path / "blocks.py").write_text("\n".join([*script, "dist.destroy_process_group()\n"]))
    log = tmp_path / "log"
    assert status(start(2, ["blocks"], log, directory=tmp_path)) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize(
    "page", [README, *PAGES, *OTHERS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readme_is_short_and_names_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    assert {page.name for page in PAGES} == set(re.findall(r"\(docs/([^)]+)\)", text))


def figures(text: str) -> list[str]:
    """Numbers with a decimal point."""
    return re.findall(r"(?<![\d.])\d[\d,]*\.\d+(?![\d.])", text)


@pytest.mark.parametrize("page", ["README", "docs/benchmarks", "docs/methods", "docs/quantisation"])
def test_figures_are_those_of_the_benchmarks(page: str) -> None:
    """A figure in a table is one of benchmarks/README.md, rounded, or in millions."""
    measured = {
        float(number.replace(",", "")) / unit
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?", OTHERS[0].read_text(encoding="utf-8"))
        for unit in (1, 1e6)
    }
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    tables = re.sub(r"\]\([^)]*\)", "]", tables)  # addresses of papers
    shown = figures(tables)
    assert shown
    for figure in shown:
        decimals = len(figure.partition(".")[2])
        value = float(figure.replace(",", ""))
        assert any(round(m, decimals) == value for m in measured), figure
