"""Any provider that speaks the OpenAI API: vLLM, llama.cpp, Ollama, Perplexity, OpenAI itself, by its base URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import httpx
from pydantic import JsonValue, SecretStr

from tessera.contracts import GenerationReady, Problem, RetryableError
from tessera.contracts.sealing import opened
from tessera.generator.domain.endings import EngineError, GenerationInterruptedError
from tessera.generator.domain.pieces import Piece
from tessera.generator.domain.policies import ProviderPolicy
from tessera.generator.domain.prompts import wire_messages, wire_prompt
from tessera.generator.domain.provider_answers import DONE, malformed, pieces_of, problem_of_status
from tessera.generator.domain.sse import EventStreamParser, OversizedEventError
from tessera.generator.ports import Job
from tessera.resilience import Breaker, retrying
from tessera.telemetry import get_logger

_log = get_logger(__name__)
_RETRIED_STATUSES: Final = frozenset({408, 409, 425, 429})
_MAXIMUM_ERROR_BYTES: Final = 64 * 1024
_OWN_FIELDS: Final = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "n"}
    | {"max_tokens", "max_completion_tokens"}
)


class ProviderUnavailableError(RetryableError):
    """The provider could not be reached, was too slow or answered 5xx; counts for its breaker."""

    code = "provider_unavailable"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message, code=problem.code)
        self.problem = problem


class ProviderBusyError(RetryableError):
    """The provider works but asks to come back later; its breaker does not count it."""

    def __init__(self, problem: Problem, retry_after: timedelta | None) -> None:
        super().__init__(problem.message, code=problem.code)
        self.problem = problem
        self.retry_after = retry_after


class OpenAICompatibleProvider:
    """One provider. For one event loop; `close` it."""

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        api_key: SecretStr | None = None,
        upstream_names: Mapping[str, str],
        policy: ProviderPolicy,
        concurrency: int,
    ) -> None:
        self.name = name
        self.concurrency = concurrency
        self._upstream_names = upstream_names
        self._policy = policy
        self.breaker = Breaker(
            name, failure_threshold=policy.breaker_failures, reset_after=policy.breaker_reset, failures=(ProviderUnavailableError,)
        )
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            headers={"authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {},
            timeout=httpx.Timeout(policy.read_timeout.total_seconds(), connect=policy.connect_timeout.total_seconds()),
            limits=httpx.Limits(max_connections=concurrency + 4, max_keepalive_connections=concurrency),
            follow_redirects=False,
            trust_env=False,
        )

    @property
    def deterministic(self) -> bool:
        """A provider may always say something else the second time."""
        return False

    @property
    def shows_memories(self) -> bool:
        """Memories travel as a message of their own."""
        return True

    @property
    def suspended(self) -> timedelta:
        """While the breaker is open its jobs stay where they are."""
        return self.breaker.retry_after

    async def check(self) -> None:
        """Raises while the breaker is open. Does not call the provider: that may cost money."""
        if self.breaker.state == "open":
            raise RetryableError(f"The provider {self.name} failed too often.", code="provider_unavailable")

    async def close(self) -> None:
        """Closes every connection."""
        await self._client.aclose()

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The provider's pieces as they come; closing the generator closes the connection.

        Raises EngineError, GenerationInterruptedError when the answer breaks off, CircuitOpenError, InvalidError for what cannot be sent.
        """
        path, body = request_of(job.ready, self._upstream_names.get(job.ready.request.model.model_id), self._policy)
        async with AsyncExitStack() as connection:
            response = await self._opened(path, body, connection)
            source_ids = tuple(memory.memory_id for memory in job.ready.memories)
            async for piece in _pieces(response, job.ready.request.parameters.n or 1):
                yield replace(piece, source_ids=source_ids)

    async def _opened(self, path: str, body: Mapping[str, JsonValue], connection: AsyncExitStack) -> httpx.Response:
        """A response whose body has not been read, with status 200; what fails before that is tried again."""
        try:
            controller = retrying(self._policy.retry, self._is_retryable)
            return await controller(self._guarded, path, body, connection)
        except (ProviderUnavailableError, ProviderBusyError) as error:
            raise EngineError(error.problem) from error

    def _is_retryable(self, error: BaseException) -> bool:
        if isinstance(error, ProviderBusyError):
            return error.retry_after is None or error.retry_after <= self._policy.maximum_retry_after
        return isinstance(error, ProviderUnavailableError)

    async def _guarded(self, path: str, body: Mapping[str, JsonValue], connection: AsyncExitStack) -> httpx.Response:
        try:
            return await self.breaker.call(self._post, path, body, connection)
        except ProviderBusyError as error:
            if error.retry_after is not None and error.retry_after <= self._policy.maximum_retry_after:
                await asyncio.sleep(error.retry_after.total_seconds())
            raise

    async def _post(self, path: str, body: Mapping[str, JsonValue], connection: AsyncExitStack) -> httpx.Response:
        try:
            response = await self._client.send(self._client.build_request("POST", path, json=dict(body)), stream=True)
            if response.status_code == httpx.codes.OK:
                connection.push_async_callback(response.aclose)
                return response
            content = await _limited(response)
        except httpx.TimeoutException as error:
            problem = Problem(code="provider_timeout", message="The provider did not answer in time.", status=504)
            raise ProviderUnavailableError(problem) from error
        except httpx.TransportError as error:
            problem = Problem(code="provider_unavailable", message="The provider cannot be reached.", status=502)
            _log.warning("provider_unreachable", provider=self.name, error=repr(error))
            raise ProviderUnavailableError(problem) from error
        raise self._refused(response, content)

    def _refused(self, response: httpx.Response, content: bytes) -> Exception:
        status, problem = response.status_code, problem_of_status(response.status_code, content)
        _log.warning("provider_refused", provider=self.name, status=status, code=problem.code)
        if status in _RETRIED_STATUSES:
            return ProviderBusyError(problem, retry_after_of(response.headers))
        return ProviderUnavailableError(problem) if status >= 500 else EngineError(problem)


