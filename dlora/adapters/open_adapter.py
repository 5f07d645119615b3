"""Opening an adapter: PEFT's directory, a mixture's or a checkpoint, whichever a directory is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlora.adapters.hub import adapter_directory
from dlora.adapters.mixture import has_mixture, mixture_of, places_in
from dlora.adapters.mixture_source import MixtureSource
from dlora.adapters.recorded import Answering, BaseReference, as_ends, ends_in, template_in
from dlora.adapters.save_load import read_config
from dlora.adapters.settings import lora_config
from dlora.adapters.source import AdapterSource
from dlora.adapters.write import CONFIG, ROUTER, WEIGHTS
from dlora.checkpoint import format as checkpoint
from dlora.checkpoint.state import saved_lora, scaled
from dlora.checkpoint.written_by import written_by
from dlora.config.load import load
from dlora.config.members import ADAPTERS
from dlora.errors import UsageError, and_more
from dlora.io.files import inside, read_object
from dlora.io.safetensors import stored_tensors
from dlora.lora.variants import VARIANTS

_PEFT_TASKS = {"classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}  # of `train.task`


def open_adapter(directory: str | Path, option: str = "--adapter") -> AdapterSource:
    """Read the settings of an adapter directory or a checkpoint.

    Args:
        option: that named the directory, for errors.

    Raises:
        UsageError: it is neither, it is damaged, or it is no LoRA.
    """
    directory = adapter_directory(directory, option)
    if not directory.is_dir():
        raise UsageError(f"{option}: directory {directory} does not exist")
    if has_mixture(directory):
        return _from_mixture(directory)
    if (directory / CONFIG).exists():
        return _from_peft(directory)
    if (directory / "manifest.json").exists():
        return _from_checkpoint(directory)
    within = [directory / "adapter", *_adapters_of(directory)]
    hint = and_more([str(path) for path in within if path.is_dir()])
    raise UsageError(
        f"{option}: {directory} has neither an {CONFIG} nor a checkpoint's manifest.json"
        + (f"; did you mean {hint}?" if hint else "")
    )


def _adapters_of(run: Path) -> list[Path]:
    """The adapters that a run of several has written."""
    return sorted(path.parent for path in (run / ADAPTERS).glob(f"*/adapter/{CONFIG}"))


def _from_peft(directory: Path) -> AdapterSource:
    config = read_config(directory)
    raw = read_object(directory / CONFIG)
    file, base = inside(directory, WEIGHTS), _base_of(directory, raw)
    answering = Answering(template_in(directory), ends=ends_in(directory))
    task = raw.get("task_type")
    return AdapterSource(directory, file, config, base, False, answering=answering, task=task)


def _from_mixture(directory: Path) -> AdapterSource:
    config = mixture_of(directory)
    raw = read_object(places_in(directory, config)[0] / CONFIG)
    file, base = inside(directory, ROUTER), _base_of(directory, raw)
    answering = Answering(template_in(directory), ends=ends_in(directory))
    task = raw.get("task_type")
    return MixtureSource(directory, file, config, base, False, answering=answering, task=task)


def _base_of(directory: Path, raw: dict[str, Any]) -> BaseReference:
    """The base of the adapter in a directory, whose settings are `raw`."""
    path = raw.get("base_model_name_or_path")
    run = _model_section(directory)
    if not path or not _is_base_of(run, path):
        run = {}
    from_gguf = run.get("path", "").endswith(".gguf")
    if path and from_gguf and Path(path).is_absolute() and not Path(path).exists():
        path = run["path"]  # what it was converted to has been deleted
    return BaseReference(
        path,
        raw.get("revision") or run.get("revision"),
        None,
        run.get("cache_dir"),
        run["path"] if from_gguf else None,
    )


def _from_checkpoint(directory: Path) -> AdapterSource:
    checkpoint.verify(directory, ("adapter.safetensors", "config.yaml", "state.json"))
    # Where W0 was divided does not matter here, and its engine need not be installed.
    elsewhere = ["--sharding.engine", "fsdp2", "--sharding.cpu_offload", "false"]
    config = load(directory / "config.yaml", elsewhere)
    state = read_object(directory / "state.json")
    if config.adapters:
        run = directory.resolve().parent.parent
        places = [str(run / ADAPTERS / member.name / "adapter") for member in config.adapters]
        raise UsageError(
            f"--adapter: {directory} is a checkpoint of several adapters; each has a directory of "
            f"its own once it is trained: {and_more(places)}"
        )
    lora = saved_lora(state)
    settings = scaled(lora or lora_config(config), state)
    record = checkpoint.method_record(directory)
    try:
        names = stored_tensors(directory / checkpoint.ADAPTER)
        VARIANTS[settings.variant].check_record(record, names)
    except UsageError as error:
        raise UsageError(f"{directory / 'manifest.json'}: {error}") from None
    model = config.model
    base = BaseReference(model.path, model.revision, model.dtype, model.cache_dir)
    file = directory / "adapter.safetensors"
    data, where = config.data, f"{directory / 'state.json'}: ends"
    ends = as_ends(state.get("ends"), where)
    return AdapterSource(
        directory,
        file,
        settings,
        base,
        is_checkpoint=True,
        record=record,
        answering=Answering(data.chat_template, dict(data.chat_template_kwargs), ends),
        task=_PEFT_TASKS.get(config.train.task),
    )


def _is_base_of(run: dict[str, str], path: str) -> bool:
    """Whether a run's `model.path` is the base that its adapter records."""
    named = Path(run.get("path", "")).expanduser()
    return named.suffix == ".gguf" or path in (run.get("path"), str(named.absolute()))


def _model_section(adapter: Path) -> dict[str, str]:
    """`model` of a run's configuration, which knows where its base was converted, or {}."""
    run = written_by(adapter)
    section = run.settings().get("model") if run else None
    texts = section.items() if isinstance(section, dict) else ()
    return {name: value for name, value in texts if isinstance(value, str)}
