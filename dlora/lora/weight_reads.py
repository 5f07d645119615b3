"""Layers whose weight another module reads itself, past the layer's forward and so past an adapter.

    time_step = self.dt_proj.weight @ time_step          Mamba, Jamba
    F.multi_head_attention_forward(…, self.out_proj.weight, …)

Found in the source of every class of the model: an expression `self.path.weight`, or one through a
local name (`proj = self.path`), in a branch that the module's settings do not rule out. To read its
dtype, shape or device is no use of the values, and methods that only initialise are left out.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_OF_NO_VALUE = {"dtype", "device", "shape", "ndim", "size", "data", "is_cuda", "numel", "dim"}
_OF_NO_VALUE |= {"requires_grad", "requires_grad_", "copy_", "stride", "grad", "nbytes", "SCB"}
_OF_NO_VALUE |= {"div_", "mul_"}  # RWKV scales a weight in place
_PREDICATES = {"isinstance": isinstance, "hasattr": hasattr, "getattr": getattr, "len": len}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
}
_EACH = "*"  # in a path: each module of a list
_NOT_COMPUTING = ("__init__", "_init", "init_", "reset_", "extra_repr", "_reset", "tie_", "_tie")
# Base classes for all models, which know no layer of a model.
_GENERAL = ("transformers.modeling_utils", "transformers.generation", "torch.distributed")
# torch's fused encoder, which reads its layers' weights in eval mode, is switched off by `attach`.
_SWITCHED_OFF = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


@dataclass(frozen=True)
class Read:
    """Who reads the weight of a layer, and whether the layer is called as well.

    Attributes:
        reader: the name of the reading module's class.
        called: the reader calls the layer too, on some path through its code.
        whole: the weight is an argument of a call, as of a fused kernel that takes the place of
            the layer's own call.
    """

    reader: str
    called: bool
    whole: bool

    @property
    def bypasses(self) -> bool:
        """Whether an adapter of the layer has no effect, or none where a fused kernel is used."""
        return self.whole or not self.called


def weight_reads(model: nn.Module) -> dict[str, Read]:
    """{path of a layer: who reads its weight} of all layers of `model` that are read."""
    found: dict[str, Read] = {}
    for path, module in model.named_modules():
        kind: Any = type(module)
        if isinstance(module, _SWITCHED_OFF) or not _mentioned(kind):
            continue
        uses = _uses(kind, module)
        for inner in sorted(uses.read):
            name = type(module).__name__.removeprefix("FSDP")
            read = Read(name, inner in uses.called, inner in uses.whole)
            for layer in _modules_at(module, inner):
                found[f"{path}.{layer}" if path else layer] = read
    return found


def weights_asked_for(model: nn.Module) -> dict[str, str]:
    """{layer: the class that asks its weight for no values, such as its dtype}."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind: Any = type(module)
        if isinstance(module, _SWITCHED_OFF) or not _asking(kind):
            continue
        for inner in sorted(_uses(kind, module).asked):
            for layer in _modules_at(module, inner):
                found[f"{path}.{layer}" if path else layer] = kind.__name__
    return found


@functools.cache
def _asking(kind: type) -> frozenset[str]:
    """What the methods of a class ask a weight of in any branch."""
    return frozenset(_uses(kind, None).asked)


@functools.cache
def _mentioned(kind: type) -> frozenset[str]:
    """What the methods of a class read in any branch."""
    return frozenset(_uses(kind, None).read)


def _uses(kind: type, module: nn.Module | None) -> _Uses:
    """What the methods of a class read and call; with a module, without its dead branches."""
    uses = _Uses(module)
    for tree in _methods(kind):
        uses.visit(tree)
    return uses


@functools.cache
def _methods(kind: type) -> list[ast.AST]:
    """The syntax trees of the methods, if any of them mentions a weight."""
    functions, seen = [], set[str]()
    for owner in kind.__mro__:
        for name, member in vars(owner).items() if owner not in (nn.Module, object) else ():
            function = inspect.unwrap(member) if callable(member) else None
            if name in seen or not inspect.isfunction(function):
                continue
            seen.add(name)
            if not name.startswith(_NOT_COMPUTING) and not function.__module__.startswith(_GENERAL):
                functions.append(function)
    if not any("weight" in _names(function.__code__) for function in functions):
        return []
    return list(_trees(functions))


def _trees(functions: list[Any]) -> Iterator[ast.AST]:
    for function in functions:
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # no source, or one that is no whole function
            continue


def _names(code: Any) -> set[str]:
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    return set(code.co_names).union(*map(_names, inner))


