"""A checkpoint that something happened to is refused in one line, or its content is what it was."""

import functools
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import agree
from refusals import refusal
from safetensors.torch import save
from tiny import command

from dlora.adapters.open_adapter import open_adapter
from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.writing import write
from dlora.config.load import Config, dump_yaml, parse
from dlora.data import Sampler
from dlora.lora.variants.adalora import AdaLoraConfig
from dlora.training.find_checkpoint import ResumePoint, find_checkpoint, state_at

TRIALS = 200
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
STEPS = ("step-000003", "step-000004")


def content(step: int, config: Config) -> Checkpoint:
    """What a run with AdaLoRA holds: all files, and triplets in the manifest."""
    draw = torch.Generator().manual_seed(step)
    shapes = {"lora_A": (4, 6), "lora_B": (5, 4), "lora_E": (4, 1)}
    tensors = {
        f"{path}.adapter.{name}": torch.randn(shape, generator=draw)
        for path in PATHS
        for name, shape in shapes.items()
    }
    states = {
        file: {f"{n}.{slot}": torch.rand(t.shape, generator=draw) for n, t in tensors.items()}
        for file, slot in (("optimizer", "exp_avg"), ("scorer", "sensitivity"))
    }
    sampler = Sampler(20, 4, 0, True, max_steps=8)
    lora = AdaLoraConfig(init_r=4, target_r=2, total_step=8)
    state = state_at(step, config, lora, sampler, "f" * 64, "b" * 64) | {"ranks": 2}
    kept = {PATHS[0]: [0, 1, 2], PATHS[1]: [0, 3]}
    return Checkpoint(tensors, states, state, {"shrunk": False, "kept": kept})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with two checkpoints."""
    root = tmp_path_factory.mktemp("run")
    config = config_of(root)
    for step in (3, 4):
        write(content(step, config), root / "checkpoints", dump_yaml(config), 9)
    return root


@functools.cache
def any_config() -> Config:
    with tempfile.TemporaryDirectory() as place:
        words = command("base", Path(place), adapter__method="adalora", adapter__r=None)
        return parse(words, "dlora.train").config


def config_of(root: Path, resume: str = "auto") -> Config:
    config = any_config()
    return replace(config, output=replace(config.output, dir=str(root), resume=resume))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def raw(c: Checkpoint) -> list[Any]:
        return [save(c.tensors), {n: save(s) for n, s in c.states.items()}, c.state, c.record]

    return raw(one) == raw(other)


# -- what may happen to a checkpoint ---------------------------------------------------------------


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


Damage = Callable[[Path, random.Random], None]


def changed(change: Callable[[bytes, random.Random], bytes], name: str = "") -> Damage:
    """The content of a file, by default of any."""

    def damage(directory: Path, draw: random.Random) -> None:
        path = directory / name if name else draw.choice(files_of(directory))
        path.write_bytes(change(path.read_bytes(), draw))

    return damage


def flipped(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def zeroed(content: bytes, draw: random.Random) -> bytes:
    """What a file system leaves of a block that it never wrote."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.randint(1, 512))
    return content[:start] + bytes(stop - start) + content[stop:]


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def deleted(directory: Path, draw: random.Random) -> None:
    draw.choice(files_of(directory)).unlink()


def swapped(directory: Path, draw: random.Random) -> None:
    one, other = draw.sample(files_of(directory), 2)
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(before)


def of_another_step(directory: Path, draw: random.Random) -> None:
    path = draw.choice(files_of(directory))
    path.write_bytes((directory.with_name(STEPS[0]) / path.name).read_bytes())


def all_of_another_step(directory: Path, draw: random.Random) -> None:
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name(STEPS[0]), directory)


def a_directory_in_its_place(directory: Path, draw: random.Random) -> None:
    path = draw.choice(files_of(directory))
    path.unlink()
    path.mkdir()


def a_file_in_its_place(directory: Path, draw: random.Random) -> None:
    shutil.rmtree(directory)
    directory.write_bytes(draw.randbytes(50))


def a_link_out(directory: Path, draw: random.Random) -> None:
    """Of the same content, which whoever can write there may change later."""
    path = draw.choice(files_of(directory))
    elsewhere = directory.parents[1] / path.name
    path.rename(elsewhere)
    path.symlink_to(draw.choice([elsewhere, Path("..", "..", path.name)]))


def garbage(directory: Path, draw: random.Random) -> None:
    """With a manifest that agrees, as of a writer with a bug."""
    words = [b"", b"[]", b"null", b"{}", b"[" * 9999, b'{"step": 4}', draw.randbytes(99), b"{: 1"]
    name = draw.choice(["state.json", "config.yaml", "adapter.safetensors", "scorer.safetensors"])
    (directory / name).write_bytes(draw.choice(words))
    agree(directory)


