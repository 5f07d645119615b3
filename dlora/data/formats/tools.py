"""Tools, their calls and their documents, in the one form that chat templates read.

a call    {"type": "function", "function": {"name": "...", "arguments": {...}}}   (OpenAI's)
tools     a list of JSON schemas, as they are
"""

import json
from collections.abc import Mapping
from typing import Any

from dlora.data.formats.record import RecordError, kind_of

# Fields of a record that a chat template reads as lists of objects, and that may be JSON in a text.
LISTS = ("tools", "documents")


def parsed(value: Any, name: str) -> Any:
    """A value that may be JSON in a text.

    Raises:
        RecordError: it is a text, but no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is a text that is no JSON; expected JSON") from None


def object_list(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects, of JSON text where it is one.

    Raises:
        RecordError: it is something else.
    """
    found = parsed(value, name) if not isinstance(value, str) or value.strip() else []
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise RecordError(f"{name} is {kind_of(found)}; expected a list of objects")
    return found


def take_calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Take the calls out of a message: `tool_calls`, or OpenAI's earlier `function_call`."""
    calls: list[dict[str, Any]] = []
    for name in ("tool_calls", "function_call"):
        if (value := turn.pop(name, None)) is not None:
            calls += calls_of(value, f"{where}.{name}")
    return calls


def calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls, one or a list of them, in OpenAI's form or as bare names and arguments."""
    return [_call(item, name) for item in object_list(value, name)]


def _call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function, str):  # {"function": "name", "arguments": ...}
        function = {"name": function, "arguments": call.get("arguments")}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RecordError(f"{name} has a call without a name; expected 'name' and 'arguments'")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")
    around = {} if function is call else {k: v for k, v in call.items() if v is not None}
    kept = {k: v for k, v in function.items() if k not in ("arguments", "parameters")}
    if function is call:  # what identifies a call belongs to it, not to its function
        around = {k: kept.pop(k) for k in ("id", "type") if kept.get(k) is not None}
    around.pop("arguments", None)
    return {"type": "function", **around, "function": {**kept, "arguments": _arguments(arguments)}}


def _arguments(value: Any) -> Any:
    """The object that a text contains, where it contains one; else the value itself."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict) else value
    return value
