"""How good a model is on texts that it was not trained on: losses, scores of answers, tasks.

inference.py   eval mode                       held_out.py   Σ loss / Σ tokens over all ranks
answers.py     greedy answers, dealt over ranks  references.py  prompts with what is wanted
metrics.py     scores of answers, by the field's libraries
harness.py     the model as lm-eval sees it    tasks.py      its tasks, from local files
opened.py      a base with an adapter, on all ranks          command.py    `dlora eval`

A model is what `forward` and `generate` make of it: nothing here knows where W0 is stored.
"""
