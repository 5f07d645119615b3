"""Records → conversations → token sequences → steps → micro-batches, in this order.

files.py     finds files and data sets        kinds/       reads them, one file for each kind
columns.py   renames their columns            builtin.py   a data set every machine has
formats/     a record as a conversation       chat.py      a conversation as text, with its answers
render.py    either, and plain texts          remarks.py   what is said of records
pairs.py     two answers to a prompt, as one example of two sequences
stops.py     what ends a generated answer     report.py    what is said of a data set
encode.py    text as ids and labels           dataset.py   all of it: `load_examples`
sampler.py   the order, and the dealing       stream.py    both for what does not fit memory
collate.py   tensors                          batches.py   micro-batches, made ahead
dealing.py   micro-batches of ranks              cache.py     what was encoded before

Nothing here knows of ranks beyond their number: every rank has the same data set and takes its
own part of every step.
"""

from dlora.data.dataset import Dataset, load_examples
from dlora.data.dealing import Dealing
from dlora.data.encode import NO_TARGET, Example
from dlora.data.formats import FORMATS
from dlora.data.reading import check_source
from dlora.data.report import Report
from dlora.data.sampler import Sampler, batch_hash, deal

__all__ = [
    "FORMATS",
    "NO_TARGET",
    "Dataset",
    "Dealing",
    "Example",
    "Report",
    "Sampler",
    "batch_hash",
    "check_source",
    "deal",
    "load_examples",
]
