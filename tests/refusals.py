"""What is refused: in one line, and before a weight is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlora.config.load import parse
from dlora.errors import UsageError
from dlora.runtime.ranks import Ranks
from dlora.training.prepare import Preparation
from dlora.training.startup import prepared


def refusal(call: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """The message with which `call` refuses: always one line."""
    with pytest.raises(UsageError) as refused:
        call(*args, **settings)
    message = str(refused.value)
    assert message and "\n" not in message
    return message


def preparation(argv: list[str], **options: Any) -> Preparation:
    """What one process prepares of a run, which reads no weights."""
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    return prepared(parse(argv, "dlora.train").config, ranks, **options)
