"""Every architecture of transformers, tiny and random, through the whole of dlora: docs/models.md."""
