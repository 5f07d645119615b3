"""The checkpoint that a run resumes, found and verified before a weight is read.

output.resume ──find_checkpoint, rank 0──> ResumePoint: step, settings, names, shapes; no tensors
ResumePoint   ──check_resume, all ranks──> a line that names what makes this another run
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.listing import newest
from dlora.checkpoint.remote import remote_of
from dlora.checkpoint.state import saved_lora
from dlora.checkpoint.written_by import names_in, own_settings, own_state
from dlora.config.load import SCHEMA, Config
from dlora.config.options import show
from dlora.config.strict_yaml import parse_yaml
from dlora.data import Sampler
from dlora.data.stream import StreamSampler
from dlora.errors import UsageError
from dlora.io.files import read_object
from dlora.io.safetensors import stored_tensors
from dlora.lora.config import LoraConfig
from dlora.lora.dropout import KEYED_BY
from dlora.lora.layers import CHILD, NAMED
from dlora.lora.variants import VARIANTS


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that verifies; plain values, so that rank 0 can broadcast it.

    Attributes:
        state: its `state.json`.
        settings: its `config.yaml`.
        shapes: of the adapters' tensors, by name.
        record: what its method recorded beside tensors.
    """

    directory: str
    state: dict[str, Any]
    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    record: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps that have been made."""
        return int(self.state["step"])

    def lies_in(self, root: Path) -> bool:
        """Whether it is one of the checkpoints in a directory."""
        return Path(self.directory).resolve().parent == root.resolve()

    def has_masks_of(self, keys: Sequence[str]) -> bool:
        """Whether its run's dropout masks depend on these keys."""
        random = self.state.get("random")
        return isinstance(random, dict) and random.get("keyed_by") == list(keys)

    def tokens_per_micro_batch(self, world: int) -> int | None:
        """What `auto` was in its run; None for another number of ranks."""
        found = self.settings.get("train", {}).get("tokens_per_micro_batch")
        same = self.state.get("ranks") in (None, world)
        return found if isinstance(found, int) and same else None

    @property
    def names(self) -> list[str]:
        """Of the adapters that its run trained together; none where it trained one."""
        return names_in(self.state)

    def of(self, name: str) -> ResumePoint:
        """One of several adapters, as the checkpoint of its run alone would have it."""
        settings, state = own_settings(self.settings, name), own_state(self.state, name)
        own = f".{NAMED}.{name}."
        shapes = {
            path.replace(own, f".{CHILD}."): shape
            for path, shape in self.shapes.items()
            if own in path
        }
        record = self.record.get(name) if isinstance(self.record, dict) else None
        return replace(self, state=state, settings=settings, shapes=shapes, record=record)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter settings of the checkpoint; None if it has none."""
        return saved_lora(self.state)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def find_checkpoint(
    config: Config, announce: Callable[[str], None], *, fetch: bool = True
) -> ResumePoint | None:
    """The checkpoint that `output.resume` means, or None for a fresh start.

    Args:
        fetch: download a newer one from `output.remote` first; the caller has the run's lock.

    Raises:
        UsageError: there is none at the path that it names, or that one is damaged.
    """
    wanted = config.output.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        root = config.output.directory / "checkpoints"
        found = _newest(root, announce)
        if (remote := remote_of(config)) is not None:
            if not fetch:
                announce(
                    f"output.remote: --check does not read {remote.url}; the run resumes from the "
                    "newest checkpoint there or on the disk"
                )
                return found
            remote.fetch(root, found.step if found else 0, announce)
            found = _newest(root, announce)
        return found
    directory = Path(wanted).expanduser()
    if not directory.is_dir():
        raise UsageError(
            f"output.resume: checkpoint {wanted} does not exist (auto, none, or a path)"
        )
    return _opened(directory)


def _newest(root: Path, announce: Callable[[str], None]) -> ResumePoint | None:
    """The newest checkpoint on the disk from which a run can resume."""
    found: list[ResumePoint] = []
    newest(root, announce, lambda directory: found.append(_opened(directory)))
    return found[0] if found else None


def _opened(directory: Path) -> ResumePoint:
    """Open a checkpoint, and check that it verifies and contains what a run writes.

    Raises:
        UsageError: it does not; the message names the file.
    """
    files = checkpoints.verify(directory)
    tensors = {n: stored_tensors(directory / n) for n in files if n.endswith(".safetensors")}
    stored = tensors["adapter.safetensors"]
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    path = directory / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    settings, _ = parse_yaml(text, str(path))
    state = read_object(directory / "state.json")
    record = checkpoints.method_record(directory)
    resumed = ResumePoint(str(directory), state, settings, shapes, record)
    own = [resumed.of(name) for name in resumed.names] or [resumed]
    for file, problem in (found for one in own for found in _strange(one)):
        raise UsageError(f"{directory / file}: {problem}, which a run never writes")
    return resumed


def _strange(resumed: ResumePoint) -> Iterator[tuple[str, str]]:
    """(file, what is wrong in it) of a checkpoint whose files are whole; the first one counts."""
    state, settings = resumed.state, resumed.settings
    data = state["data"] if isinstance(state.get("data"), dict) else {}
    for key, value, types in (
        ("data.fingerprint", data.get("fingerprint"), str),
        ("data.sequences", data.get("sequences", 0), int),
        ("base", state.get("base"), str | None),
        ("ranks", state.get("ranks"), int | None),
        *_of_forgetting(state.get("forget")),
    ):
        if not isinstance(value, types):
            yield "state.json", f"{key} is {value!r}"
    lora = None
    try:
        lora = saved_lora(state)
    except UsageError as error:
        yield "state.json", str(error).removeprefix("state.json: ")
    sections = settings if isinstance(settings, dict) else {"": settings}
    for name, options in sections.items():
        if not isinstance(options, dict):
            yield "config.yaml", f"{name or 'the whole file'} is {show(options)}"
    for name in ("engine", "base", "optimizer_state"):  # a resume takes them over
        option = SCHEMA[f"sharding.{name}"]
        value = sections.get("sharding", {}).get(name, option.default)
        if value not in get_args(option.type):
            yield "config.yaml", f"{option.key} is {value!r}"
    try:
        VARIANTS[lora.variant if lora else "lora"].check_record(resumed.record, resumed.shapes)
    except UsageError as error:
        yield "manifest.json", str(error)


def _of_forgetting(found: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, type) of what `training.forgetting` has decided."""
    yield "forget", found, dict | None
    if isinstance(found, dict):
        for name, kind in (("step", int | None), ("passed", int | None), ("ended", dict | None)):
            yield f"forget.{name}", found.get(name), kind
        yield "forget.scale", found.get("scale"), float | None
        if isinstance(ended := found.get("ended"), dict):
            yield "forget.ended.line", ended.get("line"), str
            yield "forget.ended.step", ended.get("step"), int
            yield "forget.ended.back", ended.get("back", 0), int


def state_at(
    step: int,
    config: Config,
    lora: LoraConfig,
    sampler: Sampler | StreamSampler,
    fingerprint: str,
    base: str | None,
    labels: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> dict[str, Any]:
    """`state.json` after `step` optimizer steps; other arguments as for `check_resume`.

    Args:
        labels: of a classification, in order.
        ends: tokens that end an answer of the data.
    """
    named: dict[str, Any] = {"labels": list(labels)} if labels else {}
    if ends:
        named["ends"] = list(ends)
    return named | {
        "step": step,
        "total_steps": sampler.total_steps,
        "schedule": {"name": config.optimizer.schedule, "next_step": step},
        "adapter": {"method": lora.method, **asdict(lora)},
        "base": base,
        "data": {
            "cursor": step,
            "sequences": sampler.sequences(step),
            "fingerprint": fingerprint,
        },
        "random": {"seed": config.train.seed, "keyed_by": list(KEYED_BY)},
    }
