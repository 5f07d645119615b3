"""Some of the trials of `kill_trials.py`, which makes as many as one likes."""

import pytest
from kill_trials import Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(trials: Trials, seed: int) -> None:
    print(trials.run(seed))
