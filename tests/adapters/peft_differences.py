"""What comes out otherwise than in PEFT, and what needs named adapters; `peft_refusals.py` has what
is refused. `docs/beside_peft.md` shows these tables; `rows` renders them.
"""

from dataclasses import dataclass

from peft_refusals import REFUSED


@dataclass(frozen=True)
class Difference:
    """Attributes: the case; what PEFT does; what dlora does; the reason."""

    what: str
    in_peft: str
    here: str
    why: str


DIFFERENCES: dict[str, Difference] = {
    "the model": Difference(
        "the model",
        "is wrapped in a `PeftModel`, its layers in `lora.Linear`",
        "stays the object that it was, and its layers too: `AdaptedLinear` is an `nn.Linear`",
        "names of W0, hooks and wrapping policies go on working",
    ),
    "state_dict": Difference(
        "`state_dict()`",
        "has `base_model.model.up.base_layer.weight`",
        "has `up.weight`, and `up.adapter.lora_A` beside it",
        "a base checkpoint loads as before; files have PEFT's keys",
    ),
    "seed": Difference(
        "A from a seed",
        "draws A and B, then draws A again",
        "draws A once, from the same distribution",
        "B starts at 0 in both",
    ),
    "dropout": Difference(
        "`lora_dropout` in training",
        "has masks of torch's generator",
        "has masks of its own; none in eval mode, as in PEFT",
        "a sequence has its mask on any number of ranks",
    ),
    "half": Difference(
        "a base in float16 or bfloat16",
        "computes x·A·B in float32 and rounds the sum",
        "computes all in the base's dtype; A, B and their gradients are float32 in both",
        "half the memory traffic; the outputs differ by rounding",
    ),
    "saved in half": Difference(
        "`modules_to_save` of such a base",
        "trains a copy in the base's dtype",
        "trains a float32 copy",
        "small steps are not rounded away",
    ),
    "unmerge in half": Difference(
        "unmerging such a base",
        "subtracts ΔW, which leaves rounding in W0",
        "puts W0 back, bit for bit",
        "W0 is never rewritten; it costs a copy meanwhile",
    ),
    "tied": Difference(
        "merging one of two tied weights",
        "changes both, so the output changes",
        "changes the adapted one alone",
        "a merged model computes what it did before",
    ),
    "pixels": Difference(
        "merging a 3-d convolution of size 1",
        "fails",
        "merges",
        "ΔW is one product for every kernel",
    ),
    "safe merge": Difference(
        "merging what is not finite",
        "raises with `safe_merge=True` alone",
        "raises always, before anything is merged",
        "nothing is broken silently",
    ),
    "disabled": Difference(
        "`disable_adapter()` of a merged model",
        "unmerges it, and leaves it so",
        "is refused: unmerge first",
        "a context leaves the model as it was",
    ),
    "unload": Difference(
        "`merge_and_unload()`, `unload()`",
        "return the base",
        "are refused",
        "adapters stay; `merge_adapter()` merges in place, `dlora export --merge` into files",
    ),
    "unknown name": Difference(
        "a name that matches nothing, beside one that does",
        "is ignored",
        "is ignored with a warning; `dlora.LoraConfig` refuses it",
        "a typing error is seen",
    ),
    "saved alone": Difference(
        "`modules_to_save` without a target",
        "is refused",
        "is trained",
        "PEFT's own file format has a word for it",
    ),
    "sparse": Difference(
        "an embedding with `sparse=True`",
        "fails in backward",
        "has dense gradients of A",
        "A is as dense as the update",
    ),
    "all-linear": Difference(
        "`all-linear` around an `nn.MultiheadAttention`",
        "trains an adapter of `out_proj` without effect",
        "leaves it alone, with a warning",
        "nothing is trained in vain",
    ),
    "patterns": Difference(
        "`rank_pattern` with keys that overlap, in the file",
        "sorts the keys, so that another one may come first: PEFT's file does not load",
        "keeps their order",
        "the first match counts",
    ),
    "embedding copies": Difference(
        "the file of an adapted `embed_tokens`",
        "has a copy of W0",
        "has none; a copy in PEFT's file is compared with the base",
        "W0 is never saved",
    ),
    "pickle": Difference(
        "`save_pretrained(safe_serialization=False)`",
        "writes a pickle",
        "is refused",
        "nothing is pickled",
    ),
    "keyword": Difference(
        "a layer that the model calls as `layer(input=x)`",
        "fails once it is adapted",
        "works as before",
        "it is the layer's own argument",
    ),
}

# Calls of PEFT's tests that need several adapters in one model, with what each says until then.
SEVERAL: dict[str, tuple[str, str]] = {
    "`get_peft_model(model, config, name)`, `add_adapter(name, config)`": (
        "`attach(model, config, name)`, before or after `shard`",
        "add_adapter",
    ),
    "`merge_adapter([name, …])`": ("`activate`, then `merge`", "merge_adapter"),
    "`add_weighted_adapter(…)`": (
        "`activate(model, [name, …])`, the sum of the updates",
        "add_weighted_adapter",
    ),
}


def rows() -> list[str]:
    """The rows of the page's tables, in their order."""
    found = [f"| {d.what} | {d.in_peft} | {d.here} | {d.why} |" for d in DIFFERENCES.values()]
    found += [f"| {r.shown} | `{r.key}` | {r.why} |" for r in REFUSED]
    return [*found, *(f"| {call} | {ours} |" for call, (ours, _) in SEVERAL.items())]
