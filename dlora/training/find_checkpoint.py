"""Where a run starts from, found and judged before a weight is read.

output.resume ──find_start, on rank 0──> ResumePoint: step, settings, names and shapes; no tensors
Start         ──check_start, on all────> a line that names whatever makes this another run
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.remote import remote_of
from dlora.config.load import SCHEMA, Config
from dlora.config.strict_yaml import parse_yaml
from dlora.data import Sampler
from dlora.errors import UsageError
from dlora.io.files import read_object
from dlora.io.safetensors import stored_tensors
from dlora.lora.config import LoraConfig
from dlora.lora.variants import VARIANTS


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that verifies; plain values, so that rank 0 can tell the others.

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

    @property
    def lora(self) -> LoraConfig | None:
        """What was attached."""
        return saved_lora(self.state)


def saved_lora(state: Mapping[str, Any]) -> LoraConfig | None:
    """The resolved adapter settings in a `state.json`; None in one that was written without.

    Raises:
        UsageError: they are not what a run writes.
    """
    if "adapter" not in state:
        return None
    try:
        settings = dict(state["adapter"])
        return VARIANTS[settings.pop("method", "lora")].settings(**settings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"state.json: adapter is not what it was: {error}") from None


def find_start(config: Config, warn: Callable[[str], None]) -> ResumePoint | None:
    """The checkpoint that `output.resume` means, or None for a fresh start.

    Raises:
        UsageError: there is none at the path that it names, or that one is damaged.
    """
    wanted = config.output.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        root = output_directory(config) / "checkpoints"
        found = _newest(root, warn)
        if (remote := remote_of(config)) is not None:
            remote.fetch(root, found.step if found else 0, warn)
            found = _newest(root, warn)
        return found
    directory = Path(wanted).expanduser()
    if not directory.is_dir():
        raise UsageError(
            f"output.resume: there is no checkpoint {wanted} (auto, none, or the path of one)"
        )
    return _opened(directory)


def _newest(root: Path, warn: Callable[[str], None]) -> ResumePoint | None:
    """The newest checkpoint on the disk that can be gone on from."""
    found: list[ResumePoint] = []
    checkpoints.newest(root, warn, lambda directory: found.append(_opened(directory)))
    return found[0] if found else None


def _opened(directory: Path) -> ResumePoint:
    """A checkpoint that verifies and holds what a run writes.

    Raises:
        UsageError: it does not; the file is named.
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
    start = ResumePoint(str(directory), state, settings, shapes, record)
    for file, problem in _strange(start):
        raise UsageError(f"{directory / file}: {problem}, which no run writes")
    return start


def _strange(start: ResumePoint) -> Iterator[tuple[str, str]]:
    """(file, what is wrong in it) of a checkpoint whose files are whole; the first one counts."""
    state, settings = start.state, start.settings
    data = state["data"] if isinstance(state.get("data"), dict) else {}
    for key, value, types in (
        ("data.fingerprint", data.get("fingerprint"), str),
        ("data.sequences", data.get("sequences", 0), int),
        ("base", state.get("base"), str | None),
        ("ranks", state.get("ranks"), int | None),
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
            yield "config.yaml", f"{name or 'all of it'} is {options!r}"
    for name in ("engine", "base", "optimizer_state"):  # a resume takes them over
        option = SCHEMA[f"sharding.{name}"]
        value = sections.get("sharding", {}).get(name, option.default)
        if value not in get_args(option.type):
            yield "config.yaml", f"{option.key} is {value!r}"
    try:
        VARIANTS[lora.variant if lora else "lora"].check_record(start.record, start.shapes)
    except UsageError as error:
        yield "manifest.json", str(error)


def state_at(
    step: int,
    config: Config,
    lora: LoraConfig,
    sampler: Sampler,
    fingerprint: str,
    base: str | None,
) -> dict[str, Any]:
    """`state.json` after `step` optimizer steps; the other arguments are those of `check_start`."""
    return {
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
        "random": {"seed": config.train.seed, "keyed_by": ["seed", "step", "sequence"]},
    }


def output_directory(config: Config) -> Path:
    """`output.dir` as a path."""
    return Path(config.output.dir).expanduser()


def stop_file(config: Config) -> Path | None:
    """`output.stop_file` as a path."""
    wanted = config.output.stop_file
    return Path(wanted).expanduser() if wanted is not None else None
