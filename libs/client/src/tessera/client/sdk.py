"""A thin, synchronous client of the REST API. Answers are the JSON objects of the API document, as dictionaries."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self

import httpx

from tessera.client.errors import AnswerError, UnreachableError
from tessera.contracts.ids import uuid7

Json = dict[str, Any]

_RETRIED: Final = (429, 503)
_NOT_FRESH: Final = ("not_up_to_bound", "write_pending")
_LONGEST_PAUSE: Final = 5.0
_LETTERS: Final = 100
"""Dead letters decided on in one request."""
_FINAL_STATES: Final = ("searchable", "refused")


class Tessera:
    """A connection to one gateway with one key. Blocks; not safe across threads; close it or use it in a `with` statement.

    A request that was answered 429 or 503, or got no connection, is sent again: at most `attempts` times in all; but not a read that has
    waited for freshness as long as it was asked to. One that was sent and got no answer is repeated too, except the making of tenants and
    keys: everything else that writes carries an Idempotency-Key. Raises AnswerError for a refusal and UnreachableError when no answer came.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout: timedelta = timedelta(seconds=30),
        attempts: int = 3,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {api_key}"},
            timeout=timeout.total_seconds(),
            transport=transport,
        )
        self._attempts = attempts
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    # --- memory ---
    def ingest(self, item: Mapping[str, Any], *, idempotency_key: str | None = None) -> Json:
        """Publishes one message, document, entity or relation; the answer has its `event_id`."""
        return self._post("/v1/memories", item, idempotency_key)

    def ingest_batch(self, items: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None) -> Json:
        """Publishes up to 500 items; `data` has one result per item, in order."""
        return self._post("/v1/memories/batch", {"items": list(items)}, idempotency_key)

    def ingestion(self, event_id: str) -> Json:
        """Where an ingested event stands."""
        return self._request("GET", f"/v1/ingest/{event_id}")

    def wait_until_searchable(self, event_id: str, *, patience: timedelta = timedelta(seconds=30)) -> Json:
        """Asks until the event is searchable or refused, and returns its state. Raises UnreachableError when patience ends."""
        until = time.monotonic() + patience.total_seconds()
        while (state := self.ingestion(event_id))["status"] not in _FINAL_STATES:
            if time.monotonic() > until:
                raise UnreachableError(f"{event_id} is still {state['status']} after {patience.total_seconds():g} s")
            self._sleep(0.2)
        return state

    def search(self, query: str, *, limit: int = 10, consistency: Mapping[str, Any] | None = None, **recall_filter: Any) -> Json:
        """The best memories, best first. Filters: conversation_id, document_id, kinds.

        `consistency` says what the answer must hold, as the API document has it: `read_your_writes(answer)` for what this client wrote.
        """
        body = _given(query=query, limit=limit, filter=recall_filter, consistency=consistency)
        return self._post("/v1/memories/search", body, None)

    # --- administration ---
    def create_tenant(self, tenant_id: str, name: str | None = None) -> Json:
        """Makes a tenant. Needs a key with the scope admin."""
        return self._request("POST", "/v1/tenants", repeatable=False, json=_given(id=tenant_id, name=name))

    def tenants(self) -> list[Json]:
        """All tenants."""
        return self._all("/v1/tenants", {})

    def create_key(
        self,
        tenant_id: str | None = None,
        *,
        name: str | None = None,
        scopes: Sequence[str] = (),
        expires_at: str | None = None,
        limits: Mapping[str, float | None] | None = None,
    ) -> Json:
        """Makes a key; `key` in the answer is its text, shown this once.

        `limits`: requests_per_minute, tokens_per_minute, concurrent_streams, spend_per_day, in place of what every key may use.
        """
        own = _given(**limits or {}) or None
        body = _given(tenant_id=tenant_id, name=name, scopes=list(scopes) or None, expires_at=expires_at, limits=own)
        return self._request("POST", "/v1/keys", repeatable=False, json=body)

    def keys(self, tenant_id: str | None = None) -> list[Json]:
        """All keys of a tenant; of one's own where none is named."""
        return self._all("/v1/keys", _given(tenant_id=tenant_id))

    def rotate_key(self, key_id: str, *, grace_seconds: int | None = None) -> Json:
        """Gives a key another secret, in `key`, shown this once. The one it had lives for the grace: a day where it is not said."""
        return self._request("POST", f"/v1/keys/{key_id}/rotate", repeatable=False, json=_given(grace_seconds=grace_seconds))

    def revoke_key(self, key_id: str) -> None:
        """Makes a key open nothing any more."""
        self._request("DELETE", f"/v1/keys/{key_id}")

    def control_service(self, service: str, action: str, *, consumer: str | None = None, instance: str | None = None) -> Json:
        """Has replicas `pause` or `resume` a consumer, or `reload` their settings. Needs a key with the scope admin."""
        return self._request("POST", f"/v1/services/{service}/control", json=_given(action=action, consumer=consumer, instance=instance))

    def decide_parked(self, service: str, topic: str, partition: int, offset: int, outcome: str) -> Json:
        """Has an event that is stuck tried again (`retry`) or made a dead letter (`discard`); its key goes on. Needs the scope admin."""
        parked = {"topic": topic, "partition": partition, "offset": offset, "outcome": outcome}
        return self._request("POST", f"/v1/services/{service}/control", json={"action": "resume", "parked": parked})

    def dead_letters(self, *, limit: int | None = None, **query: Any) -> list[Json]:
        """Dead letters, the newest first; all of them where there is no `limit`. Needs a key with the scope admin.

        Filters: topic, service, code, since, until, event_id, tenant_id, status (pending, replayed, discarded, all).
        `order` is newest or oldest.
        """
        return self._first(limit, self._pages("/v1/dead-letters", _given(**query)))

    def audit_events(self, *, limit: int | None = None, **query: Any) -> list[Json]:
        """Who did what, the newest first; all of it where there is no `limit`. Needs a key with the scope audit.

        Filters: actor, action, target, tenant_id, since, until. With the scope admin as well, every tenant's.
        """
        return self._first(limit, self._pages("/v1/audit", _given(**query), size=100))

    def dead_letter(self, letter_id: str) -> Json:
        """One dead letter with the original key, headers and bytes."""
        return self._request("GET", f"/v1/dead-letters/{letter_id}")

    def replay_dead_letters(self, *, ids: Sequence[str] | None = None, dry_run: bool = False, **letter_filter: Any) -> list[Json]:
        """Publishes the original events of these letters again, or of all pending ones that fit the filter; what became of each.

        Repeating it changes nothing: each event has its effect once.
        """
        return self._decide("replay", ids, letter_filter, dry_run=dry_run)

    def discard_dead_letters(self, *, ids: Sequence[str] | None = None, dry_run: bool = False, **letter_filter: Any) -> list[Json]:
        """Has these letters, or all pending ones that fit the filter, no longer listed; what became of each."""
        return self._decide("discard", ids, letter_filter, dry_run=dry_run)

    def models(self) -> list[Json]:
        """Models on offer."""
        found: list[Json] = self._request("GET", "/v1/models")["data"]
        return found

    def status(self) -> Json:
        """The whole system."""
        return self._request("GET", "/v1/status")

    def spool(self) -> Json:
        """The spool of the replica that answers: its state, and `data` with every event in it, oldest first. Needs the scope admin."""
        page = self._request("GET", "/v1/spool", params={"limit": 200})
        while page["has_more"]:
            more = self._request("GET", "/v1/spool", params={"limit": 200, "after": page["next_cursor"]})
            page = {**more, "data": [*page["data"], *more["data"]]}
        return page

    def replay_spool(self, event_ids: Sequence[str]) -> list[Json]:
        """Has the replica that answers send these spooled events now; one result per id: published, waiting or not_found."""
        results: list[Json] = self._request("POST", "/v1/spool/replay", json={"event_ids": list(event_ids)})["data"]
        return results

    # --- transport ---
    def _post(self, path: str, body: Any, idempotency_key: str | None) -> Json:
        return self._request("POST", path, json=body, headers={"idempotency-key": idempotency_key or str(uuid7())})

    def _all(self, path: str, query: Json) -> list[Json]:
        return [entry for page in self._pages(path, query) for entry in page]

    def _first(self, limit: int | None, pages: Iterator[list[Json]]) -> list[Json]:
        found: list[Json] = []
        for page in pages:
            found += page
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def _pages(self, path: str, query: Json, *, size: int = 200) -> Iterator[list[Json]]:
        after: str | None = None
        while True:
            page = self._request("GET", path, params={**query, "limit": size, **_given(after=after)})
            yield page["data"]
            after = page["next_cursor"]
            if after is None:
                return

    def _decide(self, action: str, ids: Sequence[str] | None, letter_filter: Json, *, dry_run: bool) -> list[Json]:
        if ids is not None:
            bodies = [{"ids": list(ids[start : start + _LETTERS])} for start in range(0, len(ids), _LETTERS)]
            pages = [self._request("POST", f"/v1/dead-letters/{action}", json={**body, "dry_run": dry_run}) for body in bodies]
            return [one for page in pages for one in page["data"]]
        found: list[Json] = []
        body: Json = {"filter": _given(**letter_filter), "dry_run": dry_run}
        while True:
            page = self._request("POST", f"/v1/dead-letters/{action}", json=body)
            found += page["data"]
            if page["next_cursor"] is None:
                return found
            body["after"] = page["next_cursor"]

    def _request(self, method: str, path: str, *, repeatable: bool = True, **options: Any) -> Json:
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if last or not (repeatable or isinstance(error, httpx.ConnectError)):
                    raise UnreachableError(f"{self._http.base_url} does not answer: {error}") from error
                self._sleep(0.2 * attempt)
                continue
            if last or answer.status_code not in _RETRIED or _waited(answer):
                return _json_of(answer)
            self._sleep(_pause(answer, attempt))
        raise ValueError("attempts must be at least 1")


