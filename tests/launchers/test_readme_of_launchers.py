"""What launchers/README.md says to type is understood, and it names every option there is."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from dlora.config.load import parse
from launchers.argv import spelled
from launchers.ray_submit import EXCLUDED, Submission, check_packed, forwarded
from launchers.ray_sweep import Sweep, read_space
from launchers.ray_train import Workers, check_options, place_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "launchers/README.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
EXTRAS = {"ray_train": Workers, "ray_submit": Submission, "ray_sweep": Sweep}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    scripts = [word for word in words if word.startswith("launchers/")]
    if scripts:
        assert (ROOT / scripts[0]).stat().st_mode & 0o111
        words = words[words.index(scripts[0]) + 1 :]
        assert parse(words, "launchers").config
        return
    module = words[2].removeprefix("launchers.")
    assert words[:2] == ["python", "-m"]
    options = parse(words[3:], words[2], EXTRAS[module])
    extra = options.extra
    if isinstance(extra, Submission):
        check_options(options.config, extra)
        place_of(options.config, extra, submitted=True)
        check_packed(options.config, forwarded(words[3:], ROOT), ROOT, EXCLUDED)
    if isinstance(extra, Sweep):
        read_space(extra.space)


def test_what_it_calls_an_option_is_one() -> None:
    known = {spelled(f.name) for cls in EXTRAS.values() for f in dataclasses.fields(cls)}
    named = set(re.findall(r"--([a-z][a-z-]+)(?![a-z.-])", README))
    others = {"config", "nodes", "gpus-per-node", "exclusive", "cpus-per-gpu", "signal", "batch"}
    assert named - others - known == set()
    assert {spelled(f.name) for f in dataclasses.fields(Workers)} - named == {"name"}
