"""Which parameters of a sharded base are gathered together, and how often: the plan's arithmetic.

A group is what one `fully_shard` call manages. Per micro-batch it is gathered once for forward; if
it is freed after forward and a gradient flows through it, it is gathered again for backward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

FREE, KEEP = "free_full_weight", "keep_full_weight"  # transformers' names of the two reshard rules


@dataclass(frozen=True)
class Group:
    """One unit of gathering: its modules' paths, its parameters, and whether forward frees it."""

    paths: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    freed: bool

    def gathered_bytes(self, ranks: int) -> int:
        """Bytes of the gathered group; rows are padded so that every rank sends equally many."""
        return sum(
            -(-p.shape[0] // ranks) * ranks * (p.numel() // p.shape[0]) * p.element_size()
            for p in self.parameters
        )


def block_lists(model: nn.Module) -> list[str]:
    """Paths of the outermost `ModuleList`s (or `Sequential`s) of two or more alike blocks."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found):
            continue
        blocks = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1:
            alike = len({type(block) for block in blocks}) == 1
            if alike and all(any(True for _ in block.parameters()) for block in blocks):
                found.append(path)
    return found


def sharding_plan(skeleton: nn.Module) -> dict[str, str]:
    """transformers' plan for a model, completed with the blocks that it leaves out (GPT-2: all).

    Rules that match nothing are dropped. Keys are paths with `*` for an index.
    """
    plan: dict[str, str] = dict(getattr(skeleton, "fsdp_plan", None) or {})
    names = {_wildcard(path) for path, _ in skeleton.named_modules()}
    blocks = {f"{path}.*": FREE for path in block_lists(skeleton)}
    return {path: rule for path, rule in plan.items() if path in names} | blocks


def groups_of(skeleton: Any, plan: dict[str, str]) -> list[Group]:
    """The groups that `plan` makes of a model, in the order of the model, the root's first."""
    rules = _tied(skeleton, plan)
    listed = [
        (path, module, rules[_wildcard(path)])
        for path, module in skeleton.named_modules()
        if _wildcard(path) in rules
    ]
    taken: set[int] = set()
    groups = []
    # Inner modules first: an outer group holds what no inner one took.
    for path, module, rule in sorted(listed, key=lambda item: -item[0].count(".")):
        groups.append(Group((path,), _untaken(module.parameters(), taken), rule == FREE))
    root = Group(("",), _untaken(skeleton.parameters(), taken), freed=False)
    order = {path: index for index, (path, _) in enumerate(skeleton.named_modules())}
    return sorted([root, *groups], key=lambda group: order[group.paths[0]])


def _tied(skeleton: Any, plan: dict[str, str]) -> dict[str, str]:
    """A tied embedding and head are one weight: the head's rule moves to the embedding."""
    find_head = getattr(skeleton, "get_output_embeddings", lambda: None)
    find_embedding = getattr(skeleton, "get_input_embeddings", lambda: None)
    head, embedding = find_head(), find_embedding()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return plan
    paths = {id(module): path for path, module in skeleton.named_modules()}
    rules = {k: v for k, v in plan.items() if k not in (paths[id(head)], paths[id(embedding)])}
    if plan.get(paths[id(head)]) == KEEP:
        rules[paths[id(embedding)]] = KEEP
    return rules


def _untaken(parameters: Iterable[Tensor], taken: set[int]) -> tuple[Tensor, ...]:
    fresh = [p for p in parameters if id(p) not in taken]
    taken.update(map(id, fresh))
    return tuple(fresh)


def _wildcard(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
