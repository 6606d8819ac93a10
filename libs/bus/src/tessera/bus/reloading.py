"""Settings that change while a service runs: read again, checked as a whole, then taken in one step or not at all (docs/settings.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from tessera.bus.settings import ServiceSettings
from tessera.storage.tls import fingerprint
from tessera.telemetry import get_logger, metrics

S = TypeVar("S", bound=ServiceSettings)
Swap = Callable[[], None]
Prepare = Callable[[S], Swap]
"""Checks fresh settings and returns what puts them into effect, which must not fail. Raises ValueError where they cannot be."""

LOOK_EVERY: Final = timedelta(seconds=1)

_log = get_logger(__name__)


def explained(settings_class: type[ServiceSettings], error: ValueError | OSError) -> str:
    """One line per fault, each with the variable to set; values are not shown, they may be secrets."""
    if not isinstance(error, ValidationError):
        return f"tessera {settings_class.service}: {error}\n"
    lines = [
        f"  {variable(settings_class, *fault['loc'])}: {fault['msg']}" if fault["loc"] else f"  {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    return (
        f"tessera {settings_class.service}: {len(lines)} settings are wrong (TESSERA__… sets a value for all services):\n"
        + "\n".join(lines)
        + "\n"
    )


def variable(settings_class: type[ServiceSettings], *path: str | int) -> str:
    """The variable that sets a value."""
    return f"TESSERA_{settings_class.service.upper()}__{'__'.join(map(str, path)).upper()}"


class Reloader(Generic[S]):
    """The settings in effect, and those who follow them. For one event loop."""

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self._followers: list[Prepare[S]] = []

    def follow(self, prepare: Prepare[S]) -> None:
        """Has `prepare` called with fresh settings. What it returns is called only when every follower has taken them."""
        self._followers.append(prepare)

    def reload(self) -> bool:
        """Reads the settings again. False where they cannot be taken as they are now: then nothing has changed, and the log says why."""
        try:
            fresh = type(self.settings)()
            changed = tuple(_differences(self.settings, fresh))
            self._check_reloadable(changed)
            swaps = [prepare(fresh) for prepare in self._followers]
        except (ValueError, OSError) as error:
            metrics.SETTINGS_RELOADS.labels(outcome="refused").inc()
            _log.error("settings not reloaded, those from before stay", problems=explained(type(self.settings), error))
            return False
        for swap in swaps:
            swap()
        self.settings = fresh
        metrics.SETTINGS_RELOADS.labels(outcome="taken").inc()
        _log.info("settings reloaded", changed=[self._variable(path) for path in changed])
        return True

    def _check_reloadable(self, changed: Collection[str]) -> None:
        fixed = [self._variable(path) for path in changed if not is_within(path, self.settings.reloadable)]
        if fixed:
            raise ValueError(f"a restart is needed, or the value from before, for {', '.join(fixed)}")

    def _variable(self, path: str) -> str:
        return variable(type(self.settings), *path.split("."))


class Quiet:
    """Tells a file that was changed from one that is being written: two looks in a row found the same, and not what was known before."""

    def __init__(self, known: object) -> None:
        self._known = self._last = known

    def has_changed(self, found: object) -> bool:
        """What this look found. True once for each change."""
        changed = found == self._last and found != self._known
        self._last = found
        if changed:
            self._known = found
        return changed


async def follow_file(file: Path, known: object, changed: Callable[[], object], pause: timedelta = LOOK_EVERY) -> None:
    """Calls `changed` whenever the file has another `fingerprint` than `known` and is no longer being written, until cancelled."""
    quiet = Quiet(known)
    while True:
        if quiet.has_changed(fingerprint(file)):
            changed()
        await asyncio.sleep(pause.total_seconds())


def _differences(before: BaseModel, after: BaseModel, path: str = "") -> Iterator[str]:
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel):
            yield from _differences(old, new, f"{path}{name}.")
        elif old != new:
            yield path + name


def is_within(path: str, reloadable: Collection[str]) -> bool:
    """Whether the setting of this path, or one above it, is named."""
    return any(path == name or path.startswith(f"{name}.") for name in reloadable)
