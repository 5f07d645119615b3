"""A plain LoRA, or a merged model, from an adapter or a checkpoint: `python -m dlora.export`."""
