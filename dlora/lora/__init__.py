"""The mathematics of adapters, on whole plain tensors; it knows torch, and no process groups."""
