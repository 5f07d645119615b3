"""`data.chat_template`: a file's name, or a template."""

from pathlib import Path

from dlora.errors import UsageError


def template_text(value: str) -> str:
    """The template: the value itself, or what the file of that name contains.

    Raises:
        UsageError: the value has nothing of a template, and names no file that can be read.
    """
    if any(sign in value for sign in ("{{", "{%", "\n")):
        return value
    path = Path(value).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"data.chat_template: {value}: {reason}; expected a Jinja file, or a template"
        ) from None
    if not text.strip():
        raise UsageError(f"data.chat_template: {value} is empty; expected a template")
    return text
