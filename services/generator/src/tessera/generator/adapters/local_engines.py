"""The two engines that need no provider. Both say the same again for the same job."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from tessera.contracts import InvalidError, Problem
from tessera.contracts.sealing import opened
from tessera.encodings import Encoding, encoding
from tessera.generator.domain.endings import EngineError
from tessera.generator.domain.kneser_ney import END, ORDER, START, Distribution, contexts, interpolated
from tessera.generator.domain.models import NGRAM_MODEL_ID, QUOTE_MODEL_ID
from tessera.generator.domain.pieces import Piece
from tessera.generator.domain.prompts import question_of
from tessera.generator.domain.quoting import NOT_ASKED, NOTHING_FOUND, Source, quotes
from tessera.generator.domain.sampling import SamplingParameters, sample
from tessera.generator.ports import Job, NgramModel, NgramReader

DEFAULT_TOKENS: Final = 256
MAXIMUM_TOKENS: Final = 2_048
"""The engine's own limit: a generation is one database snapshot, which must not stay open for long."""
_INLINE_PROMPT_CHARACTERS: Final = 8_000

_LEARNED_NOTHING: Final = Problem(
    code="model_has_learned_nothing",
    message="local/ngram has learned nothing for this tenant yet: ingest text first, then wait until it is tokenized.",
    param="model",
    status=422,
)


class LocalEngine:
    """What local engines share: nothing remote that could be down."""

    @property
    def deterministic(self) -> bool:
        """Local engines repeat themselves."""
        return True

    @property
    def shows_memories(self) -> bool:
        """Local engines read memories as they are, or not at all."""
        return False

    @property
    def suspended(self) -> timedelta:
        """Local engines are always there."""
        return timedelta(0)


@dataclass(frozen=True)
class NgramEngine(LocalEngine):
    """`local/ngram`: draws the next token from the tenant's own Kneser-Ney tables."""

    reader: NgramReader
    encoding_name: str
    name: str = NGRAM_MODEL_ID
    concurrency: int = 4

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """One piece per token. Raises EngineError `model_has_learned_nothing`, InvalidError `unencodable_text`, RetryableError."""
        parameters = job.ready.request.parameters
        coder = await asyncio.to_thread(encoding, self.encoding_name)
        history = await self._history(job, coder)
        sampling = SamplingParameters(1.0 if parameters.temperature is None else parameters.temperature, parameters.top_p or 1.0)
        limit = min(parameters.max_tokens or DEFAULT_TOKENS, MAXIMUM_TOKENS)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        async with self.reader.snapshot(job.tenant_id, self.encoding_name) as model:
            if not len(model.unigrams.vocabulary):
                raise EngineError(_LEARNED_NOTHING)
            draws = random.Random(seed_of(job))  # noqa: S311  # nosec B311 - sampling text, not making secrets
            for _ in range(limit):
                token = sample(await _distribution(model, history), sampling, draws.random())
                if token == END:
                    yield Piece(decoder.decode(b"", final=True), finish_reason="stop")
                    return
                history = [*history, token][-ORDER:]
                yield Piece(decoder.decode(coder.token_bytes(token)))
        yield Piece(decoder.decode(b"", final=True), finish_reason="length")

    async def _history(self, job: Job, coder: Encoding) -> list[int]:
        prompt = opened(job.ready.request.prompt or "")
        try:
            tokens = coder.encode(prompt) if len(prompt) <= _INLINE_PROMPT_CHARACTERS else await asyncio.to_thread(coder.encode, prompt)
        except ValueError as error:
            raise InvalidError("unencodable_text", f"The prompt cannot be tokenized: {error}.", "prompt") from error
        return [START, *tokens][-ORDER:]


async def _distribution(model: NgramModel, history: Sequence[int]) -> Distribution:
    """What follows the history: the unigrams, refined by every longer context that was ever seen."""
    wanted = contexts(history)
    seen = await model.followers(wanted)
    result = model.unigrams
    for context in wanted:
        if context not in seen:
            break
        result = interpolated(result, seen[context], model.discounts(len(context) + 1))
    return result


def seed_of(job: Job) -> int:
    """The request's seed; without one the generation's own, so that another worker draws the same."""
    seed = job.ready.request.parameters.seed
    return seed if seed is not None else int.from_bytes(hashlib.sha256(job.generation_id.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class QuoteEngine(LocalEngine):
    """`local/quote`: answers with sentences of the recalled memories and nothing else."""

    name: str = QUOTE_MODEL_ID
    concurrency: int = 16

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """One piece per quote. Raises InvalidError `sealed_content`."""
        ready = job.ready
        if ready.recall == "not_asked":
            answer, source_ids = NOT_ASKED, tuple[str, ...]()
        else:
            sources = [Source(memory.memory_id, opened(memory.text)) for memory in ready.memories]
            found = quotes(question_of(ready.request.messages or ()), sources)
            answer = "\n".join(map(str, found)) or NOTHING_FOUND
            source_ids = tuple(dict.fromkeys(quote.memory_id for quote in found))
        shown = await _cut(answer, ready.request.model.encoding, ready.request.parameters.max_tokens)
        for line in shown.splitlines(keepends=True):
            yield Piece(line)
        yield Piece(finish_reason="stop" if shown == answer else "length", source_ids=source_ids)


async def _cut(text: str, encoding_name: str, max_tokens: int | None) -> str:
    if max_tokens is None:
        return text
    coder = await asyncio.to_thread(encoding, encoding_name)
    return coder.cut(text, max_tokens)
