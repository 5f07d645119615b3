"""The parameters of a sharded base that are gathered together, and how often: arithmetic only.

    freed   once for forward, and once more for backward if a gradient gets there; per micro-batch
            the last block waits for its backward: once per micro-batch (FSDP2)
    kept    once per step, until the step ends
    held    once in the whole run: it is resident

A group is what one `fully_shard` call manages under FSDP2, and a module's own parameters under
ZeRO-3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

FREE, KEEP = "free_full_weight", "keep_full_weight"  # transformers' names of the two reshard rules


@dataclass(frozen=True)
class Group:
    """One unit of gathering.

    Attributes:
        path: of the module whose use gathers it.
        parameters: distinct ones, as they are on the meta device.
        freed: after each use; otherwise it is kept for the step.
        held: it is resident: it stays gathered after its first use.
        by_rows: each rank stores whole rows; otherwise a range of the flattened elements.
        recomputed: activation checkpointing gathers it once more per micro-batch.
        waits: it is freed after backward, and not between forward and backward.
    """

    path: str
    parameters: tuple[Tensor, ...]
    freed: bool
    held: bool = False
    by_rows: bool = True
    recomputed: bool = False
    waits: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(math.prod(_shape(p)) * p.element_size() for p in self.parameters)

    def gathered_bytes(self, ranks: int) -> int:
        """Bytes of the gathered group, padded so that every rank sends equally many."""
        nbytes = 0
        for parameter in self.parameters:
            shape = _shape(parameter)
            row = math.prod(shape[1:]) if self.by_rows else 1
            rows = -(-math.prod(shape) // row // ranks) * ranks
            nbytes += rows * row * parameter.element_size()
        return nbytes


def frozen_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups without what is trained, and so not sharded, and without those left empty."""
    kept = []
    for group in groups:
        frozen = tuple(p for p in group.parameters if not p.requires_grad)
        if frozen:
            kept.append(replace(group, parameters=frozen))
    return kept


def worth_holding(groups: Iterable[Group], model: nn.Module) -> list[Group]:
    """Groups in the order in which they are worth their memory; held ones are left out.

    Blocks save two gathers per micro-batch; one that waits saves one, as does what is freed outside
    of them (an embedding has no gradient to pass on), and what is kept saves one per step.
    """
    lists = tuple(f"{path}." for path in block_lists(model))
    return sorted(
        (group for group in groups if not group.held),
        key=lambda g: (not g.freed, g.waits or not g.path.startswith(lists)),
    )


def block_lists(model: nn.Module) -> list[str]:
    """Paths of the outermost `ModuleList`s (or `Sequential`s) of two or more alike blocks.

    Blocks of a `ModuleList` may be of different classes, if these are related.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found):
            continue
        blocks = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1:
            is_list = isinstance(module, nn.ModuleList)
            alike = len({type(block) for block in blocks}) == 1 or (is_list and _related(blocks))
            if alike and all(any(True for _ in block.parameters()) for block in blocks):
                found.append(path)
    return found


def _related(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks of different classes have a class in common that is more than a module.

    So have the layers of hybrid models, such as Jamba's with attention and those with Mamba.
    """
    common = set.intersection(*(set(type(block).__mro__) for block in blocks))
    return bool(common - set(nn.Module.__mro__))


