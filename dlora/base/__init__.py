"""The frozen base W0: its files, its skeleton without weights, and each rank's share of it.

source ← weight_files ← reader ← packed_reader ← model ← identity: each file imports only those to
its left. `gguf.py` converts a .gguf file once; `quantize.py` packs a model that is in memory.
"""
