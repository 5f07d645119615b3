"""A method, an initialisation, an objective, an optimizer, an engine, a task, a format of weights
or of records, and a kind of file are one added file each.

Each test adds one file to a copy of the package, names it in YAML and runs it on two ranks.
"""

import json
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from programs import kill, start, status
from safetensors.torch import load_file
from tiny import save_chats, save_model
from toys import FILES
from transformers import AutoModelForCausalLM

import dlora

PACKAGE = Path(dlora.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    save_model(directory / "model", "blocks")
    save_chats(directory / "chats.jsonl", 8)
    asked = (json.dumps({"q": f"What is {i}?", "a": f"A number {i}."}) for i in range(8))
    (directory / "questions.jsonl").write_text("\n".join(asked))
    told = (f"instruction: What is {i}?\noutput: A number {i}." for i in range(8))
    (directory / "pairs.rec").write_text("\n\n".join(told))
    return directory


def copy_with(directory: Path, file: str) -> Path:
    """A copy of the package, with its bytecode, and one file more; the folder to import it from."""
    shutil.copytree(PACKAGE, directory / "dlora")
    assert not (directory / "dlora" / file).exists()
    (directory / "dlora" / file).write_text(FILES[file], "utf-8")
    return directory


def run_file(base: Path, directory: Path, **chosen: Any) -> Path:
    """A YAML file of a short run in `directory`/run, with the sections `chosen` merged in."""
    sections: dict[str, Any] = {
        "model": {"path": str(base / "model"), "dtype": "float32"},
        "adapter": {"r": 2},
        "sharding": {"base": "world"},
        "data": {"train": "chats.jsonl"},
        "optimizer": {"lr": 2e-3},
        "train": {"max_steps": 2, "global_batch_size": 4},
        "output": {"dir": str(directory / "run"), "tensorboard": False, "save_every": 0},
    }
    for name, options in chosen.items():
        sections[name] = sections.get(name, {}) | options
    sections["data"]["train"] = str(base / sections["data"]["train"])
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def train(package: Path, file: Path) -> list[ForkServerProcess]:
    """Two ranks that have started on the run of a file."""
    return start(2, ["dlora.train", "--config", str(file)], file.with_suffix(".log"), package)


def finish(ranks: list[ForkServerProcess], file: Path) -> None:
    assert status(ranks) == 0, file.with_suffix(".log").read_text()[-4000:]


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "run/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_method(base: Path, tmp_path: Path, engine: str) -> None:
    """It trains, is killed after a save, resumes bit for bit, and stock PEFT loads it."""
    package = copy_with(tmp_path / "package", "lora/variants/gated.py")
    chosen: dict[str, Any] = {
        "adapter": {"method": "gated", "gate": 1.5},
        "sharding": {"engine": engine, "base": "world"},
        "train": {"max_steps": 24, "global_batch_size": 4},
    }
    ends = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        output = {"dir": str(tmp_path / name / "run"), "tensorboard": False, "save_every": 4}
        file = run_file(base, tmp_path / name, output=output, **chosen)
        ranks = train(package, file)
        if name == "killed":
            saved = tmp_path / name / "run/checkpoints"
            while not list(saved.glob("step-*")) and all(r.exitcode is None for r in ranks):
                time.sleep(0.01)
            kill(ranks)
            assert list(saved.glob("step-*")) and not (tmp_path / name / "run/adapter").exists()
            ranks = train(package, file)
        finish(ranks, file)
        ends[name] = adapter_of(tmp_path / name)
    assert ends["whole"].keys() == ends["killed"].keys()
    assert all(torch.equal(ends["whole"][key], ends["killed"][key]) for key in ends["whole"])
    config = yaml.safe_load((tmp_path / "whole/run/config.yaml").read_text())
    assert config["adapter"]["gate"] == 1.5
    check_exported(package, base / "model", tmp_path / "whole/run/checkpoints/step-000024")


EXPORTED = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from dlora import attach
from dlora.checkpoint.state import saved_lora
from dlora.export.command import main
base, checkpoint, to = sys.argv[1:]
assert main(["--adapter", checkpoint, "--base", base, "--to", to]) == 0
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
attach(model, saved_lora(json.load(open(checkpoint + "/state.json"))))
model.load_state_dict(load_file(checkpoint + "/adapter.safetensors"), strict=False)
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 40)[None]).logits}, to + "/logits.safetensors")
"""


def check_exported(package: Path, base: Path, checkpoint: Path) -> None:
    """What is exported has, in stock PEFT, the logits of the checkpoint's own form."""
    to = checkpoint.parents[2] / "exported"
    (package / "exported.py").write_text(EXPORTED)
    log = to.with_suffix(".log")
    words = ["exported", str(base), str(checkpoint), str(to)]
    assert status(start(1, words, log, package)) == 0, log.read_text()[-3000:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = model(ids).logits
        adapted = PeftModel.from_pretrained(model, str(to))(ids).logits
    ours = load_file(to / "logits.safetensors")["logits"]
    assert (adapted - plain).norm() > 1e-3 * plain.norm()
    assert (adapted - ours).norm() <= 1e-5 * ours.norm()


CHOSEN: dict[str, dict[str, Any]] = {
    "lora/init/halves.py": {"adapter": {"r": 2, "init_lora_weights": "halves", "halves_size": 0.5}},
    "objectives/smooth.py": {
        "train": {"objective": "smooth", "max_steps": 2, "global_batch_size": 4},
        "smooth": {"epsilon": 0.2},
    },
    "data/formats/questions.py": {"data": {"format": "questions", "train": "questions.jsonl"}},
    "data/kinds/blanks.py": {"data": {"format": "alpaca", "train": "pairs.rec"}},
    "tasks/last.py": {"train": {"task": "last", "max_steps": 2, "global_batch_size": 4}},
    "quant/half.py": {"model": {"quantization": "half"}},
    "optim/signed.py": {"optimizer": {"name": "signed", "lr": 1e-3, "signed_decay": 0.01}},
    "sharding/engines/whole.py": {"sharding": {"engine": "whole", "base": "world"}},
}


@pytest.fixture(scope="module")
def usual(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter of the same run with the parts that dlora has."""
    directory = tmp_path_factory.mktemp("usual")
    file = run_file(base, directory)
    finish(train(PACKAGE.parent, file), file)
    return adapter_of(directory)


@pytest.mark.parametrize("file", CHOSEN)
def test_another_part(
    base: Path, usual: dict[str, torch.Tensor], tmp_path: Path, file: str
) -> None:
    """It trains from YAML and acts, and its options are listed in the resolved configuration."""
    package = copy_with(tmp_path / "package", file)
    written = run_file(base, tmp_path, **CHOSEN[file])
    finish(train(package, written), written)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for section, options in CHOSEN[file].items():
        chosen = {
            key: value for key, value in options.items() if (section, key) != ("data", "train")
        }
        assert chosen.items() <= config[section].items()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    trained = adapter_of(tmp_path)
    if file.startswith("sharding"):  # where W0 is changes no number
        for name, wanted in usual.items():
            assert (trained[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
    else:
        assert any(not torch.equal(tensor, usual[name]) for name, tensor in trained.items())


NEEDY = """
import not_installed_anywhere

from ROOM import BASE

class _Shared(BASE):
    pass

class Needy(_Shared):
    name = "needy"
    requires = {"not_installed_anywhere": "'dlora[needy]'"}
"""
LOOKED_UP = """
import dlora
from dlora.errors import UsageError
from dlora.lora.init import INITS
from dlora.lora.variants import VARIANTS
from dlora.quant.formats import FORMATS

for parts in (VARIANTS, INITS, FORMATS):
    for name in parts:
        if name != "needy":
            found = parts[name] if isinstance(parts[name], type) else type(parts[name])
            assert found.name == name and "_Shared" not in found.__name__, found
    try:
        parts["needy"]
    except UsageError as error:
        print(error)
"""


def test_what_a_file_needs_is_asked_of_those_who_name_it(tmp_path: Path) -> None:
    """Nobody else is troubled, neither by its package nor by its other classes."""
    shutil.copytree(PACKAGE, tmp_path / "dlora")
    for room, module, base in (
        ("lora/variants", "dlora.lora.variants.lora", "LoraAdapter"),
        ("lora/init", "dlora.lora.init.base", "Initialisation"),
        ("quant", "dlora.quant.formats", "Format"),
    ):
        text = NEEDY.replace("ROOM", module).replace("BASE", base)
        (tmp_path / "dlora" / room / "needy.py").write_text(text)
    (tmp_path / "look_up.py").write_text(LOOKED_UP)
    log = tmp_path / "log"
    assert status(start(1, ["look_up"], log, tmp_path)) == 0, log.read_text()
    assert log.read_text().count("needy needs not_installed_anywhere: pip install 'dlora[") == 3
