"""The meter counts anonymous memory: what the kernel calls so, and no page of a mapped file."""

import gc
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch

from dlora.runtime import memory
from dlora.runtime.memory import MemoryMeter, anonymous_bytes, trim_after_step

MB = 1 << 20


def kernels_figure() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_it_is_the_kernel_s_figure() -> None:
    held = bytearray(b"x") * (50 * MB)
    assert abs(anonymous_bytes() - kernels_figure()) < 2 * MB
    assert anonymous_bytes() > len(held)


def test_pages_of_a_mapped_file_do_not_count(tmp_path: Path) -> None:
    """Until they are written to, as those of a private mapping may be."""
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (50 * MB))
    meter = MemoryMeter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        assert meter.peak() < 10 * MB
        for page in range(0, len(mapped), mmap.PAGESIZE):
            mapped[page] = 0
        assert meter.peak() >= 50 * MB


def test_a_peak_between_two_questions_counts() -> None:
    meter = MemoryMeter()
    held = bytearray(b"x") * (50 * MB)
    time.sleep(0.2)
    del held
    assert meter.peak() >= 50 * MB


class Ring:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.held, self.me = bytearray(b"x") * (50 * MB), self


def test_garbage_from_before_hides_nothing() -> None:
    Ring()
    meter = MemoryMeter()
    held = bytearray(b"x") * (50 * MB)
    gc.collect()
    assert meter.peak() >= len(held)


def sampling() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "dlora-memory"}


def test_a_meter_samples_as_long_as_somebody_has_it() -> None:
    """Not as long as the process, in which run may follow run."""
    before, meter = sampling(), MemoryMeter()
    [mine] = sampling() - before
    del meter
    mine.join(30)
    assert not mine.is_alive()


def test_the_heap_is_trimmed_after_a_step_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It walks all of the heap, in which a GPU's tensors are not."""
    trimmed = []
    monkeypatch.setattr(memory, "trim", lambda: trimmed.append(True))
    trim_after_step(torch.device("cuda", 0))
    assert trimmed == []
    trim_after_step(torch.device("cpu"))
    assert trimmed == [True]
