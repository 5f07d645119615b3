"""Files that are whole or absent: atomic writes, and safetensors read and written by blocks."""
