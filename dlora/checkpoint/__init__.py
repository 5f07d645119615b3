"""Checkpoints: their files, the host copy that becomes one, and copies in remote stores.

format.py     a checkpoint's files, verified    host_copy.py  what is copied off the device
writing.py    one is written and given its name listing.py    which there are, the newest whole one
state.py      its record: adapter, data, base   remote.py     copies in fsspec's stores
"""
