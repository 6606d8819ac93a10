"""The public keys of an OpenID provider, over HTTP: fetched before they are needed, kept while the provider is away."""

import asyncio
import json
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import httpx
import jwt

from tessera.contracts.errors import RetryableError
from tessera.gateway.domain import errors
from tessera.gateway.domain.oidc import Algorithm
from tessera.resilience import Breaker, CircuitOpenError
from tessera.telemetry import get_logger

Jwk = Mapping[str, Any]

_MAXIMUM_DOCUMENT_BYTES: Final = 256 * 1024
_CURVES: Final[Mapping[Algorithm, str]] = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519"}

_log = get_logger(__name__)


class IssuerUnavailableError(RetryableError):
    """The provider could not be reached, was too slow, or did not answer with what OpenID Connect Discovery and RFC 7517 say."""

    code = "issuer_unavailable"


class KeySource(Protocol):
    """Where the keys are published."""

    async def keys(self) -> Sequence[Jwk]:
        """All that are published now. Raises IssuerUnavailableError."""
        ...


def issuer_client(context: ssl.SSLContext, timeout: timedelta) -> httpx.AsyncClient:
    """Goes where it is sent and nowhere else: no redirects, no proxies of the environment."""
    return httpx.AsyncClient(verify=context, timeout=timeout.total_seconds(), follow_redirects=False, trust_env=False)


class Issuer:
    """A provider. For one event loop; the client is the caller's to close."""

    def __init__(self, client: httpx.AsyncClient, issuer: str, jwks_url: str | None, timeout: timedelta) -> None:
        self._client = client
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._timeout = timeout

    async def keys(self) -> Sequence[Jwk]:
        """One request, or two where the address of the keys has to be discovered."""
        published = (await self._document(self._jwks_url or await self._discovered())).get("keys")
        if not isinstance(published, list):
            raise IssuerUnavailableError("What the issuer published is no key set.")
        return [key for key in published if isinstance(key, dict)]

    async def _discovered(self) -> str:
        configuration = await self._document(self._issuer.rstrip("/") + "/.well-known/openid-configuration")
        if configuration.get("issuer") != self._issuer:
            raise IssuerUnavailableError("The discovered configuration is another issuer's.")
        address = configuration.get("jwks_uri")
        if not isinstance(address, str) or (self._issuer.startswith("https://") and not address.startswith("https://")):
            raise IssuerUnavailableError("The discovered configuration names no jwks_uri that may be used.")
        return address

    async def _document(self, url: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._timeout.total_seconds()):
                document = json.loads(await self._content(url))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError) as error:
            raise IssuerUnavailableError(f"{url}: {type(error).__name__}") from error
        if not isinstance(document, dict):
            raise IssuerUnavailableError(f"{url}: no JSON object")
        return document

    async def _content(self, url: str) -> bytes:
        """As it was sent, at most so much of it: nothing is unpacked."""
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        content = b""
        async with self._client.stream("GET", url, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise IssuerUnavailableError(f"{url}: status {response.status_code}")
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > _MAXIMUM_DOCUMENT_BYTES:
                    raise IssuerUnavailableError(f"{url}: larger than {_MAXIMUM_DOCUMENT_BYTES} bytes")
        return content


class KeySet:
    """The published keys that may check a signature under one of the trusted algorithms. Others are not there."""

    def __init__(self, published: Iterable[Jwk], algorithms: Iterable[Algorithm]) -> None:
        self._keys: defaultdict[tuple[Algorithm, str | None], list[jwt.PyJWK]] = defaultdict(list)
        trusted = tuple(algorithms)
        for key in published:
            for algorithm in (each for each in trusted if _fits(key, each)):
                if (usable := _usable(key, algorithm)) is not None:
                    for key_id in {key.get("kid"), None}:
                        self._keys[algorithm, key_id].append(usable)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, algorithm: Algorithm, key_id: str | None) -> jwt.PyJWK | None:
        """The one key that is meant: a token may leave out the id only while there is no choice."""
        found = self._keys.get((algorithm, key_id), [])
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Freshness:
    """How old keys may be."""

    renewed_after: timedelta = timedelta(minutes=5)
    """Then they are fetched again: until then a key that the issuer withdrew is still trusted."""
    asked_at_most_every: timedelta = timedelta(seconds=10)
    """However many tokens name keys that nobody knows."""
    kept_for: timedelta = timedelta(days=1)
    """While the issuer is away; then no token can be checked."""


