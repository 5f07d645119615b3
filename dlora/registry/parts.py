"""Parts: the classes that the files of a room declare, and their options, read from the files."""

import ast
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from dlora.errors import UsageError
from dlora.registry.options import Option, is_of, members, option

T = TypeVar("T")

PACKAGE = Path(__file__).parents[1]
# Where parts are found, and what picks one.
ROOMS = {
    "lora.variants": "adapter.method",
    "lora.init": "adapter.init_lora_weights",
    "data.formats": "data.format",
    "objectives": "train.objective",
    "tasks": "train.task",
    "quant": "model.quantization",
    "sharding.engines": "sharding.engine",
    "optim": "optimizer.name",
}
_NAMES = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}


@dataclass(frozen=True)
class Declared:
    """An `option(...)` of a file, before it is a field of a class."""

    name: str
    type: Any
    default: Any
    settings: Mapping[str, Any]  # the keyword arguments of `option`, and `doc`

    def field(self, room: str, owners: tuple[str | bool, ...]) -> Any:
        """A dataclass field like that of the file's own class."""
        settings = dict(self.settings)
        made: Any = option(self.default, settings.pop("doc"), **settings)
        metadata = {**made.metadata, "room": room, "owners": owners}
        made.metadata = types.MappingProxyType(metadata)
        return made


@dataclass(frozen=True)
class Part:
    """A class of a room, as its file declares it.

    Attributes:
        name: the value in the configuration that picks it.
        module, cls: where it is.
        says: the class's literal attributes. Read here and in `dlora.config` are:
            `offered`, False where something else than its name picks it;
            `requires`, {package: what pip installs};
            `unused`, {option of the section: why it does nothing beside this part};
            `instead`, {option of the section: the one that this part has in its place};
            `clashes`, ((key, "==" or "!=", value, why), ...), what it does not go with.
        options: of the file.
    """

    room: str
    name: str | bool
    module: str
    cls: str
    says: Mapping[str, Any]
    options: tuple[Declared, ...]

    def load(self) -> Any:
        """The class. Imports its file.

        Raises:
            UsageError: a package that it needs is not installed.
        """
        try:
            return getattr(importlib.import_module(self.module), self.cls)
        except ModuleNotFoundError as error:
            if (package := error.name or "") not in self.says.get("requires", {}):
                raise
            raise UsageError(self.missing(package)) from error

    def missing(self, package: str) -> str:
        """The error for a `package` that is not installed."""
        install = self.says["requires"][package]
        return f"{ROOMS[self.room]}: {self.name} needs {package}: pip install {install}"


@functools.cache
def room(name: str) -> dict[str | bool, Part]:
    """The parts of a room by name. Imports nothing.

    Args:
        name: a key of ROOMS.
    """
    parts: dict[str | bool, Part] = {}
    for path in sorted(PACKAGE.joinpath(*name.split(".")).glob("*.py")):
        module = f"{PACKAGE.name}.{name}.{path.stem}"
        classes = _classes(path)
        of_class: dict[str, dict[str, Any]] = {}  # classes inherit from their bases in the file
        options = tuple(found for cls in classes for found in _options(cls))
        for cls in classes:
            says: dict[str, Any] = {}
            for base in map(ast.unparse, cls.bases):
                says |= of_class.get(base, {})
            says |= dict(_literals(cls))
            of_class[cls.name] = says
            if "name" in says:
                parts[says["name"]] = Part(name, says["name"], module, cls.name, says, options)
    return parts


class Parts(MutableMapping[Any, T]):
    """The parts of a room by name, each of them imported when somebody asks for it.

    So a file whose package is not installed is in nobody's way. A program may add classes of its
    own under names of their own; a configuration file knows only those that are files of the room.

    Args:
        name: of the room, a key of ROOMS.
        make: what is made of a class.
    """

    def __init__(self, name: str, make: Callable[[Any], T] = lambda cls: cls) -> None:
        self._room, self._make, self._made = name, make, dict[str | bool, T]()

    def __getitem__(self, name: str | bool) -> T:
        if name not in self._made:
            self._made[name] = self._make(room(self._room)[name].load())
        return self._made[name]

    def __setitem__(self, name: str | bool, made: T) -> None:
        self._made[name] = made

    def __delitem__(self, name: str | bool) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str | bool]:
        return iter({**room(self._room), **self._made})

    def __len__(self) -> int:
        return len(list(iter(self)))


