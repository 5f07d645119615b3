"""The closing table of a run: measured against planned."""

import re

BOUNDS = {"wire": 0.02, "W0": 0.05, "A, B": 0.05, "peak": 0.15}  # by how a label begins


def check_plan_was_kept(printed: str, *labels: str) -> None:
    """Bytes within 2 %, W0 and adapter memory within 5 %, the peak within 15 %.

    Args:
        printed: by a run.
        labels: those that count; all of them where none is named.
    """
    table = printed[printed.rindex("planned") :]
    for label in labels or BOUNDS:
        row = re.search(rf"^.*{label}.*?([\d.]+)\s*$", table, re.M)
        assert row is not None, printed
        ratio = float(row[1])
        if not (label == "W0" and ratio == 0):  # measured where nothing is sharded
            assert abs(ratio - 1) <= BOUNDS[label], (label, printed)
