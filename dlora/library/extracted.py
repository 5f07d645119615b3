"""The result of an extraction: an adapter's files, and beside them what was made of each tensor."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlora.adapters.save_load import save_adapter
from dlora.base.answering import as_list, generation_settings, write_beside_adapter
from dlora.errors import UsageError
from dlora.io.files import write_atomically
from dlora.library.changes import Pair, told
from dlora.library.dealt import Parts
from dlora.library.units import Kind, Unit
from dlora.lora.attach import attach, named_adapters, named_copies
from dlora.lora.config import LoraConfig

RECORD = "extraction.json"


@dataclass
class Extracted:
    """What changed, by path in the model: the number of its part, and its record."""

    pair: Pair
    parts: Parts
    adapted: dict[str, int] = field(default_factory=dict)
    stacks: list[str] = field(default_factory=list)  # those of `adapted` that are parameters
    whole: dict[str, int] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # why
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)  # and the most it could be
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def gather(cls, pair: Pair, units: list[Unit], parts: Parts) -> Extracted:
        """Read what the ranks made of the units."""
        made = cls(pair, parts)
        for number, unit in enumerate(units):
            if not (record := parts.record(number)):
                continue
            made.records[unit.path] = record
            if unit.kind is Kind.NAMED:
                made.named[unit.path] = unit.why
            elif unit.kind is Kind.WHOLE:
                made.whole[unit.path] = number
            else:
                made._add(unit, number)
        made._leave_ambiguous()
        return made

    def lines(self) -> Iterator[str]:
        """What is stored, a line for each tensor, and what is not."""
        for path, (r, most) in self.ranks.items():
            energy = self.records[path]["energy"]
            yield f"{path}: rank {r} of {most}, energy {energy:.6g}, {self._told(path)}"
        for path in self.whole:
            yield f"{path}: stored whole (modules_to_save), {self._told(path)}"
        for path, why in self.named.items():
            yield f"{path}: NOT in the adapter, {self._told(path)}: {why}"

    def write(self, folder: Path) -> None:
        """Write the directory of the adapter."""
        skeleton, base = self.pair.base.skeleton, self.pair.base.base
        attach(skeleton, self._config())
        for path, _, adapter in named_adapters(skeleton):
            adapter.load_state_dict(self.parts.tensors(self.adapted[path]), assign=True)
        for path, _, copy in named_copies(skeleton):
            copy.load_state_dict(self.parts.tensors(self.whole[path]), assign=True)
        save_adapter(skeleton, folder, base_model_name_or_path=base.source)
        self._write_answering(folder)
        layers = {
            path: {"rank": r, "of": most, **self.records[path]}
            for path, (r, most) in self.ranks.items()
        }
        content = {
            "tuned": self.pair.tuned.base.path,
            "layers": layers,
            "whole": {path: self.records[path] for path in self.whole},
            "not in the adapter": {
                path: {**self.records[path], "why": why} for path, why in self.named.items()
            },
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / RECORD, text.encode())

    def _add(self, unit: Unit, number: int) -> None:
        tensors = self.parts.tensors(number)
        A, B, experts = tensors["lora_A"], tensors["lora_B"], 1
        if unit.kind is Kind.STACK:
            self.stacks.append(unit.path)
            experts = self.pair.base.shapes[unit.path][0]
        self.adapted[unit.path] = number
        self.ranks[unit.path] = (A.shape[0] // experts, min(A.shape[1], B.shape[0]))

    def _leave_ambiguous(self) -> None:
        """PEFT finds modules by the ends of their paths; those that mean others too are named."""
        paths = [path for path, _ in self.pair.base.skeleton.named_modules()]
        for path in list(self.whole):
            others = [p for p in paths if p.endswith(path) and p not in self.whole]
            if others:
                del self.whole[path]
                self.named[path] = f"PEFT's modules_to_save would mean {others[0]} too"

    def _told(self, path: str) -> str:
        return told(self.records[path])

    def _config(self) -> LoraConfig:
        usual = Counter(r for r, _ in self.ranks.values()).most_common(1)[0][0] if self.ranks else 1
        # A path also means what ends with it, and the first that matches counts.
        ordered = sorted(self.ranks, key=len, reverse=True)
        pattern = {p: self.ranks[p][0] for p in ordered if self.ranks[p][0] != usual}
        modules = [path for path in self.adapted if path not in self.stacks]
        return LoraConfig(
            r=usual,
            lora_alpha=usual,
            target_modules="|".join(map(re.escape, modules)) if modules else [],
            target_parameters=self.stacks,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            modules_to_save=self._names(),
        )

    def _names(self) -> list[str]:
        """The shortest names that mean the modules that are stored whole, and no others."""
        skeleton = self.pair.base.skeleton
        paths = [p for p, m in skeleton.named_modules() if p and any(True for _ in m.parameters())]
        last = {path.rpartition(".")[2] for path in self.whole}
        meant = {path for path in paths if path.endswith(tuple(last))}
        return sorted(last if meant == set(self.whole) else self.whole)

    def _write_answering(self, folder: Path) -> None:
        """Write the chat template and the ends of answers that the tuned model has of its own."""
        base, tuned = self.pair.base.base, self.pair.tuned.base
        ends = as_list(generation_settings(tuned).get("eos_token_id"))
        template, own = None, None
        with suppress(UsageError):  # weights alone can be extracted as well
            tokenizer, theirs = base.tokenizer(), tuned.tokenizer()
            template = getattr(theirs, "chat_template", None)
            if template and template != tokenizer.chat_template:
                tokenizer.chat_template = template
                own = tokenizer
        write_beside_adapter(folder, base, own, ends)
