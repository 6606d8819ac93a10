"""Bytes that somebody else wrote, as far as they can be shown."""

import json
from typing import Any, Final, NoReturn

_DEEPEST: Final = 64
"""Levels of JSON that are shown as such; our own schemas allow far fewer."""


def as_text(content: bytes) -> str | None:
    """The text, where it is UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def as_json(content: bytes) -> Any:
    """The value, where the bytes are JSON that can be written again; None where not."""
    try:
        value = json.loads(content.decode(), parse_constant=_no_such_number)
        if _is_shallow(value):
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            return value
    except (ValueError, RecursionError):
        pass
    return None


def _is_shallow(root: Any) -> bool:
    level = [root]
    for _ in range(_DEEPEST):
        level = [child for value in level for child in _children(value)]
        if not level:
            return True
    return False


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_such_number(literal: str) -> NoReturn:
    raise ValueError(f"JSON has no {literal}")
