"""Distribution: where W0 is stored, and the replica of what is trained. Knows nothing of LoRA.

[Note: roles of tensors]  docs/glossary.md has these and all other terms.

W0          the frozen weights of the base model: read-only, never trained, upcast, rewritten or
            saved.
shard       the part of W0 that one rank stores: rows of each parameter under FSDP2, a range of the
            flattened elements under ZeRO-3.
gathered    W0 of one module or block while it is whole on a rank: from just before its use until
            just after, or until the step ends.
resident    W0 of a layer that stays gathered after its first use, because there is memory for it.
A and B     the trained factors of an adapter, A [r, n] and B [m, r] in float32, whole on every
            rank; the update is ΔW = s·B·A.
offset      A0 and B0, a frozen copy of what A and B started as, where their product was not zero;
            −s·B0·A0 makes training start at ΔW = 0.
residual    W0 − s·B0·A0, which is packed in place of W0 where PiSSA or MiLoRA meet a packed base.
replica     all trained tensors of a model, plain, whole and bit-identical on every rank.
flat buffer one tensor in which the replica's values are laid end to end, and one for its gradients;
            parameters and `.grad` are views of them, so that a step takes one reduction.
presence    one number per trained tensor, reduced with the gradients: how many ranks had a gradient
            for it; with none, its `.grad` is None after the reduction.
tail        the scalars at the end of the same reduction: token counts, loss sums, flags.
owner       the rank that alone steps a unit of the optimizer's work, or stores one part of a
            divided tensor; the others receive the result.
snapshot    a copy of the trained tensors and their state after the last whole step, in a rank's
            host memory, from which any survivor can commit a checkpoint.
"""
