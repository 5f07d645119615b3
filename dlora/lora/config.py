"""`LoraConfig`: which modules get an adapter, and of what size. Names and meanings are PEFT's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dlora.errors import UsageError
from dlora.lora.init import INITS
from dlora.lora.peft_arguments import PeftArguments
from dlora.lora.tasks import AUTO, TASKS
from dlora.registry import carries, check_options, option


@dataclass(frozen=True)
@carries("lora.init")
class LoraConfig(metaclass=PeftArguments):
    """A low-rank update ΔW = s·B·A of each target weight W0 [m, n], with A [r, n] and B [m, r].

    Args:
        r: LoRA rank, at least 1.
        lora_alpha: α. The scale is s = α/r, or α/√r with `use_rslora`.
        lora_dropout: probability with which an element of the adapter's input is zeroed, in [0, 1).
        target_modules: `"all-linear"` (every linear layer but the output head), a list of module
            names (a name matches a module whose path is it or ends with `.name`), or a regular
            expression that must match a module's whole path.
        exclude_modules: names, or a regular expression, of modules that get no adapter although
            `target_modules` means them.
        layers_to_transform, layers_pattern: the numbers of the blocks that get adapters, and the
            names of the lists that they count in (`layers`; None: the first number of a path
            counts). `target_modules` is a list then, in which a whole path always means its
            module.
        use_rslora: rank-stabilised scale, https://arxiv.org/abs/2312.03732.
        use_dora: a trained magnitude for each row of W0 + ΔW, https://arxiv.org/abs/2402.09353.
        init_lora_weights: how A and B start, by the name of a file in `dlora.lora.init`; `True` is
            A Kaiming-uniform and B zero.
        rank_pattern, alpha_pattern: regular expression → r or α for the modules whose path matches
            `(.*\\.)?(expression)$`; the first match in the order given wins.
        target_parameters: names of parameters, matrices or stacks of matrices such as the weights
            of experts, that get an A and a B for each matrix (a name matches a parameter whose path
            is it or ends with `.name`).
        modules_to_save: modules trained whole, in a float32 copy beside the frozen original: those
            whose path ends with one of these names (`norm` is `input_layernorm` too, as in PEFT).
            They get no adapter.
        task_type: what the model is for, see `dlora.lora.tasks`. For sequence and token
            classification and question answering its head is one of `modules_to_save`. `"auto"`:
            by the model's class; None: no task, so that no head is trained unasked.
        strict_names: a name or an expression that matches nothing is an error. Those in PEFT's
            files need not match: its loader ignores them.

    PEFT's further arguments are taken where they ask for nothing, and refused by name elsewhere
    (`dlora.lora.peft_arguments`). Where defaults differ from PEFT's: docs/own_loop.md.

    The options of the initialisations, such as `lora_ga_gamma`, are fields too. The bounds of r
    and α keep arithmetic finite also for adapters from unknown sources.

    Raises:
        UsageError: a value is out of range; the message names the field.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    method: ClassVar[str] = "lora"  # names the adapter's form, see `dlora.lora.variants`

    r: int = option(16, "LoRA rank: A is r x in, B is out x r", ge=1, le=65536)
    lora_alpha: int | float = option(
        32, "the update is scaled by lora_alpha / r", gt=0, le=1099511627776.0
    )
    lora_dropout: float = option(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = option(
        "all-linear", "all-linear, a list of names, or a regular expression"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = option(False, "weight-decomposed LoRA: a trained magnitude per output")
    exclude_modules: str | list[str] | None = option(
        None, "modules that get no adapter, of those that target_modules means"
    )
    layers_to_transform: int | list[int] | None = option(
        None, "only the blocks with these numbers, of a target_modules that is a list", ge=0
    )
    layers_pattern: str | list[str] | None = option(
        None, "names of the lists that layers_to_transform counts in; null: any"
    )
    init_lora_weights: bool | str = option(
        True,
        "true: A is Kaiming-uniform and B zero; pissa, milora: from W0; lora_ga: from its gradient",
        room="lora.init",
    )
    rank_pattern: dict[str, int] = option(
        {}, "r by module name or regular expression", ge=1, le=65536
    )
    alpha_pattern: dict[str, int | float] = option(
        {}, "lora_alpha by module name or regular expression", gt=0, le=1099511627776.0
    )
    modules_to_save: list[str] = option([], "modules trained and saved in full")
    target_parameters: list[str] = option(
        [], "names of parameters to adapt, such as mlp.experts.gate_up_proj"
    )
    task_type: str | None = AUTO
    strict_names: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        if not (self.target_modules or self.modules_to_save or self.target_parameters):
            raise UsageError("target_modules: is empty, so nothing would be trained")
        patterns = [("rank_pattern", key) for key in self.rank_pattern]
        patterns += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(self, name), str):
                patterns.append((name, expression))
        lists = self.layers_pattern or []
        lists = [lists] if isinstance(lists, str) else lists
        patterns += [("layers_pattern", expression) for expression in lists]
        for name, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"{name}: {pattern!r} is not a regular expression: {error}"
                ) from None
        if self.task_type not in (AUTO, None, *TASKS):
            raise UsageError(
                f"task_type: expected one of {', '.join(TASKS)}, got {self.task_type!r}"
            )
        self._check_layers()
        self._check_form()

    @property
    def variant(self) -> str:
        """The adapter's form, by its name in `dlora.lora.variants`."""
        return "dora" if self.use_dora else self.method

    def _check_form(self) -> None:
        if self.use_dora and self.method != "lora":
            raise UsageError(f"use_dora: DoRA needs a plain LoRA, not {self.method}")
        if self.init_lora_weights is not True and self.method != "lora":
            raise UsageError(f"init_lora_weights: {self.method} has its own initialisation")
        if self.target_parameters:
            self._check_parameters()
        for r in {self.r, *self.rank_pattern.values()}:
            if problem := INITS[self.init_lora_weights].check(r):
                raise UsageError(f"init_lora_weights: {problem}")

    def _check_parameters(self) -> None:
        """As in PEFT: W0 + ΔW is one weight there, so nothing acts on an input or an output."""
        if self.lora_dropout:
            raise UsageError(
                f"lora_dropout: {self.lora_dropout} cannot act on target_parameters, whose ΔW is "
                "part of the weight; set it to 0"
            )
        form = "dora (use_dora)" if self.use_dora else self.method
        if form != "lora":
            raise UsageError(f"target_parameters: need a plain LoRA, not {form}")
        if (
            INITS[self.init_lora_weights].needs != "nothing"
            or self.init_lora_weights == "orthogonal"
        ):
            raise UsageError(
                f"target_parameters: {self.init_lora_weights} is no start for them; set "
                "init_lora_weights: true, or gaussian"
            )

    def _check_layers(self) -> None:
        if self.layers_to_transform is None and self.layers_pattern is not None:
            raise UsageError("layers_pattern: cannot act without layers_to_transform")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UsageError("layers_to_transform: needs a target_modules that is a list of names")

    def for_steps(self, total_steps: int) -> LoraConfig:
        """These settings for a run of `total_steps` optimizer steps."""
        return self

    def r_for(self, path: str) -> int:
        """The LoRA rank of the module at `path`."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha_for(self, path: str) -> float:
        """α of the module at `path`."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def shapes_for(self, path: str, kernel: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of the adapter class for the module at `path`, beside m, n and r.

        Args:
            kernel: sizes of a convolution's kernel; empty for a product.
        """
        return {}

    def check_kernels(self, kernels: list[tuple[int, ...]]) -> None:
        """Raise a `UsageError` if an option on kernels can act on none of the adapted modules."""

    def scaling_for(self, path: str) -> float:
        """s = α/r, or α/√r with `use_rslora`, of the module at `path`."""
        r = self.r_for(path)
        return self.alpha_for(path) / (math.sqrt(r) if self.use_rslora else r)


def _first_match(pattern: Mapping, path: str, default):
    """PEFT's rule (`get_pattern_key`): the first expression that ends the path decides."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", path):
            return value
    return default
