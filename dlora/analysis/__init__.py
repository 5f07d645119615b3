"""What an adapter learned: its updates beside W0, and beside those of another adapter.

command.py    `dlora analyse`               subspaces.py  formulas: similarity, projection
opened.py     an adapter with its base      leading.py    the largest singular triplets of W0
measured.py   the figures of one matrix     whole.py      modules that are trained whole
summary.py    by kind and by layer          pruned.py     what AdaLoRA kept
against.py    two adapters                  pictures.py   the plots
"""
