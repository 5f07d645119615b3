"""What records are read from: one file for each kind, a class with the members of `Kind`.

jsonl.py     one object a line (.jsonl, and any unknown name)    json_array.py  a list of objects
csv_table.py rows under a line of names    parquet.py  rows    saved.py  a directory of `datasets`
hub.py       a data set of the Hugging Face hub
"""

from dlora.data.kinds.kind import Faults, Kind, Place, Record
from dlora.registry import Parts

KINDS: Parts[Kind] = Parts("data.kinds")

__all__ = ["KINDS", "Faults", "Kind", "Place", "Record"]
