"""What happens on each event. The bus opens and commits the transaction that the ports write in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tessera.bus import Received
from tessera.contracts import GenerationCancelled, GenerationReady, Problem, TextTokenized
from tessera.generator.domain.endings import CANCELLED, failed
from tessera.generator.domain.models import ModelCatalogue
from tessera.generator.domain.transcript import Progress
from tessera.generator.ports import JobIntake, NewJob, NgramLearner, TokenizedText


async def generation_ready(event: Received[GenerationReady], jobs: JobIntake, models: ModelCatalogue, time_limit: timedelta) -> None:
    """Turns an accepted generation into a job row; one that cannot run, or was cancelled before it came, is answered at once."""
    request = event.data.request
    model = models.chosen(request)
    if isinstance(model, Problem):
        await jobs.fail(event.data, failed(request.generation_id, 1, Progress(), model))
        return
    deadline = event.deadline or datetime.now(UTC) + time_limit
    # The request may have been accepted under an older declaration: today's provider runs it.
    admission = await jobs.add(NewJob(event.data, model.reference.provider, event.origin, deadline))
    if admission == "cancelled_before":
        await jobs.fail(event.data, failed(request.generation_id, 1, Progress(), CANCELLED))


async def generation_cancelled(event: Received[GenerationCancelled], jobs: JobIntake) -> None:
    """Stops a generation, wherever it is."""
    await jobs.cancel(event.tenant_id, event.data.generation_id, event.data.reason)


async def text_tokenized(event: Received[TextTokenized], ngrams: NgramLearner, encoding: str) -> None:
    """Learns a recorded text; texts under another encoding than the n-gram engine's are not for it."""
    if event.data.encoding != encoding or not event.data.tokens:
        return
    await ngrams.learn(
        TokenizedText(
            tenant_id=event.tenant_id,
            subject_id=event.subject_id,
            memory_id=event.data.memory_id,
            encoding=encoding,
            tokens=event.data.tokens,
            composition_id=event.data.composition_id,
        )
    )
