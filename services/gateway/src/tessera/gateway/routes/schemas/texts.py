"""Models, embeddings and tokens."""

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from tessera.gateway.routes.schemas.common import Body, ModelId, Tokens, View, Whole, examples


class ModelDetails(View):
    """What a model is and how its tokens are counted."""

    capability: Literal["chat", "completion", "embedding"]
    provider: str
    description: str
    encoding: str
    template: str
    counts_are_exact: bool
    context_tokens: int | None
    alias_of: Annotated[str | None, Field(description="The model that answers, where `id` is another name for it.")]


class ModelView(View):
    """A model on offer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    tessera: ModelDetails


class ModelDeletedView(View):
    """A model that was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool


class ModelList(View):
    """Every model on offer."""

    object: Literal["list"] = "list"
    data: list[ModelView]


MAXIMUM_INPUT_CHARACTERS: Final = 100_000
EmbeddingInput = Annotated[str, Field(min_length=1, max_length=MAXIMUM_INPUT_CHARACTERS)]


class EmbeddingBody(Body):
    """`POST /v1/embeddings`."""

    model_config = examples({"model": "all-MiniLM-L6-v2", "input": "The archive is in the cellar."})

    model: ModelId
    input: Annotated[
        EmbeddingInput
        | Annotated[list[EmbeddingInput], Field(min_length=1, max_length=256)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=256)],
        Field(description="A text or up to 256 texts; or the token ids of one, or of up to 256, under cl100k_base."),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Whole | None, Field(ge=1)] = None
    user: Annotated[str | None, Field(max_length=512)] = None


class EmbeddingView(View):
    """One vector of unit length: numbers, or base64 of little-endian 32-bit floats."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(View):
    """Tokens that were embedded."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(View):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingView]
    model: str
    usage: EmbeddingUsage


Encoding = Annotated[str, Field(min_length=1, max_length=128, examples=["o200k_base"])]


class TokenizeBody(Body):
    """`POST /v1/tokenize`."""

    model_config = examples({"text": "Guten Tag 世界 👋", "encoding": "o200k_base"})

    text: Annotated[str, Field(max_length=100_000)]
    encoding: Annotated[Encoding | None, Field(description="Or give `model`; o200k_base where neither is given.")] = None
    model: ModelId | None = None


class DetokenizeBody(Body):
    """`POST /v1/detokenize`: give `tokens` or `composition_id`."""

    model_config = examples({"tokens": [9906, 1917], "encoding": "cl100k_base"})

    tokens: Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]] | None, Field(max_length=100_000)] = None
    composition_id: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    encoding: Encoding | None = None
    model: ModelId | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "DetokenizeBody":
        if (self.tokens is None) == (self.composition_id is None):
            raise ValueError("give exactly one of tokens and composition_id")
        return self


class TokenizationView(View):
    """A text, its tokens and its composition."""

    text: str
    tokens: list[int]
    count: int
    encoding: str
    composition_id: str | None
