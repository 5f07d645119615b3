"""One run, from its start-up to its last checkpoint; `dlora/train.py` is the loop in its middle.

startup → find_checkpoint → prepare (checks, check_resume) → build → resume → the loop, with
checkpointing, watchdogs and evaluate beside it.
"""
