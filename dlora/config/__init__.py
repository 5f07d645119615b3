"""The options of dlora: typed, strict, readable without torch.

strict_yaml.py   a file as keys, values, lines    sources.py   the command line and its file
options.py       one option: type, default, help  sections.py  a dataclass for each section
validate.py      what options must be together    load.py      all of it: `parse`, `load`
"""
