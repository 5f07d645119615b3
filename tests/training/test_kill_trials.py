"""Some of the trials of `kill_trials.py`, which makes as many as one likes."""

import pytest
from kill_trials import Trials
from sampling import full


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("trials"))


# 5 s each: LoRA and AdaLoRA under FSDP2; the others are of other placements
@pytest.mark.parametrize("seed", [0, 1, full(2), full(3), full(4)])
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(trials: Trials, seed: int) -> None:
    print(trials.run(seed))
