"""What an engine yields, and how pieces are merged and coalesced into chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import JsonValue

from tessera.contracts import FinishReason, UsageSource

Delta = dict[str, JsonValue]
_NOT_CONCATENATED: Final = frozenset({"index", "type", "id", "role"})
_CONTINUED_LISTS: Final = frozenset({"content", "refusal", "tokens", "token_logprobs", "top_logprobs", "text_offset"})
"""Lists of log probabilities: each piece brings the next part."""


@dataclass(frozen=True)
class TokenFigures:
    """Tokens of a generation as whoever ran it counted them."""

    prompt_tokens: int
    completion_tokens: int
    source: UsageSource
    details: Mapping[str, dict[str, JsonValue]] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A step of a generation, of one of its choices. The last piece of a choice has the reason why it ended."""

    text: str = ""
    delta: Delta = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    figures: TokenFigures | None = None
    source_ids: tuple[str, ...] = ()
    choice: int = 0


@dataclass(frozen=True)
class Said:
    """What one choice adds, and may be shown."""

    text: str = ""
    delta: Mapping[str, JsonValue] = field(default_factory=dict)
    choice: int = 0


def merged(first: Delta, second: Mapping[str, JsonValue]) -> Delta:
    """Two consecutive deltas as one: strings are joined, items of lists are matched by their `index`."""
    result = dict(first)
    for name, value in second.items():
        result[name] = _merged_value(name, result.get(name), value)
    return result


def _merged_value(name: str, first: Any, second: Any) -> Any:
    if first is None or name in _NOT_CONCATENATED:
        return first if second is None else second
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    if isinstance(first, dict) and isinstance(second, dict):
        return merged(first, second)
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second] if name in _CONTINUED_LISTS else _merged_lists(first, second)
    return first if second is None else second


def _merged_lists(first: list[Any], second: list[Any]) -> list[Any]:
    if second[: len(first)] == first:  # some providers repeat the whole list (citations) with every piece
        return second
    result = list(first)
    for item in second:
        position = _position(result, item)
        if position is None:
            result.append(item)
        else:
            result[position] = merged(result[position], item)
    return result


def _position(items: list[Any], wanted: Any) -> int | None:
    """Where the item with the same `index` stands; items without one are always new."""
    index = wanted.get("index") if isinstance(wanted, dict) else None
    if index is None:
        return None
    return next((at for at, item in enumerate(items) if isinstance(item, dict) and item.get("index") == index), None)


@dataclass
class _Collected:
    text: list[str] = field(default_factory=list)
    delta: Delta = field(default_factory=dict)


class Coalescer:
    """Collects pieces so that the first is due at once and later ones at most once per `interval_seconds`."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._collected: dict[int, _Collected] = {}
        self._next_due = float("-inf")

    def add(self, said: Said) -> None:
        """Collect what one choice adds; nothing changes nothing."""
        if not (said.text or said.delta):
            return
        collected = self._collected.setdefault(said.choice, _Collected())
        collected.text.append(said.text)
        collected.delta = merged(collected.delta, said.delta)

    @property
    def empty(self) -> bool:
        """Nothing has been collected."""
        return not self._collected

    def wait_seconds(self, now: float) -> float | None:
        """How long until what was collected is due; None if nothing was."""
        return None if self.empty else max(0.0, self._next_due - now)

    def take(self, now: float) -> list[Said]:
        """Everything collected so far, one of each choice; the next is due an interval later."""
        result = [Said("".join(collected.text), collected.delta, choice) for choice, collected in sorted(self._collected.items())]
        self._collected, self._next_due = {}, now + self._interval
        return result
