"""`model.dtype: auto`: bfloat16 where every rank multiplies in it natively, else float32."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from refusals import preparation
from run_training import Runs, same_bits, train

from dlora.base.native import multiplies_natively, native_dtype
from dlora.cli import chosen_base
from dlora.config.load import parse
from dlora.plan.command import Machines, survey

AMX, AVX512_BF16 = {"amx_bf16": True, "avx512_bf16": True}, {"avx512_bf16": True}
AVX512 = {"avx512_f": True, "avx512_vnni": True}


@contextmanager
def machine(capabilities: dict[str, bool], isa: str = "") -> Iterator[None]:
    """Inside, torch reports an x86 CPU with these instructions."""
    with (
        mock.patch.object(torch.cpu, "get_capabilities", lambda: capabilities),
        mock.patch("platform.machine", lambda: "x86_64"),
        mock.patch.dict(os.environ, {"ONEDNN_MAX_CPU_ISA": isa}),
    ):
        yield


@pytest.mark.parametrize(
    ("capabilities", "isa", "natively"),
    [
        (AMX, "", True),
        (AVX512_BF16, "", True),
        (AVX512_BF16, "AVX512_CORE_BF16", True),
        (AMX, "avx512_core", False),  # which stands for an older CPU
        (AMX, "AVX2_VNNI_2", False),
        (AVX512, "", False),
        ({}, "", False),
    ],
    ids=["amx", "avx512_bf16", "kept_at_bf16", "kept_from_bf16", "kept_at_avx2", "avx512", "none"],
)
def test_native_is_what_has_instructions(
    capabilities: dict[str, bool], isa: str, natively: bool
) -> None:
    with machine(capabilities, isa):
        assert multiplies_natively("cpu") is natively
        assert native_dtype("cpu") == ("bfloat16" if natively else "float32")


def test_this_machine_is_judged_by_what_the_kernel_lists() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    kept = bool(os.environ.get("ONEDNN_MAX_CPU_ISA"))
    if not kept and flags & {"avx2", "avx512f"}:  # an x86
        assert multiplies_natively("cpu") is bool(flags & {"amx_bf16", "avx512_bf16"})


def told_on(argv: list[str], natively: list[bool]) -> tuple[dict[str, Any], str]:
    """A run whose ranks' machines differ, and what it printed."""
    printed, rank = io.StringIO(), int(os.environ["RANK"])
    with machine(AMX if natively[rank] else {}), contextlib.redirect_stdout(printed):
        return train(argv), printed.getvalue()


def dtype_of(directory: Path) -> str:
    return yaml.safe_load((directory / "config.yaml").read_text())["model"]["dtype"]


def test_ranks_agree_and_a_resumed_run_keeps_its_dtype(run: Runs, tmp_path: Path) -> None:
    """One rank of two without bfloat16: float32 on both, and the run of float32 bit for bit."""
    steps = {"optimizer__schedule": "constant", "optimizer__warmup_ratio": 0}
    auto = steps | {"model__dtype": "auto", "output__save_every": 2, "train__max_steps": 2}
    (mixed, _), _ = run("mixed", 2, work=told_on, arguments=([True, False],), **auto)
    assert "model.dtype: auto is float32: the ranks' devices do not all multiply" in mixed[1]
    longer = auto | {"train__max_steps": 3}
    (resumed, _), _ = run("mixed", 2, work=told_on, arguments=([True, True],), **longer)
    assert (
        "auto is float32, as in the checkpoint; a fresh run would take bfloat16 on these devices"
        in resumed[1]
    )
    assert dtype_of(tmp_path / "mixed") == "float32"
    (plain, _), _ = run("plain", 2, **longer | {"model__dtype": "float32"})
    assert same_bits(resumed[0]["tensors"], plain["tensors"])


@pytest.mark.parametrize("natively", [False, True])
def test_the_plan_and_the_commands_answer_alike(
    words: Any, saved_models: Any, tmp_path: Path, natively: bool
) -> None:
    config = parse(words(tmp_path / "run", model__dtype="auto"), prog="dlora.plan").config
    name = "bfloat16" if natively else "float32"
    with machine(AMX if natively else {}):
        assert survey(config, Machines(gpus_per_node=1)).model.endswith(f"in {name}")
        assert survey(config, Machines(gpu_memory_gb=80)).model.endswith("in bfloat16")
        path = saved_models("llama")
        taken = preparation(words(tmp_path / "run", model__dtype="auto"), check=True)
        others: dict[str, Any] = {"trust_remote_code": False, "announce": print}
        base, _ = chosen_base(path, None, dtype="auto", **others)
    assert taken.base.dtype is base.dtype is getattr(torch, name)
    assert taken.config.model.dtype == name
