"""Keeps secrets out of log lines and health reports."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import SecretBytes, SecretStr

REDACTED = "[redacted]"

_SECRET_KEY = re.compile(
    r"(^|[_\-.])(password|passwd|passphrase|secret|authorization|cookie|api_?key|private_?key|pepper|credentials?)$"
    r"|(^|[_\-.])(access|refresh|bearer|auth|session|id)_token$|^token$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"(?P<url>://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|(?P<bearer>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=\-]{8,}"
    r"|(?P<key>\b(?:sk|tsk|tessera)[-_])[A-Za-z0-9_\-]{16,}"
    r"|(?P<assigned>\b(?:password|passwd|secret|api_?key)\s*[=:]\s*['\"]?)[^\s'\",;)]+",
    re.IGNORECASE,
)


def redacted_text(text: str) -> str:
    """`text` with passwords in addresses, bearer tokens and API keys replaced."""
    return _SECRET_TEXT.sub(lambda match: f"{_prefix(match)}{REDACTED}", text)


def _prefix(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


@lru_cache(maxsize=1024)
def _names_a_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def redacted(value: Any, key: str = "") -> Any:
    """`value` as it may be logged under `key`: secret types, secret keys and secret-looking text replaced, containers searched."""
    if isinstance(value, SecretStr | SecretBytes) or (key and _names_a_secret(key)):
        return REDACTED
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, Mapping):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(item) for item in value]
    return value