class _Uses(ast.NodeVisitor):
    """Relative paths of the layers whose weight methods read, and of those that they call."""

    def __init__(self, module: nn.Module | None) -> None:
        self.read, self.called, self.whole = set[str](), set[str](), set[str]()
        self.asked = set[str]()  # for the dtype of a weight, say, which a packed layer has not
        self._module, self._aliases = module, dict[str, str]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._aliases = {}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign):
                self._name(inner.targets[0], self._path(inner.value))
            elif isinstance(inner, (ast.For, ast.comprehension)):
                target, members = _members(inner)
                each = self._path(members)
                self._name(target, each and f"{each}.{_EACH}")
        for statement in node.body:
            self.visit(statement)

    def _name(self, target: ast.expr, path: str | None) -> None:
        if isinstance(target, ast.Name) and path:
            self._aliases[target.id] = path

    def visit_If(self, node: ast.If) -> None:
        verdict = self._settled(node.test)
        self.visit(node.test)
        for part in node.body if verdict is not False else ():
            self.visit(part)
        for part in node.orelse if verdict is not True else ():
            self.visit(part)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        verdict = self._settled(node.test)
        self.visit(node.test)
        if verdict is not False:
            self.visit(node.body)
        if verdict is not True:
            self.visit(node.orelse)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_predicate(node):
            return
        if path := self._path(node.func):
            self.called.add(path)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if path := self._weight_of(argument):
                self.whole.add(path)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _OF_NO_VALUE and (path := self._weight_of(node.value)):
            self.asked.add(path)
            return
        if path := self._weight_of(node):
            self.read.add(path)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)

    def _settled(self, test: ast.expr) -> bool | None:
        """The value of a condition that the module's settings decide alone; else None."""
        if self._module is None:
            return None
        for node in ast.walk(test):
            if isinstance(node, ast.Call) and not _is_predicate(node):
                return None
            if isinstance(node, ast.Name) and node.id not in ("self", *_PREDICATES):
                return None
            if isinstance(node, ast.Attribute) and node.attr == "training":
                return None
        try:
            return bool(_value(test, self._module))
        except Exception:  # an attribute that is not there yet, or another kind of expression
            return None

    def _weight_of(self, node: ast.AST) -> str | None:
        """The path of `self.path.weight`."""
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            return self._path(node.value)
        return None

    def _path(self, node: ast.AST) -> str | None:
        """`a.b` of `self.a.b`, or of a local name for it."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id)
        if isinstance(node, ast.Subscript):
            before = self._path(node.value)
            return before and f"{before}.{_EACH}"
        if not isinstance(node, ast.Attribute):
            return None
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr
        before = self._path(node.value)
        return before and f"{before}.{node.attr}"


def _value(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression of a module's own attributes, constants and predicates.

    Raises:
        LookupError: it has something else in it.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, module), node.attr)
    if isinstance(node, ast.Subscript):
        return _value(node.value, module)[_value(node.slice, module)]
    if isinstance(node, ast.Tuple | ast.List):
        return [_value(item, module) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, module)
    if isinstance(node, ast.BoolOp):
        decide = all if isinstance(node.op, ast.And) else any
        return decide(_value(item, module) for item in node.values)
    if isinstance(node, ast.Compare):
        sides = [_value(side, module) for side in (node.left, *node.comparators)]
        pairs = zip(node.ops, sides, sides[1:], strict=False)
        return all(_COMPARISONS[type(op)](one, other) for op, one, other in pairs)
    if isinstance(node, ast.Call) and _is_predicate(node) and not node.keywords:
        function: Any = _PREDICATES[ast.unparse(node.func)]
        return function(*(_value(argument, module) for argument in node.args))
    raise LookupError(ast.unparse(node))


def _members(loop: ast.For | ast.comprehension) -> tuple[ast.expr, ast.expr]:
    """The name of each member in a loop, and what it is a member of, with `enumerate` or not."""
    target, over = loop.target, loop.iter
    if isinstance(over, ast.Call) and ast.unparse(over.func) == "enumerate" and over.args:
        return target.elts[-1] if isinstance(target, ast.Tuple) else target, over.args[0]
    return target, over


def _is_predicate(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in _PREDICATES


def _modules_at(module: nn.Module, path: str) -> list[str]:
    """The paths of the modules that a relative path means, of lists each of their modules."""
    found = [("", module)]
    for name in path.split("."):
        found = [
            (f"{before}.{key}" if before else key, child)
            for before, owner in found
            for key, child in owner.named_children()
            if name in (key, _EACH)
        ]
    return [path for path, _ in found]
