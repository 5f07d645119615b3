"""The frozen base: where it is, its tokenizer, its skeleton, and this rank's share of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlora.base.gguf import converted_base
from dlora.base.loading import BaseWeights
from dlora.base.low_rank import factor_as_stored
from dlora.base.model_class import CAUSAL, ModelClass
from dlora.base.quantize import Quantized, quantize_as_set
from dlora.base.reader import StoredWeights
from dlora.base.skeleton import (
    AUTO,
    check_divides,
    pin_dtypes,
    untie,
    with_attention,
)
from dlora.base.source import BaseSource
from dlora.base.weight_files import are_local, check_files
from dlora.errors import UsageError
from dlora.runtime.memory import trim
from dlora.sharding.engines.protocol import Engine
from dlora.sharding.engines.storage import own_storage

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class BaseModel(BaseSource):
    """A base and how to load it; nothing is read until a method is called.

    Attributes:
        trust_remote_code: run the Python code that comes with the base.
        attn_implementation: as in transformers' `from_pretrained`; `"auto"`: as without it.
        quantization: how `load` packs the linear layers of the blocks; `"none"`: not at all.
        made_as: the class of the model.
    """

    trust_remote_code: bool = False
    attn_implementation: str = AUTO
    quantization: str = "none"
    made_as: ModelClass = CAUSAL

    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        config = self.reading(AutoConfig.from_pretrained)
        self.made_as.configure(config)
        return config

    def tokenizer(self) -> Any:
        """The model's tokenizer, padding on the right."""
        from transformers import AutoTokenizer

        tokenizer = self.reading(AutoTokenizer.from_pretrained)
        tokenizer.padding_side = "right"
        return tokenizer

    def skeleton(self) -> nn.Module:
        """The model on the meta device: names, shapes and dtypes without a byte of weights.

        Of weights that the configuration ties, those stay tied that are equal in the files, if the
        files are on this machine.

        Raises:
            UsageError: the configuration cannot be read, or the class does not support
                `attn_implementation`.
        """
        skeleton = with_attention(self._from_config, self.attn_implementation)
        pin_dtypes(skeleton, self.dtype)
        factor_as_stored(skeleton, self.config(), self.path)
        if skeleton.all_tied_weights_keys and are_local(self):
            with suppress(UsageError):  # `check_stored` says what is wrong with the files
                untie(skeleton, self.stored(skeleton).unequal_ties())
        return skeleton

    def stored(self, skeleton: Any) -> StoredWeights:
        """The weights in the files, for a skeleton without adapters."""
        return StoredWeights(self, skeleton, self.made_as.may_lack(skeleton))

    def _from_config(self, **attention: str) -> Any:
        config = self.config()
        auto = self.made_as.auto(config)
        with torch.device("meta"), naming_path(self.path):
            return auto.from_config(
                config, dtype=self.dtype, trust_remote_code=self.trust_remote_code, **attention
            )

    def pack(self, skeleton: nn.Module) -> Quantized | None:
        """Pack the weights of a skeleton, in place, as `load` packs those of the model.

        Returns:
            What was packed; None with `quantization` `"none"`.

        Raises:
            UsageError: no layer can be packed.
        """
        return quantize_as_set(skeleton, self.quantization)

    def load(self, engine: Engine, device: torch.device, left: Any = None) -> nn.Module:
        """Load this rank's share of the weights, packed or in `dtype`, frozen.

        Args:
            engine: decides which share that is.
            device: of the loaded weights.
            left: as for `StoredPackedWeights`.

        Raises:
            UsageError: on every rank, before a weight is read, if a rank would get none of a
                layer's experts.
        """
        weights = BaseWeights(self, left)
        check_divides(weights.skeleton, engine.placement)
        model = engine.load(weights, device)
        own_storage(model)
        trim()  # blocks that were read and cast are free, and the heap would keep them
        return model.requires_grad_(False)

    def check_stored(self, skeleton: Any) -> list[str]:
        """Check by the headers of the base's files that they are whole and fit the configuration.

        Nothing is downloaded for this. transformers checks a base that is quantized in its files.

        Args:
            skeleton: the model on the meta device, without adapters.

        Returns:
            The parameters that the files may lack, and do.

        Raises:
            UsageError: there are no weights, they are damaged or another model's, or the files are
                quantized and `quantization` is set as well.
        """
        lacking: list[str] = []
        if getattr(skeleton.config, "quantization_config", None) is not None:
            if self.quantization != "none":
                raise UsageError(
                    f"model.quantization: {self.quantization} needs a floating-point base, but "
                    f"{self.path} is already quantized; set model.quantization: none"
                )
        elif are_local(self):
            lacking = self.stored(skeleton).lacking
        if are_local(self):
            check_files(self)
        return lacking

    def reading(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        """Call a `from_pretrained` on the source."""
        with naming_path(self.path):
            return read(
                self.source,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                **kwargs,
            )


@contextmanager
def naming_path(path: str) -> Iterator[None]:
    """Inside, an error of transformers becomes one line that names `model.path`."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UsageError(f"model.path: cannot read {path}: {first}") from error


def find_base(
    path: str,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str = "~/.cache/dlora",
    attn_implementation: str = AUTO,
    quantization: str = "none",
    made_as: ModelClass = CAUSAL,
    announce: Callable[[str], None] = print,
) -> BaseModel:
    """Find a base by a hub id, a local directory or a `.gguf` file.

    Args:
        path: as the user wrote it.
        dtype: a key of `DTYPES`.
        cache_dir: where a `.gguf` file is converted to, once.
        announce: gets a line when a file is converted.

    Raises:
        UsageError: `path` looks like a local path and does not exist, or a `.gguf` file cannot be
            converted. The network is not used.
    """
    quiet_libraries()
    local = Path(path).expanduser()
    source = str(local)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UsageError(f"model.path: file {path} does not exist")
        source = str(converted_base(local, Path(cache_dir).expanduser(), DTYPES[dtype], announce))
    elif local.is_dir():
        if not (local / "config.json").is_file():
            raise UsageError(
                f"model.path: {path} contains no config.json, so it is not a model directory"
            )
    elif _looks_local(path):
        raise UsageError(f"model.path: directory {path} does not exist")
    else:
        source = path
    settings = (revision, trust_remote_code, attn_implementation, quantization, made_as)
    return BaseModel(path, source, DTYPES[dtype], *settings)


def quiet_libraries() -> None:
    """Silence the progress bars, advice and warnings of libraries; their errors remain."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("torch.distributed", "huggingface_hub"):  # of the latter, each retry
        logging.getLogger(library).setLevel(logging.ERROR)


def _looks_local(path: str) -> bool:
    """Hub ids are `name` or `owner/name`; a path has another shape, or its parent is here."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        return True
    return "/" in path and Path(path).parent.is_dir()
