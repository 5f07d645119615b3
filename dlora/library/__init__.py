"""Several adapters on one base: compose, swap, route.

extract.py    `dlora extract`          compress.py    `dlora compress`
changes.py    what a fine-tune changed compressed.py  the files of a low-rank model
units.py      how tensors are taken    low_rank.py    the best B·A of a matrix, and its energy
extracted.py  the files of its adapter dealt.py       matrices dealt over ranks
"""
