"""A GGUF file becomes a model directory: same bits, little memory, once, whole or not at all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gguf
import gguf_files
import pytest
import torch
from gguf_files import convert
from sampling import full
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dlora.base import gguf as gguf_base
from dlora.base import gguf_cache
from dlora.base.gguf_reader import GGUFReader
from dlora.base.model import find_base
from dlora.errors import dtype_name
from dlora.io.safetensors import stored_tensors

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def assert_same_model(gguf: Path, out: Path, dtype: torch.dtype):
    """Bit-equal to transformers' own loading of the whole file. Returns the model from `out`."""
    reference = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    model, report = AutoModelForCausalLM.from_pretrained(
        str(out), dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == dtype and torch.equal(found[name], tensor), name
    assert type(model) is type(reference)
    ours, theirs = model.config.to_dict(), reference.config.to_dict()
    for own in ("_name_or_path", "_model_name_or_path", "architectures"):
        ours.pop(own, None), theirs.pop(own, None)
    if model.config.tie_word_embeddings == reference.config.tie_word_embeddings:
        assert ours == theirs
    text = "".join(file.read_text() for file in out.glob("*config.json"))
    assert "gguf" not in text and "quantization" not in text and str(out.parent) not in text
    return model


def assert_same_tokenizer(gguf: Path, out: Path):
    reference = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert type(tokenizer) is type(reference)
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.get_added_vocab() == reference.get_added_vocab()
    assert tokenizer.chat_template == reference.chat_template
    for text in ("The theatre,  and\n\tmore\u00e9 \U0001f600 <|im_start|>user", " 1234 don't"):
        assert tokenizer(text).input_ids == reference(text).input_ids
    return tokenizer


def child(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


CONVERT = """
import json, re, sys
from pathlib import Path
import gguf, torch, transformers.models.llama.modeling_llama
import transformers.modeling_gguf_pytorch_utils
from dlora.base.gguf import converted_base
def anonymous():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +(\\d+)", text)[1]) * 1024
path, cache_dir, dtype, lines, before = *sys.argv[1:], [], anonymous()
out = converted_base(Path(path), Path(cache_dir), getattr(torch, dtype), lines.append)
print(json.dumps([str(out), lines, anonymous() - before]))
"""


def test_the_faster_reader_reads_what_gguf_s_own_reads(tmp_path):
    file = gguf_files.tiny_llama(tmp_path / "base.gguf")
    ours, theirs = (read(file) for read in (GGUFReader, gguf.GGUFReader))
    assert list(ours.fields) == list(theirs.fields) and len(ours.tensors) == len(theirs.tensors) > 0
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types
        assert ours.fields[name].contents() == field.contents(), name
    for own, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert (own.name, own.tensor_type, own.data_offset) == their[:2] + their[5:6]
        assert own.data.shape == their.data.shape and own.data.dtype == their.data.dtype
        assert own.data.tobytes() == their.data.tobytes(), their.name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", [torch.bfloat16, full(torch.float32)])
def test_real_file(cache, dtype):
    real = gguf_files.real_file()
    name, megabytes = dtype_name(dtype), 134515008 * dtype.itemsize // 10**6
    out, (line,), left = json.loads(child(CONVERT, real, cache, name).communicate()[0])
    out = Path(out)
    assert left < 100 * 10**6  # of the model's memory, before the process reads its share
    assert line == (
        f"converting {real} to {name} under {out} ({megabytes} MB), once; this process needs "
        "memory for the whole model meanwhile"
    )
    with gguf_base._parsed_once():  # 15 seconds less; the values are not its concern
        model = assert_same_model(real, out, dtype)
        tokenizer = assert_same_tokenizer(real, out)
    stored = stored_tensors(out / "model.safetensors")
    assert "lm_head.weight" not in stored and model.config.tie_word_embeddings
    assert sum(tensor.nbytes for tensor in stored.values()) == 134515008 * dtype.itemsize
    config = model.config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2 and config.dtype == dtype
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert convert(real, cache, dtype) == (out, [])


TINY = {
    "llama": gguf_files.tiny_llama,
    "llama-untied": lambda path: gguf_files.tiny_llama(
        path, untied=True, tensors={"rope_freqs.weight": (8,)}
    ),
    "qwen3moe": gguf_files.tiny_qwen3moe,
    "bloom-tied": lambda path: gguf_files.tiny_bloom(path, "equal"),
    "bloom-untied": lambda path: gguf_files.tiny_bloom(path, "other"),
    "lfm2": gguf_files.tiny_lfm2,
    "qwen35moe": gguf_files.tiny_qwen35moe,
}


@pytest.mark.parametrize("kind", TINY)
def test_tiny_files(kind, tmp_path):
    """Every way in which a parameter is made."""
    gguf, dtype = TINY[kind](tmp_path / "tiny.gguf"), torch.bfloat16
    out, lines = convert(gguf, tmp_path / "cache", dtype)
    assert_same_model(gguf, out, dtype)
    tokenizer = assert_same_tokenizer(gguf, out)
    assert tokenizer.chat_template == gguf_files.CHAT_TEMPLATE
    stored = stored_tensors(out / "model.safetensors")
    assert ("lm_head.weight" in stored) == (kind in ("llama-untied", "bloom-untied", "qwen35moe"))
    skeleton = find_base(str(out), attn_implementation="eager").skeleton()
    assert {name for name, _ in skeleton.named_parameters()} == stored.keys()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    left = {"lfm2": "model.layers.0.extra.weight", "llama-untied": "rope_freqs.weight"}
    if kind == "qwen35moe":  # a block that predicts further tokens
        assert "no parameter for" in lines[1] and "eh_proj" in lines[1]
    else:
        extra = f"tiny.gguf: the model has no parameter for {left.get(kind)}; ignored"
        assert lines[1:] == ([extra] if kind in left else [])
    assert convert(gguf, tmp_path / "cache", dtype) == (out, [])


def test_files_beside_the_gguf_have_no_say(tmp_path):
    gguf = gguf_files.tiny_llama(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    out, _ = convert(gguf, tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == gguf_files.CHAT_TEMPLATE


def test_cache_key(tmp_path, monkeypatch):
    """By content: a moved copy is found again; another file, dtype or format is another one."""
    cache_dir = tmp_path / "cache"
    gguf = gguf_files.tiny_llama(tmp_path / "tiny.gguf")
    out, _ = convert(gguf, cache_dir)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(gguf, tmp_path / "elsewhere"))
    assert convert(moved, cache_dir) == (out, [])
    other, lines = convert(gguf_files.tiny_llama(moved, seed=1), cache_dir)
    assert other != out and lines and moved.stat().st_size == gguf.stat().st_size
    assert convert(gguf, cache_dir, torch.bfloat16)[0] not in (out, other)
    monkeypatch.setattr(gguf_cache, "CONVERSION", 0)
    assert convert(gguf, cache_dir)[0] != out

    monkeypatch.setattr(gguf_cache, "WHOLE_HASH_BYTES", 0)  # as if it were large
    monkeypatch.setattr(gguf_cache, "SAMPLE_BYTES", 64)
    keys = {gguf_cache.content_key(gguf, torch.float32)}
    os.utime(gguf, ns=(1, 1))
    keys.add(gguf_cache.content_key(gguf, torch.float32))
    for place in (20, gguf.stat().st_size - 1):
        with gguf.open("r+b") as file:
            file.seek(place)
            file.write(b"\xff\xff")
        os.utime(gguf, ns=(1, 1))
        keys.add(gguf_cache.content_key(gguf, torch.float32))
    assert len(keys) == 4


def test_damaged_cache_is_converted_again(tmp_path):
    gguf = gguf_files.tiny_llama(tmp_path / "tiny.gguf")
    out, _ = convert(gguf, tmp_path / "cache")
    shard = next(out.glob("*.safetensors"))
    for damage in (
        lambda: os.truncate(shard, 100),
        lambda: (out / "config.json").unlink(),
        lambda: (out / gguf_base.FILE_LIST).write_text("{"),
    ):
        damage()
        again, lines = convert(gguf, tmp_path / "cache")
        assert again == out and len(lines) == 1
        assert_same_model(gguf, out, torch.float32)


CHILD = """
import os, signal, sys, time
from pathlib import Path
import torch
from dlora.base import gguf as gguf_base
from dlora.base import gguf_cache
from dlora.base.model import find_base
from dlora.errors import dtype_name
from dlora.io.safetensors import stored_tensors
gguf, cache_dir, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
announce, save = print, gguf_base.save_torch_state_dict
if mode == "wait":                       # both children are there before either converts
    Path(f"{gguf}.{os.getpid()}.ready").touch()
    while len(list(gguf.parent.glob("*.ready"))) < 2:
        time.sleep(0.01)
    announce = lambda line: (print(line), time.sleep(1))
if mode == "die":                        # once the weights are written
    def save_and_die(*args, **options):
        save(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    gguf_base.save_torch_state_dict = save_and_die
print("path", gguf_base.converted_base(gguf, cache_dir, torch.float32, announce))
"""


@pytest.mark.timeout(600)
def test_two_processes_convert_once(tmp_path):
    gguf = gguf_files.tiny_llama(tmp_path / "tiny.gguf")
    children = [child(CHILD, gguf, tmp_path / "cache", "wait") for _ in range(2)]
    lines = [line for process in children for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in children] == [0, 0]
    paths = {line for line in lines if line.startswith("path")}
    assert len(paths) == 1 and len([line for line in lines if "converting" in line]) == 1


@pytest.mark.timeout(600)
def test_killed_midway(tmp_path):
    """Nothing is mistaken for a conversion, and the next one, of any file, cleans up."""
    gguf, cache_dir = gguf_files.tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "cache"
    process = child(CHILD, gguf, cache_dir, "die")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    assert left.suffix == ".tmp" and list(left.glob("*.safetensors"))
    alive = cache_dir / ".other-1234.56.tmp"
    alive.mkdir()
    with gguf_cache.lock_of(cache_dir / "other-1234"):
        convert(gguf_files.tiny_llama(tmp_path / "next.gguf", seed=1), cache_dir)
    assert not left.exists() and alive.exists()
    out, lines = convert(gguf, cache_dir)
    assert left.name.startswith(f".{out.name}.") and len(lines) == 1 and not alive.exists()
    assert_same_model(gguf, out, torch.float32)
