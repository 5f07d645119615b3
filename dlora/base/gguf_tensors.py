"""What a GGUF file holds, as a transformers model without weights and its tensors one at a time.

Names and layouts of GGUF tensors are transformers' knowledge, in two generations: "native"
conversion mappings (`integrations/gguf`), and the tensor processors of the older loader
(`modeling_gguf_pytorch_utils`, with `gguf`), which covers most architectures. Both are driven here
parameter by parameter, so that the values are those of `from_pretrained(..., gguf_file=...)`.
"""

import functools
import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.gguf import reader as native_reader
from transformers.integrations.gguf import utils as native
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dlora.errors import UsageError

CHUNK_VALUES = 1 << 18  # values that the older path dequantizes at a time


@dataclass
class GgufSource:
    """An open GGUF file."""

    path: Path
    architecture: str
    settings: dict[str, Any]  # the configuration as the file states it
    model: PreTrainedModel  # on the meta device
    reader: Any  # the `gguf.GGUFReader` of the older path, else None
    unused: list[str] = field(default_factory=list)  # filled by `tensors`: what the model lacks

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, once, under the model's name for it; raises if some are missing.

        Memory: one parameter, float32 and in `dtype`; where several GGUF tensors make one (stacked
        experts), about twice that.
        """
        expected = self.model.state_dict()
        done = set()
        steps = _native if self.reader is None else _legacy
        try:
            for name, tensor in steps(self, dtype):
                if name not in expected or tensor.shape != expected[name].shape:
                    raise UsageError(
                        f"model.path: {self.path}: {name} of shape {tuple(tensor.shape)} has no "
                        f"place in {type(self.model).__name__} with the file's configuration"
                    )
                done.add(name)
                yield name, tensor
                del tensor
        except (KeyError, IndexError, ValueError) as error:  # the file contradicts itself
            if isinstance(error, UsageError):
                raise
            message = f"model.path: {self.path}: its tensors cannot be converted: {error}"
            raise UsageError(message) from error
        tied = self.model.all_tied_weights_keys
        missing = [
            name
            for name, _ in self.model.named_parameters()
            if name not in done and tied.get(name) not in done
        ]
        if missing:
            raise UsageError(f"model.path: {self.path} gives no value for {some(missing)}")


def open_gguf(path: Path, folder: Path, dtype: torch.dtype) -> GgufSource:
    """Reads all of the file but its tensors; leaves the tokenizer in `folder`, which is empty
    before.

    transformers joins a directory and `gguf_file`, which leaves an absolute path as it is. So an
    empty directory keeps tokenizer files that lie beside the GGUF file from having a say.
    """
    place = {"gguf_file": str(path), "local_files_only": True}
    with _parsed_once():
        architecture, reader = _checked(path)
        try:
            settings, _ = PreTrainedConfig.get_config_dict(str(folder), **place)
            settings.pop("_model_name_or_path", None)  # is the file's title here, not a path
            config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # whatever a senseless configuration leads to
            raise UsageError(
                f"model.path: {path} has the architecture {architecture}, and transformers makes "
                f"no causal language model of it ({error}); it can of {', '.join(_architectures())}"
            ) from error
        model.config.architectures = [type(model).__name__]
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **place)
        except Exception as error:
            raise UsageError(f"model.path: {path} has no usable tokenizer ({error})") from error
    for argument in ("is_local", "local_files_only"):  # how it was read, not what it is
        tokenizer.init_kwargs.pop(argument, None)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # its own library has no other for a full disk
        raise OSError(error) from error
    if reader:
        reader.fields.clear()  # the vocabulary, in an array per word
    return GgufSource(path, architecture, settings, model, reader)


class _PlainReader(gguf.GGUFReader):
    """Keeps a field's parts, two per vocabulary entry, as views of a plain array.

    Views of a `memmap`, which it keeps otherwise, take four times as long to make.
    """

    @property
    def data(self) -> Any:
        return self.mapped.view(np.ndarray)

    @data.setter
    def data(self, mapped: Any) -> None:
        self.mapped: np.memmap = mapped


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once and a name table built once.

    transformers asks `gguf` for the parsed file once for the configuration and once more for the
    tokenizer, and for the same name table in every submodule: four fifths of the time that
    converting a small model takes.
    """
    parse, name_table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = functools.cache(_PlainReader)  # type: ignore[assignment, misc]
    gguf.get_tensor_name_map = functools.cache(name_table)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = parse, name_table  # type: ignore[misc]


