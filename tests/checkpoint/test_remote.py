"""Checkpoints in a store: complete or not there, fetched where the disk has none, never mixed up.

The stores are fsspec's `memory://`, which lives as long as the worker process does, and moto's S3
server in this process, which s3fs speaks to over HTTP as it does to Amazon's.
"""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from ranks import Pools
from run_training import Runs, same_bits, told, train
from s3fs import S3FileSystem
from sampling import full

from dlora.checkpoint.format import verify
from dlora.checkpoint.remote import MANIFEST, RemoteCheckpoints
from dlora.config.load import parse
from dlora.errors import TransientError, UsageError

STEPS = 4
SECRET = "kept-by-nobody"


@pytest.fixture(scope="module", autouse=True)
def s3(pools: Pools) -> Iterator[None]:
    """An S3 server, as the environment of the worker says from here on."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    said = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    pools(1).run(into_environment, said)
    yield
    server.stop()


# 4 s a test; what is stored in memory is what S3 is given
@pytest.fixture(params=[full("memory"), "s3"])
def store(request: pytest.FixtureRequest, pools: Pools) -> str:
    """URL of a place in a store that nothing is in."""
    bucket = re.sub(r"[^a-z0-9]+", "-", request.node.originalname)
    pools(1).run(make_bucket, url := f"{request.param}://{bucket}")
    return f"{url}/run"


def into_environment(said: dict[str, str]) -> None:
    os.environ.update(said)


def make_bucket(url: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    files.mkdir(root)


@pytest.fixture
def saved(run: Runs) -> Path:
    """A checkpoint on the disk alone."""
    run("run", 1, None)
    return run.root / "run" / "checkpoints" / "step-000004"


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, store, **settings)"""
    common = {"optimizer__schedule": "constant", "train__max_steps": STEPS}

    def of(directory: Path, remote: str | None, **settings: Any) -> list[str]:
        settings = {"output__remote": remote, "output__save_every": 1, **common, **settings}
        return words(directory, "blocks", **settings)

    return of