def read_your_writes(*answers: Json, wait: timedelta | None = None, until: str = "words") -> Json:
    """What makes a search, or `tessera.memory.consistency` of a chat, wait for writes, by what `ingest` or `ingest_batch` answered.

    Also takes answers of searches: then the next one is no older. `until` is `words` or `vectors`; without `wait` the server's own limit.
    """
    tokens = [answer["consistency"]["token"] for answer in answers]
    return _given(level="read_your_writes", token=tokens, until=until, wait_seconds=wait.total_seconds() if wait else None)


def _given(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _waited(answer: httpx.Response) -> bool:
    """Whether it is an answer to a read that is not as fresh as was asked: how long to wait for that, the caller has said."""
    try:
        return answer.json()["error"]["code"] in _NOT_FRESH
    except (ValueError, KeyError, TypeError):
        return False


def _pause(answer: httpx.Response, attempt: int) -> float:
    told = answer.headers.get("retry-after", "")
    return min(float(told) if told.isdigit() else 0.2 * attempt, _LONGEST_PAUSE)


def _json_of(answer: httpx.Response) -> Json:
    if answer.is_success:
        decoded: Json = answer.json() if answer.content else {}
        return decoded
    request_id = answer.headers.get("x-request-id")
    try:
        error = answer.json()["error"]
        raise AnswerError(answer.status_code, error["code"], error["message"], param=error["param"], request_id=request_id)
    except (ValueError, KeyError, TypeError) as unreadable:
        text = answer.text[:200] or answer.reason_phrase
        raise AnswerError(answer.status_code, "not_tessera", f"this is no answer of Tessera: {text}", request_id=request_id) from unreadable
