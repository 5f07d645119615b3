"""Packed weights, and the layers that compute with them, on whole plain tensors."""
