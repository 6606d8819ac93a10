"""From a former version of an event to the newest: handlers know only the newest, the log keeps them all.

A step is a pure function on the data of one version, as JSON has it, that gives the data of the next version:

    @UPCASTERS.step("tessera.memory.recorded.v1")
    def with_language(data: Data) -> Data:
        return {**data, "language": "und"}

A step is written in the commit that makes the new version, and stays. The examples of every version ever committed are lifted by it in
`make check` (`tessera.contracts.schemas`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from pydantic import JsonValue

from tessera.contracts.base import EventData, event_version
from tessera.contracts.errors import InvalidError

Data = dict[str, JsonValue]
Step = Callable[[Data], Data]
S = TypeVar("S", bound=Step)


class Upcasters:
    """The steps from each former version to the next."""

    def __init__(self) -> None:
        self._steps: dict[str, Step] = {}

    def step(self, former: str) -> Callable[[S], S]:
        """Registers the step that leads from the type `former` to the next version. Raises ValueError when there is one."""

        def register(step: S) -> S:
            if former in self._steps:
                raise ValueError(f"there is a step from {former} already")
            self._steps[former] = step
            return step

        return register

    def reaches(self, former: str, event: type[EventData]) -> bool:
        """Whether steps lead from the type `former` to the class, which is of a newer version of the same name."""
        name, version = _parts(former)
        newest = _parts(event.event_type)[0]
        return name == newest and 0 < version < event_version(event) and all(step in self._steps for step in _between(former, event))

    def lifted(self, former: str, data: Any, event: type[EventData]) -> Data:
        """The data of the class's version. Raises InvalidError `data_invalid` for data that the former version cannot have had."""
        try:
            for step in _between(former, event):
                data = self._steps[step](data)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidError("data_invalid", f"The data is not that of {former}: {type(error).__name__}.") from error
        lifted: Data = data
        return lifted


UPCASTERS: Final = Upcasters()
"""Of the events of the catalogue."""


def _parts(event_type: str) -> tuple[str, int]:
    """("tessera.memory.recorded", 1) of `tessera.memory.recorded.v1`; version 0 for what names none."""
    name, _, version = event_type.rpartition(".v")
    return name, int(version) if version.isascii() and version.isdigit() and len(version) < 5 else 0


def _between(former: str, event: type[EventData]) -> list[str]:
    name, version = _parts(former)
    return [f"{name}.v{number}" for number in range(version, event_version(event))]
