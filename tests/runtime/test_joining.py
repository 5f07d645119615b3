"""How a rank finds its device and the others, and how long collectives wait."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_cuda import fake_cuda
from refusals import refusal

from dlora.runtime.ranks import LATER_SECONDS, Ranks, own_device

CPU = torch.device("cpu")
HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.fixture
def two_groups() -> Iterator[list[Any]]:
    """The default process group of this process alone, and one beside it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield [dist.group.WORLD, dist.new_group([0])]
    finally:
        dist.destroy_process_group()


def test_every_group_has_the_run_s_limit_once_weights_are_read(two_groups: list[Any]) -> None:
    """And speaks later than the thread that watches the peers, which has the limit itself."""
    Ranks(0, 1, CPU, None, timeout_seconds=7).loaded()
    found = [group._get_backend(CPU).options._timeout for group in two_groups]
    assert found == [timedelta(seconds=7 + LATER_SECONDS)] * 2
    assert LATER_SECONDS >= 30


@pytest.mark.parametrize(("visible", "local_rank"), [(1, 1), (2, 5)])
def test_a_process_without_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    said = refusal(own_device)
    assert f"LOCAL_RANK is {local_rank}, and this process sees {visible} GPU" in said
    assert chosen == []
    monkeypatch.setenv("LOCAL_RANK", str(visible - 1))
    assert own_device() == torch.device("cuda", visible - 1) and chosen == [visible - 1]


class Done:
    """A collective that has succeeded."""

    def wait(self, timeout: timedelta) -> None:
        """At once."""


@pytest.mark.parametrize("handling", [None, "1"], ids=["unset", "by the user"])
def test_joining_on_a_gpu(monkeypatch: pytest.MonkeyPatch, handling: str | None) -> None:
    """NCCL beside gloo, on this rank's own GPU, for as long as weights may take."""
    monkeypatch.setenv(HANDLING, handling or "")
    if handling is None:
        monkeypatch.delenv(HANDLING)
    store = dist.HashStore()
    store.set("joining/0", "")  # the other rank's
    joined: list[Any] = []
    reduced: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor, async_op: bool) -> Done:
        reduced.append(tensor)
        return Done()

    def start(*backend: str, **options: Any) -> None:
        joined.append((*backend, options, os.environ.get(HANDLING)))

    monkeypatch.setattr(dist, "init_process_group", start)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    with fake_cuda() as cuda:
        Ranks(1, 2, cuda, store, timeout_seconds=20).join(loading_seconds=900)
    [(backend, options, told)] = joined
    assert backend == "cpu:gloo,cuda:nccl" and told == (handling or "0")
    assert options["device_id"] == cuda == reduced[0].device
    assert (options["rank"], options["world_size"]) == (1, 2)
    assert options["timeout"] == timedelta(seconds=900 + LATER_SECONDS)
