"""The models on offer, and whether a request fits the one it names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tessera.contracts import GenerationRequested, ModelDeclared, ModelReference, Problem

NGRAM_MODEL_ID: Final = "local/ngram"
QUOTE_MODEL_ID: Final = "local/quote"
OWNER: Final = "tessera"

_NGRAM_DESCRIPTION: Final = (
    "Text completion by an interpolated modified Kneser-Ney model of order 5, learned only from the text this tenant ingested. "
    "It continues text; it does not answer questions or follow instructions, and it is no chat model."
)
_QUOTE_DESCRIPTION: Final = (
    "Answers only with sentences from recalled memories, each with its source id, chosen by the words they share with the question, "
    "or says that memory holds nothing on it. It writes no text of its own and needs memory to be asked for."
)


@dataclass(frozen=True)
class OfferedModel:
    """One model, and how its provider calls it."""

    reference: ModelReference
    description: str
    owned_by: str
    upstream_name: str

    def declaration(self) -> ModelDeclared:
        """The event that offers it."""
        return ModelDeclared(model=self.reference, description=self.description, owned_by=self.owned_by)

    def withdrawal(self) -> ModelDeclared:
        """The event that takes the offer back."""
        return self.declaration().model_copy(update={"available": False})


def local_models(encoding: str) -> tuple[OfferedModel, OfferedModel]:
    """The two engines that every installation has; token counts are exact, because the encoding is their own."""
    ngram = ModelReference(
        model_id=NGRAM_MODEL_ID, provider=NGRAM_MODEL_ID, capability="completion", encoding=encoding, template="text", exact=True
    )
    quote = ModelReference(
        model_id=QUOTE_MODEL_ID, provider=QUOTE_MODEL_ID, capability="chat", encoding=encoding, template="plain", exact=True
    )
    return (
        OfferedModel(ngram, _NGRAM_DESCRIPTION, OWNER, NGRAM_MODEL_ID),
        OfferedModel(quote, _QUOTE_DESCRIPTION, OWNER, QUOTE_MODEL_ID),
    )


class ModelCatalogue:
    """All models this service offers. Raises ValueError where two share an id."""

    def __init__(self, models: Iterable[OfferedModel]) -> None:
        self._models: dict[str, OfferedModel] = {}
        for model in models:
            if self._models.setdefault(model.reference.model_id, model) is not model:
                raise ValueError(f"the model {model.reference.model_id!r} is offered twice")

    @property
    def models(self) -> tuple[OfferedModel, ...]:
        """Every model."""
        return tuple(self._models.values())

    @property
    def encodings(self) -> frozenset[str]:
        """The names of the encodings that their tokens are counted in."""
        return frozenset(model.reference.encoding for model in self._models.values())

    def find(self, model_id: str) -> OfferedModel | None:
        """The model, or None where nobody offers it."""
        return self._models.get(model_id)

    def chosen(self, request: GenerationRequested) -> OfferedModel | Problem:
        """The model that runs the request, or why none here can."""
        model = self.find(request.model.model_id)
        if model is None:
            return Problem(code="model_not_found", message=f"No model {request.model.model_id!r} is offered.", param="model", status=404)
        asked = "chat" if request.messages is not None else "completion"
        if model.reference.capability != asked:
            message = f"{model.reference.model_id} offers {model.reference.capability}, not {asked}."
            return Problem(code="model_capability_mismatch", message=message, param="model", status=400)
        if (request.parameters.n or 1) > 1 and model.reference.provider in (NGRAM_MODEL_ID, QUOTE_MODEL_ID):
            message = f"{model.reference.model_id} gives one choice (n = 1)."
            return Problem(code="unsupported_parameter", message=message, param="n", status=400)
        return model
