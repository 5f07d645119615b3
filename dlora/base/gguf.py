"""A `.gguf` file becomes an ordinary Hugging Face model directory, once.

transformers reads parts of safetensors files, but a GGUF file only whole, and training needs parts:
no rank may have the whole base. So one process converts the file, and the other ranks wait for it:

    model.gguf --lock--> .NAME-KEY.PID.tmp/  config, tokenizer, weights, list of the files
                           --fsync, rename--> NAME-KEY/ --> every rank reads its part

That process has the whole model in memory meanwhile. KEY is a hash of the file's content, the dtype
and the versions of the libraries that convert. A directory without the ending `.tmp` is complete,
because it gets its name last.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from huggingface_hub import save_torch_state_dict

from dlora.base.gguf_cache import content_key, is_whole, lock_of, remove_leftovers, sizes_in
from dlora.base.gguf_reader import GGUFReader
from dlora.base.weight_files import FILE_LIST, check_loaded
from dlora.errors import UsageError, and_more, dtype_name
from dlora.io.files import new_directory
from dlora.runtime.memory import trim

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def converted_base(
    path: Path, cache_dir: Path, dtype: torch.dtype, announce: Callable[[str], None]
) -> Path:
    """Convert a GGUF file, unless its conversion exists.

    Any number of processes may call this at once: one converts, the others wait.

    Args:
        path: the `.gguf` file.
        cache_dir: where conversions are stored; made if need be.
        dtype: of the converted weights.
        announce: gets a line when something is written.

    Returns:
        The Hugging Face model directory.

    Raises:
        UsageError: the file cannot be converted, or the directory not be written.
    """
    path, cache_dir = path.expanduser().absolute(), cache_dir.expanduser().absolute()
    key = content_key(path, dtype)
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.stem)
    target = cache_dir / f"{stem[:80]}-{key[:20]}"
    if is_whole(target):  # before any lock: a cache may be shared and read-only
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(cache_dir)
        with lock_of(target):
            if not is_whole(target):
                shutil.rmtree(target, ignore_errors=True)
                with new_directory(target) as folder:
                    _convert(path, folder, target, dtype, announce)
                    if content_key(path, dtype) != key:
                        raise UsageError(f"model.path: {path} changed while it was being converted")
    except OSError as error:
        raise UsageError(
            f"model.cache_dir: cannot write the converted base under {cache_dir}: {error}"
        ) from error
    finally:
        gc.collect()
        trim()
    return target


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a `.gguf` file, without a conversion and without its weights.

    Raises:
        UsageError: the file is damaged, or transformers does not know its tokenizer.
    """
    from transformers import AutoTokenizer

    place: dict[str, Any] = {"gguf_file": str(path.expanduser().absolute())}
    with (
        tempfile.TemporaryDirectory() as folder,  # so that no file beside `path` matters
        _reading(path),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **place)


def gguf_skeleton(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file on the meta device, by the file's header.

    Raises:
        UsageError: the header cannot be read, or transformers has no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.gguf import read_gguf_metadata

    with _reading(path):
        metadata, _ = read_gguf_metadata(str(path))
        if (parts := metadata.get("split.count", 1)) > 1:
            raise UsageError(
                f"model.path: {path} is one of {parts} parts; join them with "
                "llama-gguf-split --merge"
            )
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _convert(
    path: Path, folder: Path, target: Path, dtype: torch.dtype, announce: Callable[[str], None]
) -> None:
    """Write the model into `folder`, which is empty, so that no file beside `path` matters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": str(path), "local_files_only": True}
    with _parsed_once():
        skeleton = gguf_skeleton(path, dtype)
        with _reading(path):
            unplaced = _unplaced(path, skeleton)
        nbytes = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise UsageError(
                f"model.cache_dir: {target.parent} has {free / 1e6:.0f} MB free, and the base of "
                f"{path.name} in {dtype_name(dtype)} needs {nbytes / 1e6:.0f} MB"
            )
        announce(
            f"converting {path} to {dtype_name(dtype)} under {target} ({nbytes / 1e6:.0f} MB), "
            "once; this process needs memory for the whole model meanwhile"
        )
        with _reading(path), contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            tokenizer = AutoTokenizer.from_pretrained(folder, **place)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                **place,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    model, found = loaded
    check_loaded(str(path), found)
    if unused := sorted({*found["unexpected_keys"], *unplaced}):
        announce(f"{path.name}: the model has no parameter for {and_more(unused, 3)}; ignored")
    _make_plain(model, skeleton, tokenizer)
    try:
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        # The model's own `save_pretrained` would import deepspeed where it is installed.
        save_torch_state_dict(
            model.state_dict(), folder, shared_tensors_to_discard=list(model.all_tied_weights_keys)
        )
    except Exception as error:  # each library has its own exceptions for a full disk
        raise OSError(error) from error
    for file in folder.glob("*.safetensors"):  # safetensors made them for this user only
        shutil.copymode(folder / "config.json", file)
    (folder / FILE_LIST).write_text(json.dumps(sizes_in(folder), indent=2))


def _unplaced(path: Path, skeleton: Any) -> list[str]:
    """Tensors of the file that transformers would leave out without a word.

    Raises:
        UsageError: parts of one parameter have different types, of which transformers reads one.
    """
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = gguf.GGUFReader(str(path))
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in GGUF_ARCHS:  # read by name; the newer reader lists the others itself
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=skeleton.config)
        places = get_gguf_hf_weights_map(skeleton, processor)
        return [name for name in types if not {name, name.rpartition(".")[0]} & places.keys()]
    for gate in (name for name in types if name.endswith("ffn_gate_exps.weight")):
        up = gate.replace("ffn_gate", "ffn_up")
        if types.get(up, types[gate]) != types[gate]:
            raise UsageError(
                f"model.path: {path}: {gate} ({types[gate].name}) and {up} ({types[up].name}) are "
                "parts of one parameter, but have different types; quantize both alike"
            )
    layers = skeleton.config.get_text_config().num_hidden_layers  # later blocks predict more tokens
    blocks = {name: name.split(".")[1] for name in types if name.startswith("blk.")}
    return [name for name, block in blocks.items() if int(block) >= layers]


def _make_plain(model: Any, skeleton: Any, tokenizer: Any) -> None:
    """Remove the marks of quantization, and of how and where the model was read."""
    model.config.architectures = [type(model).__name__]
    for attribute in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(attribute, None)
    for argument in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(argument, None)
    for name, twin in skeleton.all_tied_weights_keys.items():
        if model.get_parameter(name) is not model.get_parameter(twin):  # the file has both
            model.config.tie_word_embeddings = False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, any exception means that the file is at fault: the parsers raise all kinds.

    What transformers parses with gguf's reader is parsed by the faster one.
    """
    reader = gguf.GGUFReader
    if reader is GGUFReader.__base__:
        gguf.GGUFReader = GGUFReader  # type: ignore[misc]
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"model.path: {path} is truncated or damaged, or transformers cannot convert it: "
            f"{str(error).strip() or type(error).__name__}"
        ) from error
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once and a name table built once.

    transformers parses the file once for the configuration, the tokenizer and the weights each, and
    builds the name table in every submodule: two thirds of the time that a small model takes.
    """
    reader, name_table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(GGUFReader)  # type: ignore[assignment, misc]
    gguf.get_tensor_name_map = functools.cache(name_table)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_table  # type: ignore[misc]
