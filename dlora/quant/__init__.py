"""Packed weights and layers that compute with them, on whole plain tensors; no process groups."""
