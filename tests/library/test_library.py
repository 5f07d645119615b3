"""A library of adapters: what it stores, which version others read, and that nothing is lost."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import edit_json
from mixes import apart, loaded, save_random, updates
from programs import start, status
from refusals import preparation
from safetensors.torch import load_file, save_file
from tiny import command, whole

from dlora.errors import UsageError
from dlora.library import objects
from dlora.library.command import main
from dlora.library.compose import main as compose
from dlora.library.describe import Described
from dlora.library.same_base import Base, with_identity
from dlora.library.store import Library
from dlora.runtime.run_lock import RunLock


@pytest.fixture(scope="module")
def adapters(saved_models, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        save_random(
            whole(saved_models("llama")),
            root / f"adapter-{i}",
            i,
            r=2 + i,
            target_modules=["q_proj"],
        )
        for i in range(3)
    ]


@pytest.fixture
def library(tmp_path) -> Path:
    return tmp_path / "library"


def run(*words: Any) -> None:
    assert main([str(word) for word in words]) == 0


def refused(*words: Any) -> str:
    with pytest.raises(UsageError) as error:
        main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def active(library: Path, name: str) -> bytes:
    """What others read under a name."""
    return (library / "active" / name / "adapter_model.safetensors").read_bytes()


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def everything(library: Path) -> dict[str, bytes]:
    """All files, but for the lock's."""
    return {
        str(path.relative_to(library)): path.read_bytes()
        for path in sorted(library.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_others_read_the_active_version(library, adapters, saved_models, capsys):
    for adapter in adapters[:2]:
        run("add", library, adapter, "--name", "sql")
    assert active(library, "sql") == weights(adapters[1])
    run("activate", library, "sql", 1)
    assert active(library, "sql") == weights(adapters[0])
    model = loaded(whole(saved_models("llama")), library / "active" / "sql")
    wanted = updates(loaded(whole(saved_models("llama")), adapters[0]), "0")
    assert apart(updates(model, "0"), wanted) == 0
    run("rollback", library, "sql")
    assert active(library, "sql") == weights(adapters[1])
    run("list", library)
    assert "2 versions, active 2" in capsys.readouterr().out


def test_every_state_can_be_gone_back_to(library, adapters):
    a, b, c = map(weights, adapters)
    for adapter in adapters:
        run("add", library, adapter, "--name", "n")
    run("rollback", library, "n")
    assert active(library, "n") == b
    run("rollback", library, "n")
    assert active(library, "n") == a
    assert "no earlier state" in refused("rollback", library, "n")
    run("rollback", library, "n", "--to", 3)
    assert active(library, "n") == c
    run("remove", library, "n")
    assert not (library / "active" / "n").exists()
    assert "is removed; rollback" in refused("diff", library, "n")
    run("rollback", library, "n")
    assert active(library, "n") == c
    run("rollback", library, "n")  # from the state that was gone back to
    assert active(library, "n") == b
    assert "has no state 99" in refused("rollback", library, "n", "--to", 99)


def test_a_version_that_is_not_activated(library, adapters):
    run("add", library, adapters[0], "--name", "n", "--no-activate")  # the first is, anyway
    run("add", library, adapters[1], "--name", "n", "--no-activate")
    assert active(library, "n") == weights(adapters[0])
    assert "active already" in refused("activate", library, "n", 1)
    assert "has no version 7; it has 1, 2" in refused("activate", library, "n", 7)


def test_equal_files_are_stored_once(library, adapters):
    run("add", library, adapters[0], "--name", "one")
    run("add", library, adapters[0], "--name", "two")
    assert len(list((library / "objects").iterdir())) == 1
    assert "is one@1 already" in refused("add", library, adapters[0], "--name", "one")
    run("remove", library, "one", "--purge")
    assert active(library, "two") == weights(adapters[0])
    run("remove", library, "two", "--purge")
    assert list((library / "objects").iterdir()) == []


def test_what_is_known_of_an_adapter_is_shown(library, adapters, saved_models, tmp_path, capsys):
    run_directory = tmp_path / "run"
    shutil.copytree(adapters[0], run_directory / "adapter")
    (run_directory / "config.yaml").write_text("model: {path: x}\n")
    lines = [{"step": 1, "loss": 3.0, "eval_loss": 2.5}, {"step": 2, "loss": 2.0, "lr": 1.0}]
    (run_directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    identity = with_identity(Base(str(saved_models("llama")))).identity
    state = {"data": {"fingerprint": "f00d"}, "base": identity}
    (run_directory / "checkpoints/step-000002").mkdir(parents=True)
    (run_directory / "checkpoints/step-000002/state.json").write_text(json.dumps(state))
    run(
        "add", library, run_directory / "adapter", "--name", "a", "--tag", "x", "--metric", "f1=0.5"
    )
    edited = Path(shutil.copytree(adapters[1], tmp_path / "edited"))
    run("add", library, edited, "--name", "b", "--parent", "a")
    assert (
        compose(
            [
                "--library",
                str(library),
                "--adapters",
                "a=0.5",
                "b@1=-1",
                "--method",
                "cat",
                "--to",
                str(tmp_path / "mix"),
            ]
        )
        == 0
    )
    run("add", library, tmp_path / "mix", "--name", "mix")
    capsys.readouterr()
    run("show", library, "a")
    shown = capsys.readouterr().out
    for wanted in (
        "a@1 (active)",
        "f00d",
        "eval_loss 2.5",
        "loss 2",
        "f1 0.5",
        "tags    x",
        identity[:12],
    ):
        assert wanted in shown
    run("show", library, "b@1")
    assert "from    a@1\n" in capsys.readouterr().out
    run("show", library, "mix")
    shown = capsys.readouterr().out
    assert "from    a@1, weight 0.5\n" in shown and "from    b@1, weight -1\n" in shown


def test_a_difference_is_that_of_the_updates(library, adapters, saved_models, capsys):
    for adapter in adapters[:2]:
        run("add", library, adapter, "--name", "n")
    capsys.readouterr()
    run("diff", library, "n")
    lines = capsys.readouterr().out.splitlines()
    one, other = (updates(loaded(whole(saved_models("llama")), a), "0") for a in adapters[:2])
    assert lines[0] == "n@1 -> n@2" and "r: 2 -> 3" in lines
    for path, D in one.items():
        name = path.removeprefix("base_model.model.")
        [line] = [line for line in lines if line.startswith(name)]
        norms = [float(t.double().norm()) for t in (D, other[path], D - other[path])]
        assert [float(word) for word in line.split()[1:4]] == pytest.approx(norms, rel=1e-3)
        assert line.endswith("r 2 -> 3")
    run("diff", library, "n@1", "n@1")
    apart_by = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(apart_by) == 3 and max(apart_by) < 1e-6


def test_an_adapter_of_another_base(library, adapters, saved_models, tmp_path):
    run("add", library, adapters[0], "--name", "n")
    before = everything(library)
    other = save_random(
        whole(saved_models("wide")), tmp_path / "other", 0, target_modules=["q_proj"]
    )
    assert "is an adapter of" in refused("add", library, other, "--name", "n")
    edit_json(other / "adapter_config.json", base_model_name_or_path=None)
    assert "another base" in refused("add", library, other, "--name", "n")
    assert everything(library) == before


def test_a_base_has_the_identity_that_a_run_records(saved_models, tmp_path):
    for name in ("llama", "tied", "gpt2"):
        path = str(saved_models(name))
        recorded = preparation(command(path, tmp_path, model__dtype="bfloat16")).base_identity
        assert recorded is not None
        assert with_identity(Base(path)).identity == recorded


NAMES = ["", ".", "..", "../x", "a/b", "a@1", ".hidden", "ü", "a b", "n\n", "n" * 201]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_one_word(name, library, adapters):
    assert "make a name" in refused("add", library, adapters[0], "--name", name)
    assert not library.exists()


def test_the_longest_name(library, adapters):
    run("add", library, adapters[0], "--name", "n" * 200)
    assert active(library, "n" * 200) == weights(adapters[0])


WORDS = {  # behind `add LIB ADAPTER --name n`; what the message says
    "tag": (["--tag", "a\nb"], "--tag: 'a\\nb': a tag is a line of text"),
    "no tag": (["--tag", " "], "--tag: ' ': a tag is a line of text"),
    "metric": (["--metric", "f=1e999"], "NAME=NUMBER is expected"),
    "metric's name": (["--metric", "a\nb=1"], "NAME=NUMBER is expected"),
    "name twice": (["--name", "m"], "argument --name: is given twice"),
    "parent": (["--parent", "m"], "has no adapter 'm'; it has n"),
    "version": (["--parent", "n@"], "n has no version without a number; it has 1"),
    "digits": (["--parent", "n@" + "9" * 5000], "n has no version 99999999999999999999; it has 1"),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_means_nothing(word, library, adapters):
    run("add", library, adapters[0], "--name", "n")
    before = everything(library)
    words, message = WORDS[word]
    assert message in refused("add", library, adapters[1], "--name", "n", *words)
    assert everything(library) == before


PATHS = {"long": "x" * 300, "user": "~no-such-user/x", "ring": "ring", "file": "file/x"}


@pytest.mark.parametrize("path", PATHS)
def test_what_can_be_no_path(path, library, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ring").symlink_to("ring")
    Path("file").touch()
    refused("add", PATHS[path], adapters[0], "--name", "n")
    refused("add", library, PATHS[path], "--name", "n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ring"]


def test_what_peft_would_not_load(library, adapters, tmp_path):
    """A file with other keys than PEFT's, and an r that is not that of the file."""
    renamed, other = (Path(shutil.copytree(adapters[0], tmp_path / n)) for n in "ab")
    tensors = load_file(renamed / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    save_file(tensors, renamed / "adapter_model.safetensors")
    edit_json(other / "adapter_config.json", r=9)
    assert "has no A and B" in refused("add", library, renamed, "--name", "n")
    assert "but r is 9" in refused("add", library, other, "--name", "n")
    assert not library.exists()


KINDS = {"dora": {"use_dora": True}, "whole": {"modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_low_rank_form_is_stored(kind, library, adapters, saved_models, tmp_path):
    made = save_random(
        whole(saved_models("llama")), tmp_path / kind, 0, target_modules=["q_proj"], **KINDS[kind]
    )
    run("add", library, adapters[0], "--name", "n")
    run("add", library, made, "--name", "n")
    assert active(library, "n") == weights(made)
    assert "can be neither composed nor compared" in refused("diff", library, "n")


def test_a_name_that_is_a_directory_too(library, adapters, tmp_path, monkeypatch):
    run("add", library, adapters[0], "--name", "n")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters[1], "n")
    with pytest.raises(UsageError, match="n is a directory here and a name in"):
        compose(["--library", "library", "--adapters", "n=1", "--method", "cat", "--to", "out"])


def test_what_is_no_library(adapters, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    assert "no library of adapters" in refused("list", tmp_path / "nix")
    assert "not empty, and no library" in refused(
        "add", tmp_path / "full", adapters[0], "--name", "n"
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert "has no adapter_config.json" in refused("add", tmp_path / "new", tmp_path, "--name", "n")
    assert not (tmp_path / "new").exists()


# -- torn ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


TORN = {
    "index": (lambda lib: (lib / "library.json").write_text("{"), "library.json: cannot be read"),
    "key": (lambda lib: edit_json(lib / "library.json", adapters=3), "library.json: is damaged"),
    "version": (lambda lib: edit_json(lib / "library.json", format=9), "has format 9"),
    "no index": (lambda lib: (lib / "library.json").unlink(), "has lost its library.json"),
    "object": (lambda lib: shutil.rmtree(next((lib / "objects").iterdir())), "missing"),
    "file": (
        lambda lib: cut(next((lib / "objects").glob("*/*.safetensors"))),
        "is not what was added",
    ),
    "name": (
        lambda lib: edit_json(lib / "library.json", adapters=renamed(lib, "../../x")),
        "is damaged: ValueError(\"the name '../../x'\")",
    ),
    "active": (lambda lib: in_the_way(lib / "active"), "active: was not made by the library"),
    "folder": (lambda lib: in_the_way(lib / "active/n"), "active/n: was not made by the library"),
    "outside": (
        lambda lib: edit_json(lib / "library.json", adapters=with_file(lib, "../../x")),
        "is damaged",
    ),
}


def with_file(library: Path, name: str) -> Any:
    found = json.loads((library / "library.json").read_text())["adapters"]
    found["n"]["versions"][0]["files"] = {name: "0" * 64}
    return found


def renamed(library: Path, name: str) -> Any:
    found = json.loads((library / "library.json").read_text())["adapters"]
    return {name: found["n"]}


def in_the_way(path: Path) -> None:
    path.unlink() if path.is_symlink() else shutil.rmtree(path)
    path.mkdir() if path.name == "n" else path.touch()


WRONG: dict[str, Any] = {  # of a version
    "number": [-1, 1.0, True, "1"],
    "files": [{}, {"x": 5}, {"x": "1"}, []],
    "added": [5],
    "base": [{}, "x", {"path": 1, "revision": None, "identity": None}],
    "parents": [["x"], [{"path": 1}], [{"path": "x", "weight": "1"}]],
    "data": [5],
    "metrics": [[1], {"loss": "1"}],
    "tags": ["x", [1]],
    "other": [1],
}
WRONG_CASES = [(key, value) for key, values in WRONG.items() for value in values]


def test_a_field_of_another_type_is_damage(library, adapters):
    run("add", library, adapters[0], "--name", "n")
    index = library / "library.json"
    whole_index = index.read_text()
    for key, value in WRONG_CASES:
        found = json.loads(whole_index)
        found["adapters"]["n"]["versions"][0][key] = value
        index.write_text(json.dumps(found))
        before = everything(library)
        for words in (["show", library, "n"], ["add", library, adapters[1], "--name", "n"]):
            assert "library.json: is damaged" in refused(*words), (key, value)
        assert everything(library) == before
    for key, value in (("active", True), ("active", "1"), ("to", "0"), ("action", 1)):
        found = json.loads(whole_index)
        found["adapters"]["n"]["history"][0][key] = value
        index.write_text(json.dumps(found))
        assert "library.json: is damaged" in refused("list", library), (key, value)


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_library_is_one_line_and_stays(torn, library, adapters):
    tear, message = TORN[torn]
    run("add", library, adapters[0], "--name", "n")
    tear(library)
    before = everything(library)
    reads = torn not in ("active", "folder")
    assert message in refused(*(["show"] if reads else ["remove"]), library, "n")
    calls = [
        ["diff", library, "n", "n"],
        ["remove", library, "n"],
        ["add", library, adapters[1], "--name", "n"],
    ]
    for words in calls[:1] if torn in ("object", "file") else calls[0 if reads else 1 :]:
        refused(*words)
    assert everything(library) == before
    if not reads:
        return
    with pytest.raises(UsageError):
        compose(
            [
                "--library",
                str(library),
                "--adapters",
                "n=1",
                "--method",
                "cat",
                "--to",
                str(library) + "-out",
            ]
        )
    assert everything(library) == before


@pytest.mark.parametrize("torn", ["object", "file"])
def test_adding_again_repairs(torn, library, adapters):
    run("add", library, adapters[0], "--name", "n")
    TORN[torn][0](library)
    run("add", library, adapters[0], "--name", "n")
    assert active(library, "n") == weights(adapters[0])
    run("show", library, "n")
    assert len(json.loads((library / "library.json").read_text())["adapters"]["n"]["versions"]) == 1


def test_a_crash_between_object_and_index(library, adapters, monkeypatch):
    run("add", library, adapters[0], "--name", "n")
    before = everything(library)
    write = objects.Objects.write

    def crash(self, *words):
        write(self, *words)
        raise MemoryError

    monkeypatch.setattr(objects.Objects, "write", crash)
    with pytest.raises(MemoryError):
        run("add", library, adapters[1], "--name", "n")
    assert before.items() <= everything(library).items()
    assert active(library, "n") == weights(adapters[0])
    monkeypatch.undo()
    run("add", library, adapters[1], "--name", "n")
    assert active(library, "n") == weights(adapters[1])


@pytest.mark.parametrize("most", [100, 600])
def test_a_full_disk(most, library, adapters):
    """No file may grow beyond `most` bytes: the lock's, and the adapter's."""
    run("add", library, adapters[0], "--name", "n")
    before = everything(library)
    with files_of_at_most(most):
        assert "File too large" in refused("add", library, adapters[1], "--name", "n")
    assert everything(library) == before
    run("add", library, adapters[1], "--name", "n")
    assert active(library, "n") == weights(adapters[1])


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_next_writer_cleans_up_after_one_that_died(library, adapters):
    run("add", library, adapters[0], "--name", "n")
    (library / ".library.json.1.tmp").write_text("{")
    (library / "objects/.x.1.tmp").mkdir()
    run("add", library, adapters[1], "--name", "n")
    assert sorted(path.name for path in library.iterdir()) == [
        ".lock",
        *("active", "library.json", "objects"),
    ]
    assert len(list((library / "objects").iterdir())) == 2


# -- two processes ------------------------------------------------------------------------------


def add_many(library: Path, adapters: list[Path], name: str) -> None:
    for number, adapter in enumerate(adapters):
        Library(library).add(adapter, f"{name}-{number}", Described(), activate=True)


@pytest.mark.timeout(240)
def test_two_writers_lose_nothing(library, adapters):
    context = multiprocessing.get_context("forkserver")
    run("add", library, adapters[0], "--name", "first")
    writers = [context.Process(target=add_many, args=(library, adapters, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = Library(library).index()
    assert set(found.adapters) == {"first", *(f"{name}-{i}" for name in "ab" for i in range(3))}
    for number, adapter in enumerate(adapters):
        assert active(library, f"a-{number}") == active(library, f"b-{number}") == weights(adapter)


def hold(library: Path, ready: Any) -> None:
    RunLock(library, key="library").take()
    ready.set()
    signal.pause()


def test_a_library_that_another_process_writes(library, adapters, tmp_path):
    run("add", library, adapters[0], "--name", "n")
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    writer = context.Process(target=hold, args=(library, ready))
    writer.start()
    try:
        assert ready.wait(60)
        log = tmp_path / "log"
        words = ["dlora.library.command", "remove", str(library), "n"]
        assert status(start(1, words, log)) == 2
        line = log.read_text().splitlines()[-1]
        assert line.startswith(f"dlora: error: library: process {writer.pid} on ")
        run("list", library)  # readers need no lock
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    run("remove", library, "n")  # the kernel freed the lock of the one that died
