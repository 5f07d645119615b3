"""The frozen base W0: its files, its skeleton without weights, and each rank's share of it.

source ← weight_files ← stored_base ← reader ← packed_reader ← loading ← model: each file imports
only those to its left. `gguf.py` converts a .gguf file once; `quantize.py` says which layers are
packed; `identity.py` tells one base from another.
"""
