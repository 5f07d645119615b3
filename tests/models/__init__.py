"""Every architecture of transformers, tiny and random, through dlora: docs/models.md."""
