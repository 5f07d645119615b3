"""Distribution: where W0 lives, and the replica of what is trained. Knows nothing of LoRA."""