def stored(url: str) -> dict[str, bytes]:
    """What a store holds, by path below the URL."""
    files, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def damage(url: str, path: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    content = files.cat_file(f"{root}/{path}")
    files.pipe_file(f"{root}/{path}", content[:-1] + bytes([content[-1] ^ 1]))


def forget(url: str, path: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    files.rm(f"{root}/{path}")


def test_a_run_goes_on_from_the_store(pools: Pools, run: Runs, tmp_path: Path, store: str) -> None:
    [whole], wanted = run("whole", 1, None, train__max_steps=6)
    run("first", 1, store)
    [held] = pools(1).run(stored, store)
    assert held["latest"] == b"step-000004\n"
    for name in ("checkpoints/step-000003", "checkpoints/step-000004", "adapter"):
        local = tmp_path / "first" / name
        for path in local.iterdir():
            assert held[f"{local.name}/{path.name}"] == path.read_bytes()
    there = {"adapter", "latest", "step-000003", "step-000004"}
    assert {name.partition("/")[0] for name in held} == there

    [again], lines = run("second", 1, store, train__max_steps=6)
    assert same_bits(again["tensors"], whole["tensors"])
    assert lines == wanted[4:]


def test_what_is_damaged_or_torn_there_is_passed_over(
    pools: Pools, run: Runs, tmp_path: Path, store: str
) -> None:
    _, wanted = run("first", 1, store, output__keep_last=3)
    pools(1).run(damage, store, "step-000004/optimizer.safetensors")
    pools(1).run(forget, store, "step-000003/manifest.json")
    [(_, printed)], lines = run("second", 1, store, work=told)
    assert f"skipping a checkpoint of {store}: " in printed
    assert "does not match its SHA-256" in printed
    assert "resuming after step 2" in printed
    assert lines == wanted[2:]
    verify(tmp_path / "second" / "checkpoints" / "step-000004")


def test_the_disk_goes_before_the_store_where_it_is_newer(run: Runs, store: str) -> None:
    run("run", 1, store, train__max_steps=2)
    run("run", 1, None, train__max_steps=3)
    [(_, printed)], _ = run("run", 1, store, work=told)
    assert "resuming after step 3" in printed


def test_another_run_s_checkpoints_are_set_aside_there_too(
    pools: Pools, run: Runs, store: str
) -> None:
    run("first", 1, store)
    run("second", 1, store, output__resume="none", train__max_steps=1)
    [held] = pools(1).run(stored, store)
    found = {name.rpartition("/")[0] for name in held} - {""}
    assert found == {"adapter", "step-000001", "old-1/step-000003", "old-1/step-000004"}


def warned(argv: list[str]) -> tuple[int, str]:
    """The status of a run, and its warnings."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = train(argv)["status"]
    return status, said.getvalue()


def test_a_store_that_cannot_be_written_does_not_end_the_run(run: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    url = f"file://{tmp_path}/file/run"
    [(status, said)], _ = run("run", 1, url, work=warned, train__max_steps=2)
    assert status == 0
    assert "step-000002 could not be copied to file://" in said
    verify(tmp_path / "run" / "checkpoints" / "step-000002")
    assert (tmp_path / "run" / "adapter").is_dir()


def put_until(files: int, directory: Path, url: str, error: BaseException) -> RemoteCheckpoints:
    """A rank that copies a checkpoint, to which `error` happens after so many of its files."""
    store = RemoteCheckpoints(url)
    whole, copied = store._files.put_file, []

    def put_file(*words: str) -> None:
        if len(copied) == files:
            raise error
        copied.append(whole(*words))

    store._files.put_file = put_file  # an attribute of the instance, which fsspec keeps
    try:
        store.put(directory)
    except type(error) as met:
        assert met.args == error.args
    finally:
        del store._files.put_file
    return store


def put_by_two(directory: Path, url: str) -> list[int]:
    """The steps there, where a second rank that copies the same one is ended at its first file."""
    RemoteCheckpoints(url).put(directory)
    return [step for step, _ in put_until(0, directory, url, KeyboardInterrupt()).steps()]


def test_what_a_survivor_has_completed_stays(pools: Pools, saved: Path, store: str) -> None:
    """All survivors of a lost rank copy the same step, and Ray ends them seconds later."""
    assert pools(1).run(put_by_two, saved, store) == [[4]]


def put_at_once(directory: Path, url: str) -> list[str]:
    """What is there after another survivor has completed its copy while this one was copying."""
    this, other = RemoteCheckpoints(url), RemoteCheckpoints(url)
    arrived, manifest = this._see_arrived, Path(f"{other._root}/{directory.name}/{MANIFEST}")

    def seen(file: Path, path: str) -> None:
        arrived(file, path)
        if file.name == MANIFEST and not manifest.exists():
            other.put(directory)
            manifest.chmod(0o400)  # so that it shows whose copy stays

    this._see_arrived = seen  # type: ignore[method-assign]
    this.put(directory)
    assert manifest.stat().st_mode & 0o777 == 0o400
    return sorted(stored(url))


def test_of_two_copies_the_first_stays(pools: Pools, saved: Path, tmp_path: Path) -> None:
    """A survivor that removed it may be ended before it has put its own in its place."""
    wanted = sorted(f"step-000004/{file.name}" for file in saved.iterdir())
    assert pools(1).run(put_at_once, saved, f"file://{tmp_path}/stored/run") == [wanted]


def put_torn(directory: Path, url: str) -> list[int]:
    """The steps there, after the first rank of all was ended while it copied, and a new start."""
    first = put_until(1, directory, url, KeyboardInterrupt())
    before = stored(url)
    first.fetch(directory.parent / "elsewhere", 0, print)  # a look at it: another run may copy
    assert stored(url) == before
    first.set_aside(0)
    assert not [path for path in first._files.ls(url.rpartition("/")[0]) if ".tmp" in str(path)]
    return [step for step, _ in first.steps()]


def test_what_is_half_copied_is_no_checkpoint(
    pools: Pools, saved: Path, tmp_path: Path, store: str
) -> None:
    for url in (store, f"file://{tmp_path}/stored/run"):
        assert pools(1).run(put_torn, saved, url) == [[]]
        assert pools(1).run(put_by_two, saved, url) == [[4]]


def put_where_it_fails(directory: Path, url: str) -> list[str]:
    """What is there after the place was full at the third file."""
    put_until(2, directory, url, OSError(errno.ENOSPC, "No space left on device"))
    return sorted(stored(url))


def test_of_a_copy_that_fails_nothing_stays(pools: Pools, saved: Path, tmp_path: Path) -> None:
    """It would take the room of the next, and of what is saved on the same disk."""
    assert pools(1).run(put_where_it_fails, saved, f"file://{tmp_path}/stored/run") == [[]]


def put_again(directory: Path, url: str) -> list[str]:
    """What is there of a directory without a manifest that was put twice, with other content."""
    RemoteCheckpoints(url).put(directory)
    (directory / "file").write_text("changed")
    RemoteCheckpoints(url).put(directory)
    return sorted(f"{name}: {content.decode()}" for name, content in stored(url).items())


def test_what_is_put_again_takes_the_place_of_the_first(
    pools: Pools, tmp_path: Path, store: str
) -> None:
    """As the adapter of a run that goes on."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    for url in (store, f"file://{tmp_path}/stored"):
        (directory / "file").write_text("first")
        assert pools(1).run(put_again, directory, url) == [["adapter/file: changed"]]


def fetched(url: str, endpoint: str | None, directory: Path) -> str:
    """What a store that answers at `endpoint` says to somebody who looks for a checkpoint."""
    known = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint or known
    S3FileSystem.clear_instance_cache()
    try:
        RemoteCheckpoints(url).fetch(directory, 0, print)
    except (TransientError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ["AWS_ENDPOINT_URL"] = known
        S3FileSystem.clear_instance_cache()
    return ""


def test_a_store_that_does_not_answer_is_not_the_user_s_mistake(
    pools: Pools, tmp_path: Path
) -> None:
    """2 would be the end of a run that a cluster starts again."""
    [said] = pools(1).run(fetched, "s3://bucket/run", "http://127.0.0.1:9", tmp_path)
    assert said.startswith("TransientError: output.remote: s3://bucket/run cannot be read: ")
    assert "\n" not in said


def test_an_unknown_store_is_refused(command: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"output\.remote: carrier-pigeon://loft: "):
        parse(command(tmp_path / "run", "carrier-pigeon://loft"), "dlora.train")


def test_no_secret_is_written(run: Runs, tmp_path: Path) -> None:
    """Also where the store says no, which a message of its own tells."""
    url = "s3://there-is-no-such-bucket/run"
    [(status, said)], _ = run("run", 1, url, work=warned, train__max_steps=2)
    assert status == 0
    assert f"step-000002 could not be copied to {url}" in said
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert SECRET not in said and len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
