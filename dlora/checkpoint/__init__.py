"""Checkpoints: their files, the host copy that becomes one, and copies in remote stores."""
