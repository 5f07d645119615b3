"""One run, from its start-up to its last checkpoint; `dlora/train.py` is the loop in its middle.

startup → find_checkpoint → prepare (checks, check_resume, earlier_placement) → build → resume →
the loop, with checkpointing, watchdogs and evaluate beside it → finish. `context.py` is what all of
them know of the run.
"""