def retyped(directory: Path, draw: random.Random) -> None:
    """A value of `state.json` or the manifest becomes another; the hashes agree with it."""
    path = directory / draw.choice(["state.json", "manifest.json"])
    value = json.loads(path.read_text())
    at: Any = value
    while True:
        keys = [k for k in at if k not in ("sha256", "versions", "random", "schedule")]
        key = draw.choice(keys)
        if not (isinstance(at[key], dict) and at[key]) or draw.random() < 0.2:
            break
        at = at[key]
    at[key] = draw.choice([None, -1, 1.5, "x", [], {}, ["x"], {"x": 1}, True, 10**30])
    path.write_text(json.dumps(value))
    agree(directory, hashes=path.name != "manifest.json")


DAMAGES: dict[str, Damage] = {
    "truncated": changed(truncated),
    "flipped": changed(flipped),
    "flipped in the manifest": changed(flipped, "manifest.json"),
    "deleted": deleted,
    "emptied": changed(lambda content, draw: b""),
    "zeroed": changed(zeroed),
    "swapped": swapped,
    "of another step": of_another_step,
    "all of another step": all_of_another_step,
    "grown": changed(lambda content, draw: content + draw.randbytes(draw.randint(1, 99))),
    "a directory in its place": a_directory_in_its_place,
    "a file in its place": a_file_in_its_place,
    "a link out": a_link_out,
}
FORGED: dict[str, Damage] = {"garbage": garbage, "retyped": retyped}  # that no hash shows


# -- what becomes of it ----------------------------------------------------------------------------


def taken(root: Path, resume: str) -> tuple[ResumePoint | None, list[str]]:
    warnings: list[str] = []
    return find_checkpoint(config_of(root, resume), warnings.append), warnings


def said_of(root: Path, directory: Path) -> str:
    """What is said of a damaged checkpoint, the same to whoever asks for it by name."""
    return refusal(taken, root, str(directory))


def test_random_damage_is_detected_or_harmless(whole: Path, tmp_path: Path) -> None:
    """promise 1.2: never a wrong resume, and never a traceback."""
    wanted = {step: checkpoints.read(whole / "checkpoints" / step) for step in STEPS}
    draw, seen, every = random.Random(6), Counter[str](), [*DAMAGES, *FORGED]
    for trial in range(TRIALS):
        damage = every[trial % len(every)]
        root = Path(shutil.copytree(whole, tmp_path / str(trial)))
        older, newer = (root / "checkpoints" / step for step in STEPS)
        (DAMAGES | FORGED)[damage](newer, draw)
        start, warnings = taken(root, "auto")
        assert start is not None, damage
        told = (trial, damage, warnings)
        if start.directory == str(older):
            assert len(warnings) == 1 and warnings[0].startswith("skipping a checkpoint: "), told
            assert str(newer) in warnings[0], told
            if newer.is_dir():
                assert warnings[0].endswith(said_of(root, newer)), told
            assert same(checkpoints.read(older), wanted[STEPS[0]])
            seen["detected"] += 1
        else:
            assert warnings == [] and start.directory == str(newer), told
            held = checkpoints.read(newer)
            if damage in FORGED:  # it is another checkpoint, of the right types
                assert (held.state["step"], start.step) == (4, 4), told
                assert start.lora is not None, told
            else:
                assert same(held, wanted[STEPS[1]]), told
            seen["harmless" if damage not in FORGED else "forged"] += 1
        shutil.rmtree(root)
    assert seen["detected"] > 0.85 * TRIALS, seen
    assert sum(seen.values()) == TRIALS


def test_nothing_is_left(whole: Path, tmp_path: Path) -> None:
    """Where all are damaged a run starts afresh, and says of each why."""
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in STEPS:
        DAMAGES["truncated"](root / "checkpoints" / step, random.Random(1))
    start, warnings = taken(root, "auto")
    assert start is None and len(warnings) == 2


# -- forgeries, one by one -------------------------------------------------------------------------


