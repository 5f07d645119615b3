"""Pages of mapped checkpoint files go back to the kernel; memory that took their place does not."""

import ctypes
import mmap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlora.sharding.engines.storage import dropping_mapped_pages

MAPPED_BYTES = 4 << 20
ROUNDS = 1000
MAP_FIXED_NOREPLACE = 0x100000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(MAPPED_BYTES // 8)}, path)
    return path


def resident_bytes(file: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = line.endswith(str(file))
        elif inside and name == "Rss:":
            found += 1024 * int(rest[0])
    return found


def test_pages_are_given_back_and_read_again(file: Path) -> None:
    with dropping_mapped_pages():
        weight = load_file(file)["weight"]
        total = int(weight.sum())
        deadline = time.monotonic() + 10
        while resident_bytes(file) > MAPPED_BYTES // 16:
            assert time.monotonic() < deadline, "no page was given back"
            time.sleep(0.01)
        assert int(weight.sum()) == total


def test_memory_in_the_place_of_an_unmapped_file_is_left_alone(file: Path) -> None:
    """A file is unmapped while pages are dropped, and new memory comes to lie where it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    with dropping_mapped_pages():
        for _ in range(ROUNDS):
            weight = load_file(file)["weight"]
            place = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            del weight
            mapped = libc.mmap(place, MAPPED_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            if mapped != place:
                continue  # the file is mapped still, and so nothing else can lie there
            memory = torch.frombuffer(
                (ctypes.c_uint8 * MAPPED_BYTES).from_address(place), dtype=torch.uint8
            )
            memory.fill_(1)
            assert int(memory.min()) == 1
            libc.munmap(place, MAPPED_BYTES)
