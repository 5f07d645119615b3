"""What is wrong with a GGUF file or the cache directory is one line, and leaves nothing behind."""

import resource
import shutil
from pathlib import Path

import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import convert
from refusals import refusal

from dlora.base import gguf as gguf_base
from dlora.base.gguf import converted_base
from dlora.errors import UsageError


def assert_refused(gguf: Path, cache_dir: Path, *words: str) -> None:
    """One line with these words, and neither a conversion nor a part of one is left."""
    message = refusal(convert, gguf, cache_dir)
    assert all(word in message for word in words), message
    if cache_dir.is_dir():
        assert [path for path in cache_dir.iterdir() if path.suffix != ".lock"] == []


def test_file_errors(tmp_path):
    cache_dir, path = tmp_path / "cache", tmp_path / "tiny.gguf"
    assert_refused(path, cache_dir, "model.path", str(path), "No such file")
    assert_refused(tmp_path, cache_dir, "model.path", "directory")
    path.write_bytes(b"PK\3\4 and more")
    assert_refused(path, cache_dir, "model.path", str(path), "not a GGUF file")
    path.write_bytes(b"")
    assert_refused(path, cache_dir, "model.path", "not a GGUF file")
    tiny = gguf_files.tiny_llama
    assert_refused(tiny(path, architecture="nosuch"), cache_dir, "model.path", "nosuch")
    assert_refused(tiny(path, tokenizer=False), cache_dir, "model.path", "tokenizer")
    assert_refused(
        tiny(path, numbers={"split.count": 3}), cache_dir, "model.path", "one of 3 parts"
    )
    wide = {"embedding_length": 128}
    assert_refused(
        tiny(path, numbers=wide), cache_dir, "has model.embed_tokens.weight as [262, 64]"
    )
    lacking = gguf_files.layered(gguf_files.ATTENTION | gguf_files.DENSE)
    numbers = gguf_files.COMMON | {"vocab_size": gguf_files.VOCABULARY}
    gguf_files.write_gguf(path, "llama", numbers, lacking)
    assert_refused(path, cache_dir, "model.path", "do not contain model.layers.1.", "8 more")
    mixed = (gguf_files.F32, GGMLQuantizationType.Q8_0)
    assert_refused(
        gguf_files.tiny_qwen35moe(path, mixed), cache_dir, "model.path", "different types"
    )
    unknown = (GGMLQuantizationType.Q8_1,)
    assert_refused(tiny(path, types=unknown), cache_dir, "model.path", "Q8_1")
    assert_refused(gguf_files.tiny_lfm2(path, unknown), cache_dir, "model.path", "9")


@pytest.mark.parametrize("make", [gguf_files.tiny_llama, gguf_files.tiny_lfm2])
def test_truncated_file(make, tmp_path):
    whole = make(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for share in (0.001, 0.01, 0.1, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert_refused(path, tmp_path / "cache", "model.path", str(path), "truncated")


def test_cache_errors(tmp_path, monkeypatch):
    gguf, cache_dir = gguf_files.tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "cache"
    assert_refused(gguf, gguf / "cache", "model.cache_dir", str(gguf / "cache"))
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
        patch.setattr(gguf_base.shutil, "disk_usage", lambda _: usage)
        assert_refused(gguf, cache_dir, "model.cache_dir", str(cache_dir), "0 MB free")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (2000, 200_000):  # writing fails within a file, the tokenizer's or the weights'
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            assert_refused(gguf, cache_dir, "model.cache_dir", str(cache_dir), "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_changed_while_converting(tmp_path):
    gguf, cache_dir = gguf_files.tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "cache"

    def write_to_it(_):
        with gguf.open("ab") as file:
            file.write(b"more")

    with pytest.raises(UsageError, match=r"model\.path.*changed"):
        converted_base(gguf, cache_dir, torch.float32, write_to_it)
    assert not [path for path in cache_dir.iterdir() if path.is_dir()]
