"""A plain LoRA, or a merged model, from an adapter or a checkpoint: `python -m dlora.export`."""

from dlora.export.command import main

__all__ = ["main"]
