"""Low-rank models: their weights beside torch's SVD, and how transformers and dlora load them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from exported import loaded, logits, weights
from refusals import refusal
from test_extract import content

from dlora.library.compress import main
from dlora.library.compressed import load_compressed
from dlora.runtime.ranks import Ranks

LOW = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


def low_rank_base(bases, name: str, to: Path) -> Path:
    """A base with matrices of rank 3 and a little noise, so that energy 0.99 takes rank 3."""
    model = loaded(bases(name))
    torch.manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.removesuffix(".weight").endswith(LOW[name]) and parameter.ndim == 2:
                m, n = parameter.shape
                noise = 1e-3 * torch.randn(m, n)
                parameter.copy_(0.1 * torch.randn(m, 3) @ torch.randn(3, n) + noise)
    model.save_pretrained(to, max_shard_size="25KB")
    for path in bases(name).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, to / path.name)
    return to


def compressed(base: Path, to: Path, *words: str, energy: str = "0.99") -> Path:
    assert main(["--base", str(base), "--energy", energy, "--to", str(to), *words]) == 0
    return to


def truncated(base: Path, name: str) -> Any:
    """The base with its low-rank matrices cut by torch's SVD."""
    model = loaded(base)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.removesuffix(".weight").endswith(LOW[name]) and parameter.ndim == 2:
                U, S, Vt = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((U[:, :3] * S[:3]) @ Vt[:3])
    return model.eval()


@pytest.mark.parametrize("name", LOW)
def test_a_dense_model_is_the_truncation_for_transformers(name, bases, tmp_path, capsys) -> None:
    base = low_rank_base(bases, name, tmp_path / "base")
    to = compressed(base, tmp_path / "dense", "--dense")
    printed = capsys.readouterr().out
    wanted = truncated(base, name)
    torch.testing.assert_close(logits(loaded(to)), logits(wanted), rtol=1e-4, atol=1e-4)
    before, after = weights(base), weights(to)
    assert before.keys() == after.keys()
    assert {k: t.dtype for k, t in before.items()} == {k: t.dtype for k, t in after.items()}
    record = json.loads((to / "compression.json").read_text())
    low = set(record["products"])
    assert {path.rpartition(".")[2] for path in low} == set(LOW[name])
    assert all(
        found["rank"] == 3 and found["energy"] > 0.99 for found in record["products"].values()
    )
    unlike = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.removesuffix(".weight") for key in unlike} == low
    for path, why in record["not compressed"].items():
        assert f"{path}: not compressed: {why}" in printed and "pays below" in why


@pytest.mark.parametrize("name", LOW)
def test_factors_are_fewer_bytes_and_load_as_the_truncation(name, bases, tmp_path) -> None:
    base = low_rank_base(bases, name, tmp_path / "base")
    to = compressed(base, tmp_path / "low")
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (base, to)]
    assert sizes[1] < 0.9 * sizes[0]
    with pytest.raises(OSError, match="no file named"):  # rather than weights drawn at random
        loaded(to)
    model = load_compressed(to, dtype="float32")
    torch.testing.assert_close(logits(model), logits(truncated(base, name)), rtol=1e-4, atol=1e-4)


def test_bytes_are_the_same_on_two_ranks(bases, tmp_path, pools) -> None:
    base = low_rank_base(bases, "llama", tmp_path / "base")
    torch.set_num_threads(1)  # as the ranks have
    compressed(base, tmp_path / "one")
    words = ["--base", str(base), "--energy", "0.99", "--to", str(tmp_path / "two")]
    pools(2).run(compress_on_each, words)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def compress_on_each(words: list[str]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    main(words, Ranks(rank, world, torch.device("cpu"), ranks.current_store))


MISTAKES = {  # words after --to DIR; what the message says
    "no energy": (["--base", "B"], "the following arguments are required: --energy"),
    "rank": (["--base", "B", "--energy", "0.9", "--rank", "2"], "unrecognized arguments: --rank 2"),
    "energy": (
        ["--base", "B", "--energy", "0"],
        "--energy: must be a number above 0 and at most 1",
    ),
    "nothing pays": (["--base", "B", "--energy", "0.99"], "pays for none of 14 linear layers of B"),
    "again": (["--base", "low", "--energy", "0.99"], "--base: low is compressed already"),
    "no base": (["--base", "./nix", "--energy", "0.9"], "--base: directory ./nix does not exist"),
    "full": (["--base", "B", "--energy", "0.9", "--to", "low"], "--to: low is not empty"),
    "itself": (
        ["--base", "low", "--energy", "0.9", "--to", "low"],
        "--to: low is the model itself",
    ),
    "long": (["--base", "x" * 300, "--energy", "0.9"], "--base: xxx"),
}


@pytest.fixture(scope="module")
def site(bases, tmp_path_factory) -> Path:
    """The directories that the mistakes name."""
    site = tmp_path_factory.mktemp("site")
    (site / "B").symlink_to(bases("llama"))
    compressed(low_rank_base(bases, "llama", site / "source"), site / "low")
    return site


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(mistake, site, monkeypatch) -> None:
    monkeypatch.chdir(site)
    before = sorted(site.rglob("*"))
    words, message = MISTAKES[mistake]
    target = [] if "--to" in words else ["--to", "new"]
    assert message in refusal(main, [*target, *words])
    assert sorted(site.rglob("*")) == before
