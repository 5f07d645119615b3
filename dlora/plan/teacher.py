"""The teacher of a distillation before a weight is read: what it is, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.mixture import has_mixture
from dlora.adapters.peft_config import read_config
from dlora.adapters.write import digest_of
from dlora.base.identity import identity
from dlora.base.model import BaseModel, find_base
from dlora.base.skeleton import check_divides
from dlora.config.load import SCHEMA, Config, value_of
from dlora.errors import UsageError
from dlora.lora.attach import attach, trainable_parameters
from dlora.objectives.distill import BASE, Distill
from dlora.objectives.output_head import output_head
from dlora.plan.taught import MANIFEST, Taught
from dlora.sharding.topology import Placement

_KEY = "distill.teacher"


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher.

    Attributes:
        base: None: that of the run.
        skeleton: of `base`, as it is loaded, without the adapter.
        adapter: the directory of its adapter, or None.
        adapted: its base, with that adapter.
        identity: equal for the same weights, as far as that is known.
        taught: its files, where it is no model.
    """

    base: BaseModel | None
    skeleton: nn.Module | None
    adapter: Path | None
    adapted: nn.Module | None
    identity: str
    taught: Taught | None = None

    @property
    def adapter_bytes(self) -> int:
        """Of A and B, which every rank has."""
        if self.adapted is None:
            return 0
        return sum(
            p.numel() * p.element_size() for p in trainable_parameters(self.adapted).values()
        )

    def check_divides(self, placement: Placement) -> None:
        """Raise a `UsageError` for a placement that its base does not allow."""
        if self.skeleton is not None:
            with named():
                check_divides(self.skeleton, placement)

    def check_data(self, fingerprint: str) -> None:
        """Check that its files, if it has such, are of the data set with a fingerprint."""
        if self.taught is not None and self.taught.about.data != fingerprint:
            raise UsageError(
                f"{_KEY}: {self.taught.directory} is of other sequences than data.train has; write "
                "it again (dlora teach)"
            )

    def check(self, tokenizer: Any) -> None:
        """Check that the teacher has the vocabulary of a model, whose tokenizer this is.

        Raises:
            UsageError: it has another one.
        """
        if self.base is None:
            return
        with named():
            theirs = self.base.tokenizer().get_vocab()
        if (ours := tokenizer.get_vocab()) == theirs:
            return
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        there, here = (found.get(token, "missing") for found in (theirs, ours))
        raise UsageError(
            f"{_KEY}: {self.base.path} has another vocabulary than model.path: the token {token!r} "
            f"is {there} there, and {here} here"
        )


@contextmanager
def named() -> Iterator[None]:
    """Inside, errors about a base name the teacher."""
    try:
        yield
    except UsageError as error:
        said = str(error).removeprefix("model.path: ")
        said = said.replace("model.quantization", "distill.teacher_quantization")
        raise UsageError(f"{_KEY}: {said}") from error


def find_teacher(
    config: Config,
    base: BaseModel | None,
    skeleton: nn.Module,
    announce: Callable[[str], None] = lambda line: None,
) -> FoundTeacher | None:
    """The teacher of a run; None: its objective has none.

    Args:
        base: of the run, where it is known, and `skeleton` its model.

    Raises:
        UsageError: it cannot be the teacher of this model.
    """
    if config.train.objective != Distill.name:
        return None
    section: Any = getattr(config, Distill.name)
    if output_head(skeleton).finish is None:
        raise UsageError(
            f"train.objective: distill needs logits row by row, and how {type(skeleton).__name__} "
            "computes them is not known"
        )
    local = Path(section.teacher).expanduser()
    if section.teacher != BASE and (local / MANIFEST).is_file():
        taught = _taught(config, skeleton, local)
        return FoundTeacher(None, None, None, None, taught.identity, taught)
    own = None if section.teacher == BASE else _other_base(config, skeleton, announce)
    directory = adapted = None
    if section.teacher_adapter is not None:
        theirs = own[0] if own else base or _found(config.model.path, config)
        directory = adapter_directory(section.teacher_adapter, "distill.teacher_adapter")
        adapted = _adapted(theirs, directory)
    known = own and identity(*own)
    weights = "" if directory is None else digest_of(directory)
    other, own_skeleton = own or (None, None)
    return FoundTeacher(other, own_skeleton, directory, adapted, f"{known or ''} {weights}")


def _taught(config: Config, skeleton: nn.Module, directory: Path) -> Taught:
    section: Any = getattr(config, Distill.name)
    found, said = Taught.open(directory), f"{_KEY}: {directory}"
    for key in ("teacher_adapter", "teacher_quantization"):
        if value_of(config, f"{Distill.name}.{key}") != SCHEMA[f"{Distill.name}.{key}"].default:
            raise UsageError(f"distill.{key}: cannot act: {directory} has what a teacher found")
    if config.data.streaming:
        raise UsageError(f"{said} is of a data set in memory; set data.streaming: false")
    about = found.about
    if about.temperature != section.temperature:
        raise UsageError(
            f"distill.temperature: {section.temperature:g}, but {directory} was made at "
            f"{about.temperature:g}"
        )
    if section.top_k is not None and section.top_k > about.top_k:
        raise UsageError(
            f"distill.top_k: {section.top_k}, but {directory} has {about.top_k} tokens of each "
            "target"
        )
    _check_vocabulary(str(directory), about.vocabulary, skeleton)
    return found


def _check_vocabulary(teacher: str, size: int, skeleton: nn.Module) -> None:
    if size != (ours := output_head(skeleton).vocabulary):
        raise UsageError(f"{_KEY}: {teacher} has logits of {size} tokens, and model.path of {ours}")


def _other_base(
    config: Config, skeleton: nn.Module, announce: Callable[[str], None]
) -> tuple[BaseModel, nn.Module]:
    section: Any = getattr(config, Distill.name)
    if config.sharding.engine == "zero3":
        raise UsageError(
            f"{_KEY}: {section.teacher} is another base, and sharding.engine: zero3 follows the "
            f"modules of one model; use fsdp2, or {_KEY}: base"
        )
    with named():
        base = _found(
            section.teacher, config, quantization=section.teacher_quantization, announce=announce
        )
        found = base.skeleton().requires_grad_(False)
        base.check_stored(found)
        packed = base.pack(found)
        head = output_head(found)
    if packed is not None:
        announce(f"distill.teacher_quantization: {packed}")
    if head.finish is None:
        raise UsageError(
            f"{_KEY}: how {type(found).__name__} computes its logits is not known row by row"
        )
    _check_vocabulary(section.teacher, head.vocabulary, skeleton)
    return base, found


def _found(path: str, config: Config, **how: Any) -> BaseModel:
    """A base that is loaded like that of the run."""
    section = config.model
    about: dict[str, Any] = {"dtype": section.dtype, "cache_dir": section.cache_dir}
    return find_base(path, **about, attn_implementation=section.attn_implementation, **how)


def _adapted(base: BaseModel, directory: Path) -> nn.Module:
    """The base on the meta device with the adapter in a directory."""
    if has_mixture(directory):
        raise UsageError(
            f"distill.teacher_adapter: {directory} is a mixture of experts; a teacher takes a LoRA"
        )
    settings, skeleton = read_config(directory), base.skeleton()
    base.pack(skeleton)
    try:
        attach(skeleton, settings)
    except UsageError as error:
        raise UsageError(f"distill.teacher_adapter: {directory}: {error}") from None
    return skeleton
