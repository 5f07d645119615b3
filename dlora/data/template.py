"""A tokenizer's chat template: what it reads, what it writes, and the defaults that a user sets."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from dlora.data.formats import RecordError
from dlora.errors import UsageError

# Some templates print today's date. A fixed one (Llama 3's own default) keeps the tokens equal on
# all ranks at midnight and in a run that is resumed tomorrow. A macro put before the template hides
# transformers' function; "+%}" keeps the template's first line break.
_FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form | replace('%Y', '2024') | replace('%m', '07')"
    " | replace('%d', '26') | replace('%B', 'July') | replace('%b', 'Jul')"
    " | replace('%A', 'Friday') | replace('%H', '12') | replace('%M', '00') | replace('%S', '00')"
    " }}{% endmacro +%}"
)
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tags
_GLOBALS = {"messages", "raise_exception", "strftime_now", *jinja2.Environment().globals}
_WITHOUT_AND_WITH: tuple[list[dict[str, Any]] | None, ...] = (None, [{}])
_LISTS = ("tools", "documents")  # parameters of apply_chat_template that are meant for the template


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        key: the configuration's name of the data set, for errors.

    Attributes:
        variables: names that the template takes beside the messages, such as "tools".
        names: names of fields that it may read of messages: more than it does.

    Raises:
        UsageError: the tokenizer has no chat template, or it is not valid.
    """

    def __init__(self, tokenizer: Any, key: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{key}: chats need a chat template, but the model's tokenizer has none; take an "
                "instruct model, name one with data.chat_template, or use data.format: text"
            )
        self.tokenizer = tokenizer
        try:
            # Without tools, and with them: some tokenizers have a second template for these.
            self._texts = [tokenizer.get_chat_template(tools=some) for some in _WITHOUT_AND_WITH]
            trees = [_tree(text) for text in self._texts]
        except (ValueError, jinja2.TemplateError) as error:
            raise UsageError(f"{key}: the model's chat template cannot be used: {error}") from None
        self._texts = [_FIXED_DATE * ("strftime_now" in text) + text for text in self._texts]
        self.variables = frozenset(
            name for tree in trees for name in meta.find_undeclared_variables(tree)
        ) - reserved_names(tokenizer)
        self.names = frozenset(name for tree in trees for name in _names(tree))

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        prompt: bool = False,
    ) -> str:
        """The text of messages; with `prompt`, and what opens the next answer.

        Raises:
            RecordError: the template refuses them.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._texts["tools" in variables],
                tokenize=False,
                add_generation_prompt=prompt,
                **variables,
            )
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError("it contains half a surrogate pair; expected Unicode text") from None
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise RecordError(
                f"the model's chat template refuses this conversation: {error}"
            ) from None
        return text


def reserved_names(tokenizer: Any) -> frozenset[str]:
    """Names that transformers or Jinja give a meaning; no record and no setting may."""
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - set(_LISTS)
    return frozenset(own | _GLOBALS | set(tokenizer.special_tokens_map))


def set_template(tokenizer: Any, text: str | None, defaults: Mapping[str, Any]) -> None:
    """Give a tokenizer another chat template, or defaults for variables of the one that it has.

    Defaults become the first lines of the template, so that they act wherever it does: in
    training, in `generate`, and in what is exported.

    Args:
        text: `data.chat_template`; None: the tokenizer's own.
        defaults: `data.chat_template_kwargs`.

    Raises:
        UsageError: the template is not valid, or does not read one of the variables.
    """
    if text is not None:
        tokenizer.chat_template = text
    try:
        wanted = _undeclared(tokenizer) if text is not None or defaults else set()
    except (jinja2.TemplateError, ValueError) as error:
        raise UsageError(f"data.chat_template: {error}") from None
    for name in defaults:
        if name not in wanted:
            known = ", ".join(sorted(wanted - _set_in(tokenizer))) or "none"
            raise UsageError(
                f"data.chat_template_kwargs: {name} cannot act: the chat template does not read "
                f"it; it reads {known}"
            )
    prefix = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif +%}}"
        for name, value in defaults.items()
    )
    old = tokenizer.chat_template
    if isinstance(old, dict):
        tokenizer.chat_template = {name: prefix + each for name, each in old.items()}
    elif prefix:
        tokenizer.chat_template = prefix + old


def _undeclared(tokenizer: Any) -> set[str]:
    if not tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template, so data.chat_template_kwargs cannot act"
        )
    names = {n for tree in _trees(tokenizer) for n in meta.find_undeclared_variables(tree)}
    return names - reserved_names(tokenizer)


def _set_in(tokenizer: Any) -> set[str]:
    """Variables that a template sets somewhere, which Jinja cannot tell from those it reads."""
    found = (node for tree in _trees(tokenizer) for node in tree.find_all(nodes.Name))
    return {node.name for node in found if node.ctx == "store"}


def _trees(tokenizer: Any) -> list[nodes.Template]:
    found = tokenizer.chat_template
    return [_tree(text) for text in (found.values() if isinstance(found, dict) else [found])]


def _literal(value: Any) -> str:
    """A value as Jinja spells it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
    return repr(value)


def _tree(text: str) -> nodes.Template:
    environment = jinja2.Environment(  # noqa: S701 - parsed only, and it makes no HTML
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.parse(_GENERATION.sub("", text))


def _names(tree: nodes.Template) -> set[str]:
    """Attributes and strings of a template."""
    found = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = (node.value for node in tree.find_all(nodes.Const))
    return found | {value for value in constants if isinstance(value, str)}
