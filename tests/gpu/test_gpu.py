"""What only a GPU shows:  python -m pytest tests/gpu  in some minutes on one; skipped elsewhere.

NCCL refuses two ranks on one GPU, so two of them use gloo on CUDA tensors, with W0 on each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run_training import command_line
from tiny import save_chats, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from two_ranks import Ranks

from dlora import LoraConfig, attach, shard
from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.snapshot import Snapshots
from dlora.data import Example
from dlora.data.collate import collate, packed
from dlora.lora.dropout_mask import Mask
from dlora.lora.hashing import mix
from dlora.metrics.log import read_metrics
from dlora.objectives import chunked_loss
from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.replica.hierarchical_reduce import Reduction
from dlora.sharding.topology import Topology
from dlora.train import Run

WANTED = (2, 13)
FOUND = torch.__version__
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no GPU; torch is {FOUND}")
needs_new_torch = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", FOUND)[:2])) < WANTED,
    reason=f"torch is {FOUND}, and `dlora.train` needs collectives that 2.13 has",
)
STEPS, BROKEN = 8, 6


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """words(directory, **settings): a run of 8 steps on a tiny model."""
    place = tmp_path_factory.mktemp("tiny")
    save_model(place / "model", "llama", torch.bfloat16)
    data = str(save_chats(place / "chats.jsonl", 24))

    def of(directory: Path, **settings: Any) -> list[str]:
        common: dict[str, Any] = {"model__path": str(place / "model"), "data__train": data}
        common |= {"output__dir": str(directory), "train__max_steps": STEPS}
        common |= {"model__dtype": "bfloat16", "adapter__lora_dropout": 0.1}
        common |= {"output__save_every": 4}
        return command_line(**common | settings)

    return of


def trained(argv: list[str]) -> str:
    """What a run of one rank prints; it succeeds."""
    command = [sys.executable, "-m", "dlora.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_new_torch
def test_a_first_start_and_its_plan(words: Any, tmp_path: Path) -> None:
    printed = trained(words(tmp_path / "run"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    [ratio] = re.findall(r"^peak memory .*?([\d.]+)\s*$", printed, re.M)[-1:]
    assert 0.85 < float(ratio) < 1.15, printed


@needs_new_torch
def test_a_run_goes_on_bit_for_bit(words: Any, tmp_path: Path) -> None:
    """With `train.deterministic`; the optimizer is fused, so its counts of steps are on the GPU."""
    settings = {"train__deterministic": True, "optimizer__schedule": "constant"}
    trained(words(tmp_path / "whole", **settings))
    trained(words(tmp_path / "parts", **settings, train__max_steps=4))
    trained(words(tmp_path / "parts", **settings))
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def gloo_on_one_gpu(then: Any) -> None:
    """Both ranks use GPU 0 and meet over gloo; `then` is what else this one does."""
    start = dist.init_process_group
    os.environ["LOCAL_RANK"] = "0"

    def over_gloo(backend: str, **options: Any) -> None:
        start("gloo", **options | {"device_id": None})

    dist.init_process_group = over_gloo
    if then is not None:
        whole = Run.sample_keys

        def struck(run: Any, step: int, batch: Any) -> Any:
            if step == BROKEN - 1:
                os.kill(os.getpid(), then)
            return whole(run, step, batch)

        Run.sample_keys = struck  # type: ignore[method-assign]


@needs_new_torch
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_peer(words: Any, tmp_path: Path, how: int) -> None:
    argv = words(tmp_path / "run", sharding__base="none", sharding__timeout_seconds=20)
    ranks = Ranks(argv, tmp_path, rank0=(gloo_on_one_gpu, None), rank1=(gloo_on_one_gpu, how))
    try:
        assert ranks.status(0, limit=180) == 1, ranks.printed(0)
    finally:
        ranks.end()
    checkpoints.verify(tmp_path / "run" / "checkpoints" / f"step-{BROKEN - 1:06d}")
    assert "lost a peer: " in ranks.printed(0)


def test_masks_are_the_bits_of_a_cpu() -> None:
    tokens = mix(torch.arange(1000, dtype=torch.int32))
    for p in (0.05, 0.5):
        here = Mask(tokens, 12345, p).keep(777)
        there = Mask(tokens.cuda(), 12345, p).keep(777)
        assert torch.equal(here, there.cpu())


def test_a_snapshot_arrives_beside_the_next_step() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).cuda()
    attach(model, LoraConfig(r=16))
    replica, snapshots = shard(model), Snapshots()
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=1e-2), fused=True)
    for step in range(1, 6):
        model(torch.randn(64, 256, device="cuda")).square().mean().backward()
        replica.reduce_gradients()
        snapshots.before_change()
        optimizer.step()
        optimizer.zero_grad()
        wanted = {name: p.detach().clone() for name, p in replica.named.items()}
        states = replica.states(optimizer)
        snapshots.take(step, {}, replica, states=states, record=None, frozen={}, state={})
    torch.cuda.synchronize()
    with snapshots.newest() as found:
        assert found is not None and found.step == 5
        kept: dict[str, Tensor] = found.files["adapter"]
        assert all(torch.equal(kept[name], value.cpu()) for name, value in wanted.items())


def test_a_step_waits_for_the_gpu_once() -> None:
    """As the profiler sees it: one read-back, whatever the accumulation."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).cuda()
    attach(model, LoraConfig(r=16, lora_dropout=0.05))
    replica = shard(model)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=1e-2), fused=True)
    x = torch.randn(64, 256, device="cuda")

    def step() -> None:
        for _ in range(4):
            model(x).square().mean().backward()
        reduced = replica.reduce_gradients()
        replica.clip(1.0, reduced.norm)
        optimizer.step()
        replica.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as seen:
        step()
    waits = [e for e in seen.events() if re.search("StreamSynchronize|Memcpy DtoH", e.name)]
    names = json.dumps([event.name for event in waits])
    assert sum("DtoH" in event.name for event in waits) <= 1, names
    assert sum("Synchronize" in event.name for event in waits) <= 1, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_row_is_each_sequence_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    """In bfloat16 by torch's kernel for many lengths; the host waits for nothing in a forward."""
    path = save_model(tmp_path, "blocks", dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
    chunked_loss.install(model)
    drawn = np.random.default_rng(0)
    ids = [drawn.integers(0, 250, n).astype(np.int32) for n in (40, 9, 70)]
    examples = [Example(i, one, one) for i, one in enumerate(ids)]

    def step(batches: list[Any]) -> tuple[float, Tensor]:
        model.zero_grad()
        losses = []
        for batch in (batch.pinned().to("cuda") for batch in batches):
            where = {"positions": batch.positions, "lengths": batch.lengths}
            torch.cuda.set_sync_debug_mode("error")
            losses.append(model(**batch.inputs, targets=batch.targets, **where))
            torch.cuda.set_sync_debug_mode("default")
            losses[-1].backward()
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        return float(sum(losses)), torch.cat(gradients)

    loss, gradient = step([packed(examples, 0)])
    wanted, alone = step([collate([example], 0) for example in examples])
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss == pytest.approx(wanted, rel=close)
    assert float((gradient - alone).norm()) <= close * float(alone.norm())


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """This rank's GPU, alone in a process group as `Ranks.join` makes it."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    device = torch.device("cuda", 0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
        device_id=device,
    )
    try:
        yield device
    finally:
        with contextlib.suppress(RuntimeError, ValueError):  # it may be aborted by then
            dist.destroy_process_group()


@needs_new_torch
def test_nccl_takes_what_a_replica_sends(nccl: torch.device) -> None:
    """Sums in halves and whole, rounded ones as bytes, and what `all_gather` and audits send."""
    alone = Topology(0, 1, 1)
    reduction = Reduction(alone, WireCounter(), torch.bfloat16)
    reduction._levels = [(None, 1, 0)]  # of two ranks or more it would have one by itself
    wanted = torch.randn(1000, device=nccl)
    flat = wanted.clone()
    reduction.scatter_(flat)
    reduction.gather_(flat)
    dist.all_reduce(flat)
    dist.broadcast(flat, src=0)
    assert torch.equal(flat, wanted)
    rounded = reduction._scattered(wanted.bfloat16(), torch.float32)
    assert torch.equal(rounded, wanted.bfloat16().float())
    for kind in (torch.int64, torch.float64, torch.uint8):
        sent = torch.arange(5, device=nccl).to(kind)
        dist.all_gather_single(received := torch.zeros_like(sent), sent)
        assert torch.equal(received, sent)


@needs_new_torch
def test_a_group_of_nccl_is_aborted_without_a_wait(nccl: torch.device) -> None:
    """As a rank does that has failed, so that kernels of the others end; the GPU stays usable."""
    dist.all_reduce(torch.ones(1000, device=nccl), async_op=True)
    abort = dist.distributed_c10d._abort_process_group
    ending = threading.Thread(target=abort, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    assert float(torch.ones(3, device=nccl).sum()) == 3
