"""What OpenTelemetry's semantic conventions for generative AI want to know of a generation.

https://github.com/open-telemetry/semantic-conventions-genai (status: development).
"""

from __future__ import annotations

from tessera.contracts import OPERATION, GenerationCompleted, GenerationFailed
from tessera.generator.ports import Job
from tessera.telemetry import annotate, metrics


def named(job: Job) -> dict[str, str]:
    """The attributes that a span has from its beginning."""
    model = job.ready.request.model
    return {
        "gen_ai.operation.name": OPERATION[model.capability],
        "gen_ai.provider.name": model.provider,
        "gen_ai.request.model": model.model_id,
    }


def observe(job: Job, ending: GenerationCompleted | GenerationFailed, seconds: float) -> None:
    """Measures one attempt that ended, and completes the current span."""
    labels = tuple(named(job).values())
    error = ending.problem.code if isinstance(ending, GenerationFailed) else ""
    metrics.GEN_AI_CLIENT_SECONDS.labels(*labels, error).observe(seconds)
    if ending.usage is None:
        return
    for kind, tokens in (("input", ending.usage.prompt_tokens), ("output", ending.usage.completion_tokens)):
        metrics.GEN_AI_CLIENT_TOKENS.labels(*labels, kind).observe(tokens)
        annotate({f"gen_ai.usage.{kind}_tokens": tokens})
