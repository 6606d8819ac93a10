"""Embeddings, tokens and compositions."""

from collections.abc import Sequence

from tessera.contracts.events import EmbeddingCompleted, EmbeddingRequested, TokenizationCompleted, TokenizationRequested
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.handlers.answering import expect
from tessera.gateway.ports import Call, Log


async def embed(log: Log, model_id: str, inputs: Sequence[str], call: Call) -> EmbeddingCompleted:
    """One unit vector per input, in order."""
    asked = EmbeddingRequested(reply_partition=log.reply_partition, model=model_id, inputs=tuple(inputs))
    return expect(EmbeddingCompleted, await log.ask(asked, call))


async def encode(log: Log, encoding: str, text: str, call: Call) -> TokenizationCompleted:
    """Tokens of a text, and its composition."""
    asked = TokenizationRequested(reply_partition=log.reply_partition, encoding=encoding, text=text)
    return expect(TokenizationCompleted, await log.ask(asked, call))


async def decode_given(log: Log, encoding: str, tokens: Sequence[int], call: Call, *, param: str) -> str:
    """The text of tokens that a client gave instead of it. Raises ApiError 400 naming `param` for tokens that the encoding has not."""
    try:
        return (await decode(log, encoding, call, tokens=tokens)).text
    except ApiError as error:
        if error.status != 400:
            raise
        raise ApiError(400, error.code, error.message, param=param) from error


async def decode(
    log: Log, encoding: str, call: Call, *, tokens: Sequence[int] | None = None, composition_id: str | None = None
) -> TokenizationCompleted:
    """The text of tokens or of a composition: exactly one of the two is given."""
    asked = TokenizationRequested(
        reply_partition=log.reply_partition,
        encoding=encoding,
        tokens=None if tokens is None else tuple(tokens),
        composition_id=composition_id,
    )
    return expect(TokenizationCompleted, await log.ask(asked, call))
