"""Secrets of one checkout, made at the first run and kept in its state folder for the owner alone."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path

from tessera.local.files import locked, replace_text

_BYTES = 24


class Credentials:
    """Named random secrets in one file (mode 0600); a name that is asked for the first time gets one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._read()

    def __getitem__(self, name: str) -> str:
        """The secret of this name; it contains only letters and digits, so that it fits every URL and configuration file."""
        return self.kept(name, lambda: secrets.token_hex(_BYTES))

    def kept(self, name: str, make: Callable[[], str]) -> str:
        """The secret of this name; `make` gives it the first time."""
        if name not in self._known:
            with locked(self._file.with_name(f"{self._file.name}.lock")):
                self._known = self._read()
                self._known.setdefault(name, make())
                replace_text(self._file, json.dumps(self._known, indent=2) + "\n", mode=0o600)
        return self._known[name]

    def _read(self) -> dict[str, str]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}
