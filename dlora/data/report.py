"""What loading a data set has to say in the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dlora.data.remarks import clauses


@dataclass(frozen=True, slots=True)
class Report:
    """Statistics of a source's records. Lengths and targets are tokens of what was kept."""

    records: int
    kept: int
    dropped: int  # no target left within max_length
    shortened: int  # some of the targets cut off at max_length
    targets: int
    longest: int
    max_length: int
    skipped: int = 0  # beside the records above: what data.on_error: skip left out
    first_fault: str = ""
    most: int | None = None  # the first so many records were read
    # See `Remarks`, of the records above; `ends` are the tokens that end an answer.
    ignored: Mapping[str, int] = field(default_factory=dict)
    control_tokens: Mapping[str, int] = field(default_factory=dict)
    left_out_thinking: int = 0
    ends: Sequence[int] = ()

    def __str__(self) -> str:
        first = "the first " if self.most else ""
        remarks = clauses(self.ignored, self.control_tokens, self.left_out_thinking)
        return (
            f"{first}{self.records} records: {self.kept} kept with {self.targets} target tokens, "
            f"the longest has {self.longest} tokens; max_length {self.max_length} dropped "
            f"{self.dropped} (no answer left) and shortened "
            f"{self.shortened}{self._said_of_faults()}{''.join(f'; {each}' for each in remarks)}"
        )

    def _said_of_faults(self) -> str:
        if not self.skipped:
            return ""
        return f"; {self.skipped} more skipped (data.on_error), the first: {self.first_fault}"
