"""One function per event. All of them may be repeated: ids of what they emit derive from the event, and storing is idempotent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tessera.bus.events import Received
from tessera.contracts.errors import InvalidError, Problem, RetryableError
from tessera.contracts.events import (
    GenerationEnded,
    GenerationFailed,
    GenerationReady,
    GenerationRequested,
    GenerationTokenized,
    MemoryRecorded,
    PromptTokens,
    TextTokenized,
    TokenizationCompleted,
    TokenizationRequested,
)
from tessera.contracts.ids import aggregate_key
from tessera.contracts.sealing import opened
from tessera.encodings import Encoding, EncodingsError, UnknownEncodingError, encoding
from tessera.resilience import CircuitOpenError
from tessera.tokenizer.domain import prompt
from tessera.tokenizer.domain.composition import Composed, compose
from tessera.tokenizer.ports import Emits, Provenance, Vocabulary

# One or two milliseconds with the tree of compositions; more would keep every other event waiting, so it goes to a thread.
INLINE_CHARACTERS = 2_000

_NOT_FOUND_STATUS = 404
_INVALID_STATUS = 400
_UNAVAILABLE_STATUS = 503

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Handlers:
    """The tokenizer's handlers and what they need. `memory_encoding` is what recorded memories are tokenized in."""

    vocabulary: Vocabulary
    memory_encoding: str

    async def count_prompt(self, event: Received[GenerationRequested], emit: Emits) -> None:
        """Counts a generation's prompt and hands it on: to memory where grounding is asked for, else to the generator.

        Needs no Postgres. A prompt that cannot be counted or is too long ends the generation with GenerationFailed.
        """
        request = event.data
        try:
            tokens = await _off_loop(_size(request), lambda: prompt.counted(request, _encoding(request.model.encoding)))
        except InvalidError as error:
            failure = GenerationFailed(generation_id=request.generation_id, problem=Problem.of(error, status=_INVALID_STATUS))
            await emit.reply(failure, step="refused")
            # The moment of the request: a repeat emits the same.
            ended = GenerationEnded.of(request, failure, event.time)
            await emit.publish(ended, step="accounted", key=request.generation_id.encode())
            return
        await emit.publish(_next(request, tokens), step="tokenized", key=request.generation_id.encode())

    async def tokenize(self, event: Received[TokenizationRequested], emit: Emits) -> None:
        """Encodes and stores, or decodes; whatever is wrong is answered at once, so that no request waits behind a lost Postgres."""
        try:
            completed = await self._tokenized(event)
            await emit.reply(completed)
        except InvalidError as error:
            status = _NOT_FOUND_STATUS if error.code == "composition_not_found" else _INVALID_STATUS
            await emit.fail(Problem.of(error, status=status))
        except (RetryableError, CircuitOpenError) as error:
            problem = Problem(
                code="dependency_unavailable", message=f"The vocabulary cannot be reached: {error}", status=_UNAVAILABLE_STATUS
            )
            await emit.fail(problem)

    async def learn(self, event: Received[MemoryRecorded], emit: Emits) -> None:
        """Stores the compositions of a recorded memory's text and tells its tokens; a memory without text is passed over."""
        memory = event.data
        if memory.text is None:
            return
        text = opened(memory.text)
        tokens, composed = await _off_loop(len(text), lambda: _encoded(_encoding(self.memory_encoding), text))
        await self.vocabulary.store(event.tenant_id, composed, Provenance("memory", memory.memory_id, event.subject_id))
        tokenized = TextTokenized(
            memory_id=memory.memory_id, encoding=self.memory_encoding, tokens=tuple(tokens), composition_id=composed.root.hex()
        )
        await emit.publish(tokenized, step="tokenized", key=aggregate_key(event.tenant_id, "memory", memory.memory_id))

    async def _tokenized(self, event: Received[TokenizationRequested]) -> TokenizationCompleted:
        request = event.data
        chosen = _encoding(request.encoding)
        if request.text is not None:
            return await self._encode(event, chosen, request.text)
        if request.composition_id is not None:
            return await self._decode_composition(event.tenant_id, chosen, request.composition_id)
        tokens = request.tokens or ()
        return _decoded(chosen, await _off_loop(len(tokens), lambda: _text(chosen, tokens), "tokens"), tokens)

    async def _encode(self, event: Received[TokenizationRequested], chosen: Encoding, text: str) -> TokenizationCompleted:
        tokens, composed = await _off_loop(len(text), lambda: _encoded(chosen, text), "text")
        # One row per subject, not per request: who asks the same again adds nothing.
        await self.vocabulary.store(event.tenant_id, composed, Provenance("request", event.subject_id or "", event.subject_id))
        return TokenizationCompleted(
            operation="encode", encoding=chosen.name, text=text, tokens=tuple(tokens), composition_id=composed.root.hex()
        )

    async def _decode_composition(self, tenant_id: str, chosen: Encoding, composition_id: str) -> TokenizationCompleted:
        content = await self.vocabulary.text(tenant_id, bytes.fromhex(composition_id))
        text = _characters(content)
        tokens = await _off_loop(len(text), lambda: chosen.encode(text))
        return _decoded(chosen, text, tuple(tokens), composition_id)


async def _off_loop(size: int, work: Callable[[], T], field: str | None = None) -> T:
    """Runs short work at once and long work in a thread; what the encodings refuse becomes InvalidError about `field`."""
    try:
        return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)
    except EncodingsError as error:
        raise InvalidError(error.code, str(error), field) from error


def _encoding(name: str) -> Encoding:
    try:
        return encoding(name)
    except UnknownEncodingError as error:
        raise InvalidError(error.code, str(error), "encoding") from error


def _encoded(chosen: Encoding, text: str) -> tuple[list[int], Composed]:
    tokens = chosen.encode(text)
    return tokens, compose([chosen.token_bytes(token) for token in tokens])


def _text(chosen: Encoding, tokens: tuple[int, ...]) -> str:
    text = chosen.decode(tokens)
    if "\x00" in text:
        raise InvalidError("unsupported_character", "The text of these tokens holds U+0000, which no event may.", "tokens")
    return text


def _characters(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidError("incomplete_text", "The composition is a part of a character, not a text.", "composition_id") from error


def _decoded(chosen: Encoding, text: str, tokens: tuple[int, ...], composition_id: str | None = None) -> TokenizationCompleted:
    return TokenizationCompleted(operation="decode", encoding=chosen.name, text=text, tokens=tokens, composition_id=composition_id)


def _next(request: GenerationRequested, tokens: PromptTokens) -> GenerationTokenized | GenerationReady:
    if request.memory is not None:
        return GenerationTokenized(request=request, prompt=tokens)
    return GenerationReady(request=request, prompt=tokens)


def _size(request: GenerationRequested) -> int:
    """Roughly the characters of the prompt."""
    if request.messages is None:
        return len(str(request.prompt))
    return sum(len(str(message.content)) for message in request.messages)