class IssuerKeys:
    """The keys as they were fetched last. For one event loop.

    A known key is found without waiting. One that is not known has the issuer asked, once for all who wait, at most every
    `asked_at_most_every`; an issuer that does not answer is left in peace by the breaker.
    """

    def __init__(
        self,
        source: KeySource,
        algorithms: Iterable[Algorithm],
        breaker: Breaker,
        freshness: Freshness | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._algorithms = tuple(algorithms)
        self._breaker = breaker
        self._freshness = freshness or Freshness()
        self._clock = clock
        self._keys = KeySet((), ())
        self._fetched_at = float("-inf")
        self._failure: str | None = "The issuer was not asked for its keys yet."
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, algorithm: Algorithm, key_id: str | None) -> jwt.PyJWK | None:
        """None where the issuer has no such key. Raises ApiError 503 where that cannot be known."""
        found = self._known(algorithm, key_id)
        if found is None and self._age() >= self._freshness.asked_at_most_every:
            try:
                await self._fetched()
            except (IssuerUnavailableError, CircuitOpenError) as error:
                raise errors.unavailable("The issuer of access tokens") from error
            found = self._known(algorithm, key_id)
        return found

    async def once(self) -> None:
        """Fetches the keys where it is time for that. Raises RetryableError or CircuitOpenError."""
        if self._failure is not None or self._age() >= self._freshness.renewed_after:
            await self._fetched()

    async def check(self) -> None:
        """Raises while the keys cannot be had, or none of them is of use."""
        if self._failure is not None:
            raise IssuerUnavailableError(self._failure)
        if not self._keys:
            raise IssuerUnavailableError("The issuer publishes no key of a trusted algorithm.")

    def _known(self, algorithm: Algorithm, key_id: str | None) -> jwt.PyJWK | None:
        return self._keys.find(algorithm, key_id) if self._age() < self._freshness.kept_for else None

    def _age(self) -> timedelta:
        return timedelta(seconds=min(self._clock() - self._fetched_at, 1e9))

    async def _fetched(self) -> None:
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._breaker.call(self._fetch), name="issuer-keys")
            self._fetching.add_done_callback(_retrieved)
        # Shielded: whoever waits may leave, the others go on waiting.
        await asyncio.shield(self._fetching)

    async def _fetch(self) -> None:
        try:
            published = await self._source.keys()
        except IssuerUnavailableError as error:
            self._failure = error.message
            raise
        self._keys, self._fetched_at, self._failure = KeySet(published, self._algorithms), self._clock(), None


def _retrieved(fetching: asyncio.Task[None]) -> None:
    """Nobody may be waiting any more."""
    if not fetching.cancelled():
        fetching.exception()


def _fits(key: Jwk, algorithm: Algorithm) -> bool:
    """Whether the key is meant for signatures of the algorithm: never a secret one, and no other algorithm's."""
    operations = key.get("key_ops", ["verify"])
    return (
        key.get("kty") == _key_type(algorithm)
        and key.get("crv") == _CURVES.get(algorithm)
        and key.get("alg", algorithm) == algorithm
        and key.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
        and "d" not in key
        and isinstance(key.get("kid", ""), str)
    )


def _key_type(algorithm: Algorithm) -> str:
    return {"R": "RSA", "P": "RSA", "E": "EC"}[algorithm[0]] if algorithm != "EdDSA" else "OKP"


def _usable(key: Jwk, algorithm: Algorithm) -> jwt.PyJWK | None:
    try:
        made = jwt.PyJWK.from_dict(dict(key), algorithm)
        weakness = made.Algorithm.check_key_length(made.key)
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        weakness = str(error)
    if weakness is None:
        return made
    _log.warning("issuer_key_not_used", algorithm=algorithm, why=weakness)
    return None
