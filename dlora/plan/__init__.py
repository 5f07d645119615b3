"""Bytes before launch: what a placement costs, from names and shapes alone, and which one to take.

    config.json ── skeleton (meta) ──┬─ trace      activations, FLOPs     one pass on fake tensors
                                     ├─ gathers    what is gathered, how often
                                     ▼
         placement ──> Plan = Memory per rank + Traffic per step
                                     │
    none │ node │ world ── choose ───┴──> the cheapest that fits, with the layers that stay resident

`python -m dlora.plan --config FILE` prints it for any machines; a run plans the
same way before it reads a weight, and prints planned against measured at its end.
"""
