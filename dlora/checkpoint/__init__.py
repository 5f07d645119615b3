"""Checkpoints: their files, the host copy that becomes one, and copies in remote stores.

format.py     the directory of a checkpoint     host_copy.py  what is copied off the device
state.py      its record: adapter, data, base   remote.py     copies in fsspec's stores
"""
