"""Several adapters on one base: compose, swap, route.

compose.py      `dlora compose`                      command.py    `dlora library`
stored.py       an adapter's files as matrices       store.py      a library of adapters on disk
same_base.py    whether adapters have one base       index.py      its index, versions and history
composition.py  the mix, matrix by matrix            objects.py    its files
mixtures.py     the formulas                         describe.py   what it records of a run
result.py       the files of the composed adapter    difference.py two adapters side by side
low_rank.py     the best B·A of a matrix             search.py     weights that suit examples
place.py        a name, or a directory

extract.py    `dlora extract`          compress.py    `dlora compress`
changes.py    what a fine-tune changed compressed.py  the files of a low-rank model
units.py      how tensors are taken    dealt.py       matrices dealt over ranks
extracted.py  the files of its adapter
"""
