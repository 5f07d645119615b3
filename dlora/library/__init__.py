"""Adapters and low-rank models made of whole weights.

low_rank.py    the best B·A of a matrix      extract.py        `dlora extract`: its command and files
dealt.py       matrices dealt over ranks     difference.py     what a fine-tune changed of its base
compress.py    `dlora compress`              compressed.py     the files of a low-rank model
units.py       how tensors are taken         extracted.py      the files of an extraction
"""
