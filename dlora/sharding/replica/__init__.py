"""A and B equal on every rank, whatever the engine: one flat buffer, one reduction, one audit."""