def sharing_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of all lists; those that have a parameter in common are together (Zamba's)."""
    together: list[list[nn.Module]] = []
    owner: dict[int, list[nn.Module]] = {}
    for path in block_lists(model):
        for block in model.get_submodule(path).children():
            own = {id(parameter) for parameter in block.parameters()}
            group = next((owner[key] for key in own if key in owner), None)
            if group is None:
                together.append(group := [])
            group.append(block)
            owner |= dict.fromkeys(own, group)
    return together


def sharding_plan(skeleton: nn.Module) -> dict[str, str]:
    """transformers' plan for a model, completed with the blocks that it leaves out (GPT-2: all).

    Rules that match nothing are dropped. Keys are paths with `*` for an index.
    """
    plan: dict[str, str] = dict(getattr(skeleton, "fsdp_plan", None) or {})
    names = {_wildcard(path) for path, _ in skeleton.named_modules()}
    blocks = {f"{path}.*": FREE for path in block_lists(skeleton)}
    return {path: rule for path, rule in plan.items() if path in names} | blocks


def groups_of(skeleton: Any, plan: dict[str, str]) -> list[Group]:
    """The groups that `plan` makes of a model, in the order of the model, the root's first.

    Args:
        plan: {path, or path with `*` for an index: rule}.
    """
    rules = _tied(skeleton, plan)
    listed = [
        (path, module, rules[key])
        for path, module in skeleton.named_modules()
        for key in dict.fromkeys((path, _wildcard(path)))
        if key in rules
    ]
    taken: set[int] = set()
    groups = []
    # Inner modules first: an outer group has what no inner one took.
    for path, module, rule in sorted(listed, key=lambda item: -item[0].count(".")):
        groups.append(Group(path, _untaken(module.parameters(), taken), rule == FREE))
    root = Group("", _untaken(skeleton.parameters(), taken), freed=False)
    order = {path: index for index, (path, _) in enumerate(skeleton.named_modules())}
    return last_waits(sorted([root, *groups], key=lambda group: order[group.path]), skeleton)


def last_waits(groups: list[Group], model: nn.Module) -> list[Group]:
    """The groups, of which the last in the blocks waits for its backward, which begins with it."""
    lists = tuple(f"{path}." for path in block_lists(model))
    inside = [g for g in groups if g.parameters and lists and g.path.startswith(lists)]
    last = inside[-1] if inside else None
    return [replace(group, waits=group is last and group.freed) for group in groups]


def module_groups(skeleton: Any) -> list[Group]:
    """The groups of a model that is gathered module by module, its vectors held.

    What recomputation gathers is freed again before backward, except a block's last group.
    """
    kept = set(map(id, head_parameters(skeleton)))
    taken: set[int] = set()
    groups = []
    for path, module in skeleton.named_modules():
        own = _untaken(module.parameters(recurse=False), taken)
        for held in (False, True):
            parameters = tuple(p for p in own if is_vector(_shape(p)) is held)
            if parameters:
                freed = not held and id(parameters[0]) not in kept
                groups.append(Group(path, parameters, freed, held, by_rows=False))
    groups = frozen_groups(groups)
    lists = tuple(f"{path}." for path in block_lists(skeleton))
    blocks = [_block_of(group.path, lists) if group.freed else None for group in groups]
    last = dict(zip(blocks, groups, strict=True))  # the later ones take the place of the earlier
    return [
        replace(group, recomputed=block is not None and group is not last[block])
        for group, block in zip(groups, blocks, strict=True)
    ]


def _block_of(path: str, lists: Sequence[str]) -> str | None:
    """The block that `path` lies in."""
    for prefix in lists:
        if path.startswith(prefix):
            return prefix + path.removeprefix(prefix).partition(".")[0]
    return None


def is_vector(shape: Sequence[int]) -> bool:
    """Whether it is a norm or bias: a collective for it costs latency, and saves nothing."""
    return len(shape) < 2


def head_parameters(model: Any) -> list[Any]:
    """The output head's own parameters, where the model has such a head.

    It is used last in forward and first in backward: to free it between the two saves nothing.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [] if head is None else list(head.parameters(recurse=False))


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


def _shape(parameter: Any) -> Sequence[int]:
    """The whole shape: of a partitioned parameter DeepSpeed knows it, and the tensor does not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _untaken(parameters: Iterable[Tensor], taken: set[int]) -> tuple[Tensor, ...]:
    fresh = [p for p in parameters if id(p) not in taken]
    taken.update(map(id, fresh))
    return tuple(fresh)


def _wildcard(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
