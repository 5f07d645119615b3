"""dlora inside other libraries' loops: one optional file for each library.

    transformers.py  Trainer        trl.py        SFT, DPO, KTO, Reward, GRPO
    accelerate.py    prepare        lightning.py  a strategy        loop.py  loops written by hand

Each file imports its library at its top, so this package imports none of them. What they share:

    one_step.py     one reduction per optimizer step, the clip, and a loss scaler around them
    adapter.py      the adapter in a directory: PEFT's files, and the training form where it differs
    whole_state.py  an optimizer's `state_dict()` that is whole, whatever ranks divide among them
"""
