"""PEFT's files in and out, and the settings that go with them.

save_load.py     `save_adapter` and `load_adapter`       source.py    one on disk, module by module
peft_format.py   what PEFT's files have                  settings.py  settings in YAML and in PEFT's
peft_names.py    names and shapes of its tensors
open_adapter.py  PEFT's directory or a checkpoint        recorded.py  base, labels, how it answers
"""
