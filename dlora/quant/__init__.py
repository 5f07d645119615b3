"""Packed weights and layers that compute with them, on whole plain tensors. Knows no process group."""
