"""dlora inside other libraries' loops: one optional file for each library.

    transformers.py  Trainer        trl.py        SFT, DPO, KTO, Reward, GRPO
    accelerate.py    prepare        lightning.py  a strategy        loop.py  loops written by hand

Each file imports its library at its top, so this package imports none of them. What they share:

    prepared.py     adapters, shards and their replica, as far as the caller has not made them
    one_step.py     one reduction per optimizer step, the clip, and a loss scaler around them
    adapter.py      the adapter in a directory: PEFT's files, and the training form where it differs
    whole_state.py  an optimizer's `state_dict()` that is whole, whatever ranks divide among them
    reference.py    the model with its adapters off, as the reference of preference training
    stored.py       nested states and random states as safetensors files
"""
