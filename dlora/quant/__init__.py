"""Mathematics: packed weights on whole plain tensors. Knows torch, and nothing of adapters."""