def edited(name: str, *keys: str, to: Any) -> Callable[[Path], None]:
    """`keys` lead to what becomes `to`; the hashes agree."""

    def edit(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        at = functools.reduce(lambda inner, key: inner[key], keys[:-1], value)
        at[keys[-1]] = to
        (directory / name).write_text(json.dumps(value))
        agree(directory, hashes=name != "manifest.json")

    return edit


def rewritten(name: str, text: str) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        (directory / name).write_text(text)
        agree(directory)

    return rewrite


STATE, MANIFEST, SETTINGS = "state.json", "manifest.json", "config.yaml"
OF_STATE = {"bytes": 1, "sha256": "0"}
TRIPLETS = "method: does not list triplets by module"
FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no step": (edited(STATE, "step", to="four"), "state.json: step: expected a number of steps"),
    "negative step": (edited(STATE, "step", to=-1), "state.json: step: expected a number of steps"),
    "another step": (edited(STATE, "step", to=5), "state.json: step is 5"),
    "data": (edited(STATE, "data", to=[]), "state.json: data.fingerprint is None"),
    "fingerprint": (edited(STATE, "data", "fingerprint", to=7), "fingerprint is 7, which a run"),
    "sequences": (edited(STATE, "data", "sequences", to="x"), "state.json: data.sequences is 'x'"),
    "base": (edited(STATE, "base", to={}), "state.json: base is {}"),
    "ranks": (edited(STATE, "ranks", to="2"), "state.json: ranks is '2'"),
    "forgetting": (edited(STATE, "forget", to=3), "state.json: forget is 3"),
    "scale": (edited(STATE, "forget", to={"scale": "x"}), "state.json: forget.scale is 'x'"),
    "end": (edited(STATE, "forget", to={"ended": {}}), "state.json: forget.ended.line is None"),
    "adapter": (edited(STATE, "adapter", to=3), "state.json: adapter: invalid settings"),
    "method": (edited(STATE, "adapter", "method", to="x"), "adapter: invalid settings: 'x'"),
    "option": (edited(STATE, "adapter", "rrr", to=1), "adapter: invalid settings"),
    "pattern": (edited(STATE, "adapter", "alpha_pattern", to=[1]), "adapter: invalid settings"),
    "list": (rewritten(STATE, "[]"), "state.json: contains a JSON list"),
    "deep": (rewritten(STATE, "[" * 100_000), "state.json: cannot be read"),
    "settings": (rewritten(SETTINGS, "- 1"), "config.yaml: the whole file is [1]"),
    "section": (rewritten(SETTINGS, "sharding: 3"), "config.yaml: sharding is 3"),
    "engine": (rewritten(SETTINGS, "sharding: {engine: x}"), "sharding.engine is 'x'"),
    "yaml": (rewritten(SETTINGS, "a: [\n"), "config.yaml:2: not valid YAML"),
    "python": (rewritten(SETTINGS, "!!python/object/apply:os.getcwd []"), "not valid YAML"),
    "tensors": (rewritten("optimizer.safetensors", "x" * 64), "optimizer.safetensors: is damaged"),
    "files": (edited(MANIFEST, "files", to=[]), "manifest.json: does not list"),
    "sizes": (edited(MANIFEST, "files", STATE, to=[1]), "state.json: is missing or has the wrong"),
    "negative": (edited(MANIFEST, "files", STATE, "bytes", to=-1), "has the wrong size"),
    "parent": (edited(MANIFEST, "files", "../x", to=OF_STATE), "'../x' is not the name of a file"),
    "inner": (edited(MANIFEST, "files", "a/../../x", to=OF_STATE), "is not the name of a file in"),
    "root": (edited(MANIFEST, "files", "/etc/hostname", to=OF_STATE), "is not the name of a file"),
    "itself": (edited(MANIFEST, "files", "", to=OF_STATE), "'' is not the name of a file in it"),
    "format": (edited(MANIFEST, "format", to=[2]), "checkpoint format [2] is unknown"),
    "record": (edited(MANIFEST, "method", to=3), TRIPLETS),
    "kept": (edited(MANIFEST, "method", "kept", PATHS[0], to=["0"]), TRIPLETS),
    "twice": (edited(MANIFEST, "method", "kept", PATHS[0], to=[1, 1]), TRIPLETS),
    "disorder": (edited(MANIFEST, "method", "kept", PATHS[0], to=[2, 1]), TRIPLETS),
    "below 0": (edited(MANIFEST, "method", "kept", PATHS[0], to=[-1]), TRIPLETS),
    "other modules": (edited(MANIFEST, "method", "kept", to={}), "differ from those of adapter."),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_checkpoint_is_one_line(case: str, whole: Path, tmp_path: Path) -> None:
    """Hashes and all agree; what is in it is not what a run writes."""
    forge, message = FORGERIES[case]
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    older, newer = (root / "checkpoints" / step for step in STEPS)
    forge(newer)
    said = said_of(root, newer)
    assert message in said and str(newer) in said
    start, warnings = taken(root, "auto")
    assert start is not None and start.directory == str(older)
    assert warnings == [f"skipping a checkpoint: {said}"]


def test_a_manifest_of_other_triplets_is_not_believed(whole: Path, tmp_path: Path) -> None:
    """Only the manifest holds them, so it hashes itself; one of format 1 did not."""
    root = Path(shutil.copytree(whole, tmp_path / "run"))
    newer = root / "checkpoints" / STEPS[1]
    manifest = json.loads((newer / MANIFEST).read_text())
    manifest["method"]["kept"][PATHS[1]] = [0, 2]
    (newer / MANIFEST).write_text(json.dumps(manifest))
    assert "manifest.json: does not match its SHA-256" in said_of(root, newer)
    del manifest["sha256"]
    (newer / MANIFEST).write_text(json.dumps(manifest))
    assert "manifest.json: does not match its SHA-256" in said_of(root, newer)
    (newer / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    start, _ = taken(root, "auto")
    assert start is not None and start.directory == str(newer)


def test_a_state_of_no_tensor_is_refused(whole: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(whole / "checkpoints" / STEPS[1], tmp_path / STEPS[1]))
    (newer / "optimizer.safetensors").write_bytes(save({"x.exp_avg": torch.zeros(2)}))
    agree(newer)
    said = refusal(checkpoints.read, newer)
    assert "optimizer.safetensors: x.exp_avg is of no trained tensor" in said


def test_export_reads_no_forged_checkpoint(whole: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(whole / "checkpoints" / STEPS[1], tmp_path / STEPS[1]))
    edited(STATE, "adapter", to=3)(newer)
    assert "state.json: adapter: invalid settings" in refusal(open_adapter, newer)