def some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _checked(path: Path) -> tuple[str, Any]:
    """`general.architecture` and the older path's reader, if all tensors are there and readable."""
    reader = None
    try:
        metadata, _ = native_reader.read_gguf_metadata(str(path))
        architecture, parts = metadata["general.architecture"], metadata.get("split.count", 1)
        if parts == 1 and native.is_gguf_arch_supported(architecture):
            header = native_reader.GgufHeader.from_file(str(path))
            end = max((info.offset + info.nbytes for info in header.tensors), default=0)
            if header.data_start + end > path.stat().st_size:
                raise ValueError("its tensors reach past the end of the file")
        elif parts == 1:
            reader = gguf.GGUFReader(str(path))
            for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
                gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    # NotImplementedError from `dequantize`; the parsers meet damage with any exception at all
    except Exception as error:
        raise UsageError(
            f"model.path: {path} is truncated or damaged, or holds what cannot be read: {error}"
        ) from error
    if parts > 1:
        raise UsageError(
            f"model.path: {path} is one of {parts} parts; join them with llama-gguf-split --merge"
        )
    return architecture, reader


def _architectures() -> list[str]:
    """What `open_gguf` takes, by the names that transformers has for them."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    legacy = set(GGUF_SUPPORTED_ARCHITECTURES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return sorted(legacy | set(GGUF_ARCHS))


def _native(source: GgufSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The loop of `convert_and_load_state_dict_in_model`, with the parameters handed out."""
    model, expected = source.model, source.model.state_dict()
    header = native_reader.GgufHeader.from_file(str(source.path))
    mapping = native.get_gguf_conversion_mapping(header.architecture, model.config)
    blocks, _, _ = native.get_gguf_plan(header, mapping)
    mapping = native.add_gguf_load_ops(mapping, blocks, header, dtype)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern: dict[str, Any] = {
        pattern: entry for entry in converters for pattern in entry.source_patterns
    }

    stored = native_reader.load_gguf_state_dict(header)
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)  # parameter: (tensor, pattern)
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, expected
        )
        if parameter in expected and pattern is not None:
            groups[parameter].append((name, pattern))
        else:
            source.unused.append(name)
    for parameter, parts in groups.items():
        converter = by_pattern[parts[0][1]]
        if len({stored[name].ggml_type for name, _ in parts}) > 1:  # only one is looked up
            raise ValueError(f"{some([name for name, _ in parts])} are of different types")
        for name, pattern in parts:
            converter.add_tensor(parameter, name, pattern, lambda name=name: stored[name][...])
        values = converter.convert(parameter, model=model, config=model.config)
        for name, _ in parts:
            _unmap(stored[name].data)
        while values:
            name, value = values.popitem()
            yield name, value[0] if isinstance(value, list) else value
            del value


def _legacy(source: GgufSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The loop of `load_gguf_checkpoint`, tensors that share a parameter in a row."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(source.architecture, TensorProcessor)(config=source.settings)
    with _parsed_once():
        names = get_gguf_hf_weights_map(source.model, processor)
    groups: dict[str, list[Any]] = defaultdict(list)
    for tensor in source.reader.tensors:  # stacked experts are mapped by a name without `.weight`
        key = tensor.name if tensor.name in names else tensor.name.rpartition(".")[0]
        groups[names.get(key, tensor.name)].append(tensor)
    twin = _tied_twin(source, groups)
    for tensors in groups.values():
        staged: dict[str, torch.Tensor] = {}  # processors of stacked experts write in here
        for tensor in tensors:
            result = processor.process(
                weights=_dequantized(tensor),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": staged},
            )
            if result.name in names:
                staged[names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
            del result
            _unmap(source.reader.mapped)
        if not staged:
            source.unused.extend(tensor.name for tensor in tensors)
        while staged:
            name, value = staged.popitem()
            value = value.to(dtype)
            if name != twin:
                yield name, value
            del value


def _tied_twin(source: GgufSource, groups: dict[str, list[Any]]) -> str | None:
    """The parameter to leave out because the file repeats in it what it is tied to.

    Falcon and Bloom files may hold the output layer of a tied model once more, possibly in another
    type. Like transformers, which ties only what is equal, this makes an untied model of the
    latter.
    """
    for parameter, tied_to in source.model.all_tied_weights_keys.items():
        if parameter in groups and tied_to in groups:
            ours, theirs = groups[parameter][0], groups[tied_to][0]
            if ours.tensor_type == theirs.tensor_type and np.array_equal(ours.data, theirs.data):
                return parameter
            source.model.config.tie_word_embeddings = False
    return None


def _dequantized(tensor: Any) -> np.ndarray:
    """A `ReaderTensor` as float32; in slices, as `dequantize` needs its result's size twice."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    values = np.empty(tuple(int(n) for n in reversed(tensor.shape)), np.float32)
    flat = values.reshape(len(rows), -1)
    step = max(1, CHUNK_VALUES // flat.shape[1])
    for start in range(0, len(rows), step):
        flat[start : start + step] = gguf.dequantize(rows[start : start + step], tensor.tensor_type)
    return values


def _unmap(data: Any) -> None:
    """Lets go of a mapped file's pages, which count as private memory while it has them."""
    data._mmap.madvise(mmap.MADV_DONTNEED)