async def _limited(response: httpx.Response) -> bytes:
    """The beginning of an error's body, and the end of the connection."""
    content = b""
    try:
        async for part in response.aiter_bytes():
            content += part
            if len(content) >= _MAXIMUM_ERROR_BYTES:
                break
    finally:
        await response.aclose()
    return content[:_MAXIMUM_ERROR_BYTES]


def retry_after_of(headers: httpx.Headers) -> timedelta | None:
    """The pause that the provider asks for, in whole or broken seconds or milliseconds; None where it names none that can be read."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return timedelta(seconds=max(0.0, float(headers[name]) * unit))
        except (KeyError, ValueError, OverflowError):
            continue
    return None


async def _pieces(response: httpx.Response, choices: int) -> AsyncIterator[Piece]:
    """The pieces of a body that began with 200. Raises GenerationInterruptedError where it ends without saying that it ended."""
    if "text/event-stream" not in response.headers.get("content-type", ""):
        for piece in await _whole(response, choices):
            yield piece
        return
    ended: set[int] = set()
    async for data in _events(response):
        if data == DONE:
            return
        for piece in pieces_of(data, choices):
            if piece.finish_reason is not None:
                ended.add(piece.choice)
            yield piece
    if len(ended) < choices:
        raise GenerationInterruptedError("the provider's stream ended early.")


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    parser = EventStreamParser()
    try:
        async for received in response.aiter_bytes():
            for data in parser.feed(received):
                yield data
    except httpx.TimeoutException as error:
        raise GenerationInterruptedError("the provider fell silent.") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise GenerationInterruptedError("the connection to the provider broke.") from error
    except OversizedEventError as error:
        raise malformed(str(error)) from error
    for data in parser.finish():
        yield data


async def _whole(response: httpx.Response, choices: int) -> list[Piece]:
    """A server that does not stream answers with one document."""
    try:
        return pieces_of(await response.aread(), choices)
    except httpx.TransportError as error:
        raise GenerationInterruptedError("the connection to the provider broke.") from error


def request_of(ready: GenerationReady, upstream_name: str | None, policy: ProviderPolicy) -> tuple[str, dict[str, JsonValue]]:
    """The path and the body for a request; fields that Tessera does not know go along as they came.

    Raises InvalidError `sealed_content` for content that cannot be opened.
    """
    request, parameters = ready.request, ready.request.parameters
    body: dict[str, Any] = {name: value for name, value in parameters.extra.items() if name not in _OWN_FIELDS}
    # The best of several can only be known at the end, so no provider streams it.
    streams = (parameters.extra.get("best_of") or 1) == 1
    body |= {"model": upstream_name or request.model.model_id, "stream": streams}
    if streams and policy.stream_usage:
        body["stream_options"] = {"include_usage": True}
    given = {
        policy.limit_field: parameters.max_tokens,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "stop": list(parameters.stop) or None,
        "seed": parameters.seed,
        "n": parameters.n,
    }
    body |= {name: value for name, value in given.items() if value is not None}
    if request.messages is not None:
        return "chat/completions", {**body, "messages": wire_messages(request.messages, ready.memories)}
    return "completions", {**body, "prompt": wire_prompt(opened(request.prompt or ""), ready.memories)}
