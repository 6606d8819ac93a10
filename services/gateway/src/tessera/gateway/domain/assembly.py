"""The order of a generation's replies, restored (rules of the log, 23).

Chunks come straight from the engine, the completion through its outbox, so the completion can overtake. A chunk may come twice, and
after a crash a deterministic engine resumes with a higher attempt at the next index. The assembly lets through each index once, in order,
and the end only after the last index it names.
"""

from dataclasses import dataclass

from tessera.contracts.events import GenerationChunk, GenerationCompleted, GenerationFailed

Ending = GenerationCompleted | GenerationFailed


@dataclass(frozen=True)
class Located:
    """A reply and where it stands in the log."""

    data: GenerationChunk | Ending
    partition: int
    offset: int


class Assembly:
    """Feed it every reply of one generation; it gives back what may be shown now, in order."""

    def __init__(self) -> None:
        self._next_index = 0
        self._attempt = 0
        self._early: dict[int, Located] = {}
        self._ending: Located | None = None
        self.finished = False

    def feed(self, reply: Located) -> list[Located]:
        """What became presentable through `reply`: chunks in order, then at most one ending. Nothing after the ending."""
        if self.finished:
            return []
        if isinstance(reply.data, GenerationChunk):
            self._keep(reply, reply.data)
        elif self._ending is None or _attempt(reply) >= _attempt(self._ending):
            self._ending = reply
        return self._presentable()

    def _keep(self, reply: Located, chunk: GenerationChunk) -> None:
        """A higher attempt replaces what an earlier one sent ahead of a gap; a lower one is a straggler."""
        if chunk.attempt < self._attempt:
            return
        if chunk.attempt > self._attempt:
            self._early.clear()
            self._attempt = chunk.attempt
        if chunk.index >= self._next_index:
            self._early.setdefault(chunk.index, reply)

    def _presentable(self) -> list[Located]:
        ready = []
        while (reply := self._early.pop(self._next_index, None)) is not None:
            ready.append(reply)
            self._next_index += 1
        if self._ending is not None and _last_index(self._ending) < self._next_index:
            self.finished = True
            ready.append(self._ending)
        return ready


def _attempt(reply: Located) -> int:
    return reply.data.attempt


def _last_index(reply: Located) -> int:
    return -1 if isinstance(reply.data, GenerationChunk) else reply.data.last_index
