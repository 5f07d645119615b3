"""Mathematics: adapters on whole plain tensors. Knows torch, and nothing of process groups."""
