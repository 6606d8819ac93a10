"""`/v1/models`, `/v1/embeddings`, `/v1/tokenize`, `/v1/detokenize`."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter, Request

from tessera.contracts.events import EmbeddingCompleted, TokenizationCompleted
from tessera.gateway.domain.directories import DeclaredModel
from tessera.gateway.domain.errors import ApiError, unsupported
from tessera.gateway.domain.limits import estimated_tokens
from tessera.gateway.handlers import texts
from tessera.gateway.routes.context import Caller, Inference
from tessera.gateway.routes.reading import CarefulRoute
from tessera.gateway.routes.schemas.texts import (
    MAXIMUM_INPUT_CHARACTERS,
    DetokenizeBody,
    EmbeddingBody,
    EmbeddingList,
    EmbeddingUsage,
    EmbeddingView,
    ModelDeletedView,
    ModelDetails,
    ModelList,
    ModelView,
    TokenizationView,
    TokenizeBody,
)

router = APIRouter(route_class=CarefulRoute, tags=["models and text"])

DEFAULT_ENCODING: Final = "o200k_base"
EMBEDDING_ENCODING: Final = "cl100k_base"
"""Of the published embedding models: what clients mean by the token ids that they send."""


@router.get("/v1/models")
async def list_models(caller: Inference) -> ModelList:
    """Every model on offer, and what each is. An alias is listed beside the model that it stands for."""
    return ModelList(data=[_model_view(name, model) for name, model in caller.rooms.models.all().items()])


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, caller: Inference) -> ModelView:
    """One model, by its id or another name for it."""
    return _model_view(model, caller.rooms.models.find(model))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, caller: Inference) -> ModelDeletedView:
    """Refused (403): models are what the operator's settings offer, none belongs to a tenant."""
    caller.rooms.models.find(model)
    raise ApiError(403, "model_not_deletable", f"The model `{model}` is offered by the operator's settings and cannot be deleted here.")


@router.post("/v1/embeddings")
async def create_embedding(body: EmbeddingBody, request: Request, caller: Inference) -> EmbeddingList:
    """Vectors of unit length."""
    model = caller.rooms.models.offering(body.model, "embedding").declaration.model.model_id
    await caller.rooms.gate.reserve(caller.use, estimated_tokens(len(await request.body()), None))
    completed = await texts.embed(caller.rooms.log, model, await _inputs(caller, body), caller.call)
    await caller.rooms.gate.settle(caller.use, sum(completed.token_counts))
    if body.dimensions is not None and body.dimensions != len(completed.vectors[0]):
        raise unsupported("dimensions", f"The vectors of '{body.model}' have {len(completed.vectors[0])} dimensions.")
    return _embedding_list(completed, body, model)


@router.post("/v1/tokenize")
async def tokenize(body: TokenizeBody, caller: Inference) -> TokenizationView:
    """The tokens of a text; the composition that keeps it can be given back to /v1/detokenize."""
    encoding = _encoding(caller, body.encoding, body.model)
    return _tokenization_view(await texts.encode(caller.rooms.log, encoding, body.text, caller.call))


@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeBody, caller: Inference) -> TokenizationView:
    """The text of tokens, or of a composition."""
    encoding = _encoding(caller, body.encoding, body.model)
    decoded = await texts.decode(caller.rooms.log, encoding, caller.call, tokens=body.tokens, composition_id=body.composition_id)
    return _tokenization_view(decoded)


def _model_view(name: str, model: DeclaredModel) -> ModelView:
    declaration, reference = model.declaration, model.declaration.model
    return ModelView(
        id=name,
        created=int(model.declared_at.timestamp()),
        owned_by=declaration.owned_by,
        tessera=ModelDetails(
            capability=reference.capability,
            provider=reference.provider,
            description=declaration.description,
            encoding=reference.encoding,
            template=reference.template,
            counts_are_exact=reference.exact,
            context_tokens=reference.context_tokens,
            alias_of=reference.model_id if name != reference.model_id else None,
        ),
    )


async def _inputs(caller: Caller, body: EmbeddingBody) -> list[str]:
    """The texts. Clients that cut long texts into windows (LangChain's) send tokens of the published models' encoding."""
    if isinstance(body.input, str):
        return [body.input]
    if isinstance(body.input[0], int):
        return [await _decoded(caller, body.input, "input")]
    if isinstance(body.input[0], str):
        return body.input
    decoding = (_decoded(caller, tokens, f"input[{index}]") for index, tokens in enumerate(body.input))
    return await asyncio.gather(*decoding)


async def _decoded(caller: Caller, tokens: Sequence[int], param: str) -> str:
    text = await texts.decode_given(caller.rooms.log, EMBEDDING_ENCODING, tokens, caller.call, param=param)
    if len(text) > MAXIMUM_INPUT_CHARACTERS:
        message = f"Invalid '{param}': string too long. Expected at most {MAXIMUM_INPUT_CHARACTERS} characters."
        raise ApiError(400, "string_above_max_length", message, param=param)
    return text


def _embedding_list(completed: EmbeddingCompleted, body: EmbeddingBody, model: str) -> EmbeddingList:
    encode = _base64_floats if body.encoding_format == "base64" else list
    tokens = sum(completed.token_counts)
    return EmbeddingList(
        data=[EmbeddingView(index=index, embedding=encode(vector)) for index, vector in enumerate(completed.vectors)],
        model=model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _base64_floats(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _encoding(caller: Caller, encoding: str | None, model: str | None) -> str:
    if encoding is not None and model is not None:
        raise ApiError(400, "invalid_value", "Give 'encoding' or 'model', not both.", param="encoding")
    if model is not None:
        return caller.rooms.models.find(model).declaration.model.encoding
    return encoding or DEFAULT_ENCODING


def _tokenization_view(completed: TokenizationCompleted) -> TokenizationView:
    return TokenizationView(
        text=completed.text,
        tokens=list(completed.tokens),
        count=len(completed.tokens),
        encoding=completed.encoding,
        composition_id=completed.composition_id,
    )