def carries(*sources: str) -> Callable[[type[T]], type[T]]:
    """Below `@dataclass`: gives a class a field for every option of rooms, or of a single module.

    Args:
        sources: keys of ROOMS, or dotted modules below `dlora` whose options nothing picks.
    """

    def add(cls: type[T]) -> type[T]:
        for source in sources:
            for declared, owners in _declared(source):
                cls.__annotations__[declared.name] = declared.type
                of_room = source if owners else ""
                setattr(cls, declared.name, declared.field(of_room, owners))
        return cls

    return add


def _declared(source: str) -> Iterator[tuple[Declared, tuple[str | bool, ...]]]:
    """The options of a room, each once, with the parts that have it; of a module, with none."""
    path = PACKAGE.joinpath(*source.split("."))
    if not path.is_dir():
        yield from ((o, ()) for cls in _classes(path.with_suffix(".py")) for o in _options(cls))
        return
    of_file: dict[str, list[Part]] = {}
    for part in room(source).values():
        of_file.setdefault(part.module, []).append(part)
    for parts in of_file.values():
        yield from ((o, tuple(part.name for part in parts)) for o in parts[0].options)


def _classes(path: Path) -> list[ast.ClassDef]:
    body = ast.parse(path.read_text(encoding="utf-8"), str(path)).body
    return [node for node in body if isinstance(node, ast.ClassDef)]


def _literals(cls: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Attributes of a class whose value needs no name to be read."""
    for node in cls.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign):
            try:
                yield target.id, ast.literal_eval(node.value or ast.Name("none"))
            except ValueError:
                continue


def _options(cls: ast.ClassDef) -> Iterator[Declared]:
    for node in cls.body:
        call = node.value if isinstance(node, ast.AnnAssign) else None
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("option")):
            continue
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        try:
            default, doc = map(ast.literal_eval, call.args)
            settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            type_ = _type(node.annotation)
        except (ValueError, KeyError) as error:
            where = f"{cls.name}.{node.target.id}, line {node.lineno}"
            raise TypeError(f"{where}: an option has literal arguments: {error}") from None
        yield Declared(node.target.id, type_, default, {**settings, "doc": doc})


def _type(node: ast.expr) -> Any:
    """The type that an annotation spells: of plain types, null, Literal, list and dict."""
    if isinstance(node, ast.BinOp):
        return _type(node.left) | _type(node.right)
    if isinstance(node, ast.Subscript):
        outer, inner = ast.unparse(node.value), node.slice
        if outer == "Literal":
            choices = ast.literal_eval(inner)
            return Literal[choices if isinstance(choices, tuple) else (choices,)]
        parts: Sequence[ast.expr] = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        made = tuple(map(_type, parts))
        return {"dict": dict, "list": list}[outer][made]  # type: ignore[index]
    return _NAMES[ast.unparse(node)]


# Options of a class ------------------------------------------------------------------------------


def options_of(section: type, spell: Callable[[str], str] = str) -> dict[str, Option]:
    """The options that a dataclass has, by the key that `spell` makes of a field's name."""
    hints = get_type_hints(section)
    return {
        spell(f.name): _option(spell(f.name), hints[f.name], f)
        for f in fields(section)
        if "doc" in f.metadata
    }


def check_options(settings: Any) -> None:
    """Check type and range of every option of a dataclass's instance.

    Raises:
        UsageError: the first value that is wrong; the message begins with the option's name.
    """
    for name, opt in options_of(type(settings)).items():
        value = getattr(settings, name)
        if not any(is_of(value, member) for member in members(opt.accepted)):
            raise UsageError(f"{name}: expected {opt.spelling}, got {value!r}")
        for problem in opt.problems(value) if value not in ([], ()) else ():
            raise UsageError(problem)


def _option(key: str, hint: Any, f: "Field[Any]") -> Option:
    declared = dict(f.metadata)
    default = f.default if f.default_factory is MISSING else f.default_factory()
    if choices := declared.pop("choices", ""):
        offered = {n for n, part in room(choices).items() if part.says.get("offered", True)}
        names = [default, *sorted(offered - {default}, key=str)]
        hint = Literal[tuple(names)]
        declared["later"] = tuple(n for n in declared["later"] if n not in names)
    return Option(key, hint, default, **declared)
