"""The tour: what Tessera does, on real input, in one readable script. docs/tour.md explains it.

    eval "$(make -s env)"
    .tessera/venv/bin/python tests/e2e/tour.py

It works in tenants of its own (`tour` and `tour-neighbour`), so it never touches anybody's data, and it can be run
again at any time. Every step checks what it claims; the first one that does not hold ends the tour with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import confluent_kafka
import httpx
import numpy
import openai
from sklearn.datasets import load_wine

from tessera.encodings import encoding

HERE = Path(__file__).parent / "tour"
TENANT, NEIGHBOUR = "tour", "tour-neighbour"
PATIENCE = timedelta(seconds=60)
QUESTION = "Where is the spare key?"


class TourError(Exception):
    """Something on the tour was not as promised."""


def check(holds: object, promise: str) -> None:
    """Raise TourError unless the promise holds."""
    if not holds:
        raise TourError(promise)


def eventually(look: Callable[[], Any], promise: str) -> Any:
    """Look until there is something to see; raise TourError when patience ends."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(0.1)
    raise TourError(f"{promise} (waited {PATIENCE.total_seconds():.0f} s)")


@dataclass
class Tour:
    """Where everything is, and what earlier steps found."""

    url: str
    admin_key: str
    bootstrap_servers: str
    database_url: str
    home: Path
    topic_prefix: str = ""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    key: str = ""
    neighbour_key: str = ""
    key_ids: list[str] = field(default_factory=list)
    chat_request_id: str = ""
    old_ids: set[str] = field(default_factory=set)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def conversation(self) -> str:
        """This run's conversation."""
        return f"lighthouse-{self.run}"

    def api(self, method: str, path: str, *, key: str = "", **arguments: Any) -> Any:
        """Call the gateway as any HTTP client would; raises TourError for an error answer."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        answer = self.http.request(method, f"{self.url}{path}", headers=headers, **arguments)
        check(answer.is_success, f"{method} {path} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None

    def search(self, query: str, *, key: str = "", limit: int = 5) -> list[dict[str, Any]]:
        """Search this run's conversation."""
        body = {"query": query, "limit": limit, "filter": {"conversation_id": self.conversation}}
        found: list[dict[str, Any]] = self.api("POST", "/v1/memories/search", key=key, json=body)["data"]
        return found

    def command(self, *arguments: str) -> Any:
        """Run the `tessera` command as an operator; its answer as JSON."""
        program = Path(sys.executable).with_name("tessera")
        environment = {**os.environ, "TESSERA_URL": self.url, "TESSERA_API_KEY": self.admin_key}
        done = subprocess.run(
            [str(program), "--json", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        check(done.returncode == 0, f"tessera {' '.join(arguments)} failed: {done.stderr}")
        return json.loads(done.stdout)


# --- 1 -----------------------------------------------------------------------------------------------------------------


def make_tenants(tour: Tour) -> Iterator[str]:
    """An operator makes two tenants and a key for each."""
    known = {tenant["id"] for tenant in tour.command("tenant", "list")["data"]}
    for tenant in (TENANT, NEIGHBOUR):
        if tenant not in known:
            tour.command("tenant", "create", tenant)
            yield f"tessera tenant create {tenant}"
    first, second = (tour.command("key", "create", "--tenant", tenant, "--name", f"tour {tour.run}") for tenant in (TENANT, NEIGHBOUR))
    tour.key, tour.neighbour_key, tour.key_ids = first["key"], second["key"], [first["id"], second["id"]]
    yield f"tessera key create --tenant {TENANT}: {tour.key[:16]}… (shown once)"


# --- 2 -----------------------------------------------------------------------------------------------------------------


def publish(tour: Tour) -> Iterator[str]:
    """A plain Kafka producer that knows nothing of Tessera publishes events; one is malformed."""
    producer = confluent_kafka.Producer({"bootstrap.servers": tour.bootstrap_servers, "acks": "all", "enable.idempotence": True})
    events = [*_messages(tour), *_document(tour), *_facts(tour)]
    for event_id, event_type, data in events:
        producer.produce(
            f"{tour.topic_prefix}ingest", key=tour.conversation, value=json.dumps(data), headers=_headers(event_id, event_type)
        )
    bad_id = f"bad-{tour.run}"
    bad = {"conversation_id": tour.conversation, "role": "user", "contnet": "A field with a typing error."}
    producer.produce(
        f"{tour.topic_prefix}ingest", key=tour.conversation, value=json.dumps(bad), headers=_headers(bad_id, "tessera.message.published.v1")
    )
    check(producer.flush(30) == 0, "Kafka acknowledges every event")
    yield f"{len(events)} events and one malformed one on the topic ingest"

    for event_id, _, _ in events:
        eventually(lambda event_id=event_id: _state(tour, event_id) == "searchable", f"{event_id} becomes searchable")
    yield "all of them are searchable"

    refusal = _refusal(tour, bad_id)
    check(refusal["reason"]["param"] in {"contnet", "content"}, f"the refusal names the field: {refusal}")
    check(_state(tour, bad_id) == "refused", "GET /v1/ingest/{id} says refused")
    yield f"the malformed one is on refused.{TENANT}: {refusal['reason']['code']}, field {refusal['reason']['param']}"


def _messages(tour: Tour) -> Iterator[tuple[str, str, dict[str, Any]]]:
    now = datetime.now(UTC)
    for number, line in enumerate((HERE / "conversation.txt").read_text(encoding="utf-8").splitlines()):
        days, speaker, text = line.split("|", 2)
        event_id = f"message-{tour.run}-{number:02}"
        if int(days) > 365:
            tour.old_ids.add(event_id)
        occurred_at = (now - timedelta(days=int(days), seconds=-number)).isoformat()
        data = {"conversation_id": tour.conversation, "role": "user", "speaker": speaker, "content": text, "occurred_at": occurred_at}
        yield event_id, "tessera.message.published.v1", data


def _document(tour: Tour) -> Iterator[tuple[str, str, dict[str, Any]]]:
    content = (HERE / "boiler-manual.md").read_text(encoding="utf-8")
    data = {"document_id": f"boiler-{tour.run}", "title": "Hartwell 200", "content": content, "media_type": "text/markdown"}
    yield f"document-{tour.run}", "tessera.document.published.v1", data


def _facts(tour: Tour) -> Iterator[tuple[str, str, dict[str, Any]]]:
    facts = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
    for number, entity in enumerate(facts["entities"]):
        yield f"entity-{tour.run}-{number}", "tessera.entity.published.v1", entity
    for number, relation in enumerate(facts["relations"]):
        yield f"relation-{tour.run}-{number}", "tessera.relation.published.v1", relation


def _headers(event_id: str, event_type: str) -> list[tuple[str, str | bytes | None]]:
    return [
        ("ce_specversion", "1.0"),
        ("ce_id", event_id),
        ("ce_source", "/tour"),
        ("ce_type", event_type),
        ("ce_tenantid", TENANT),
        ("content-type", "application/json"),
    ]


def _state(tour: Tour, event_id: str) -> str:
    return str(tour.api("GET", f"/v1/ingest/{event_id}")["status"])


def _refusal(tour: Tour, event_id: str) -> dict[str, Any]:
    settings = {"bootstrap.servers": tour.bootstrap_servers, "group.id": f"tour-{tour.run}", "auto.offset.reset": "earliest"}
    consumer = confluent_kafka.Consumer(settings)
    consumer.subscribe([f"{tour.topic_prefix}refused.{TENANT}"])

    def look() -> dict[str, Any] | None:
        message = consumer.poll(1.0)
        told: dict[str, Any] = json.loads(message.value() or b"{}") if message and not message.error() else {}
        return told if told.get("refused_id") == event_id else None

    try:
        refusal: dict[str, Any] = eventually(look, f"{event_id} is refused where its producer can see it")
        return refusal
    finally:
        consumer.close()


# --- 3 -----------------------------------------------------------------------------------------------------------------


def search(tour: Tour) -> Iterator[str]:
    """A search finds the right message and says why; the neighbour sees nothing."""
    best = tour.search(QUESTION)[0]
    check("blue flowerpot" in best["text"], f"the right message is found first, not {best['text']!r}")
    scores = best["scores"]
    parts = sum(scores[part] for part in ("vector", "lexical", "importance", "recency"))
    check(abs(parts - scores["total"]) < 1e-6, f"the parts of the score add up: {scores}")
    explained = ", ".join(f"{part} {scores[part]:.3f}" for part in ("vector", "lexical", "importance", "recency"))
    yield f"“{best['text']}”"
    yield f"total {scores['total']:.3f} = {explained}"
    body = {"query": QUESTION, "limit": 10}
    check(tour.api("POST", "/v1/memories/search", key=tour.neighbour_key, json=body)["data"] == [], "the neighbour sees nothing")
    yield f"the same search by {NEIGHBOUR}: nothing"


# --- 4 -----------------------------------------------------------------------------------------------------------------


def chat(tour: Tour) -> Iterator[str]:
    """The official OpenAI SDK, only its base_url changed, streams an answer grounded on that memory."""
    client = openai.OpenAI(base_url=f"{tour.url}/v1", api_key=tour.key)
    yield "models: " + ", ".join(model.id for model in client.models.list())
    tour.chat_request_id = f"tour-{uuid.uuid4()}"
    messages: list[Any] = [{"role": "system", "content": "Answer from memory."}, {"role": "user", "content": QUESTION}]
    memory = {"tessera": {"memory": {"limit": 5, "conversation_id": tour.conversation}}}
    stream = client.chat.completions.create(
        model="local/quote",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=memory,
        extra_headers={"x-request-id": tour.chat_request_id},
    )
    chunks = list(stream)
    answer = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    check("blue flowerpot" in answer, f"the answer is grounded on memory: {answer!r}")
    check(reasons == ["stop"], f"the stream ends with one finish_reason: {reasons}")
    yield f"streamed in {len(chunks)} chunks: {answer.strip()}"
    yield _checked_usage(tour, chunks[-1].usage, messages, answer)

    stopped = client.chat.completions.create(model="local/quote", messages=messages, stop=["flowerpot"], extra_body=memory)
    text = stopped.choices[0].message.content or ""
    check(stopped.choices[0].finish_reason == "stop", "a stop sequence ends with finish_reason stop")
    check(text.rstrip().endswith("blue") and "flowerpot" not in text, f"nothing of the stop sequence is returned: {text!r}")
    yield f"with stop=['flowerpot']: {text.strip()!r}, finish_reason {stopped.choices[0].finish_reason}"

    completion = client.completions.create(model="local/ngram", prompt="The lens", max_tokens=8, temperature=0, seed=1)
    check(completion.choices[0].finish_reason in {"length", "stop"}, "local/ngram says why it ended")
    yield f"local/ngram, learned from the same events, continues “The lens”: {completion.choices[0].text!r}"


def _checked_usage(tour: Tour, usage: Any, messages: list[Any], answer: str) -> str:
    model = tour.api("GET", "/v1/models/local/quote")["tessera"]
    source = usage.model_dump().get("source")
    if source == "counted":
        counted = (_prompt_tokens(messages, model["encoding"], model["template"]), len(encoding(model["encoding"]).encode(answer)))
        check((usage.prompt_tokens, usage.completion_tokens) == counted, f"usage {usage} equals tiktoken's {counted}")
    check(source in {"counted", "provider", "estimated"}, f"usage says where it comes from: {usage}")
    told = f"{source} under {model['encoding']}, template {model['template']}"
    return f"usage: {usage.prompt_tokens} + {usage.completion_tokens} tokens, {told}"


def _prompt_tokens(messages: list[Any], encoding_name: str, template: str) -> int:
    tokens = encoding(encoding_name).encode
    if template == "plain":
        return len(tokens("\n".join(message["content"] for message in messages)))
    return 3 + sum(3 + len(tokens(message["role"])) + len(tokens(message["content"])) for message in messages)


# --- 5 -----------------------------------------------------------------------------------------------------------------


def tokens(tour: Tour) -> Iterator[str]:
    """The tokenizer encodes and decodes exactly, and keeps the text as content-addressed compositions."""
    text = "灯塔之光 🐳 shines: naïve café, 12 visitors 👩‍👩‍👧."
    encoded = tour.api("POST", "/v1/tokenize", json={"text": text, "encoding": "o200k_base"})
    decoded = tour.api("POST", "/v1/detokenize", json={"tokens": encoded["tokens"], "encoding": "o200k_base"})
    rebuilt = tour.api("POST", "/v1/detokenize", json={"composition_id": encoded["composition_id"], "encoding": "o200k_base"})
    check(decoded["text"] == rebuilt["text"] == text, "both ways back give the same text")
    check(encoded["tokens"] == encoding("o200k_base").encode(text), "the tokens are tiktoken's")
    stored = asyncio.run(_stored(tour, bytes.fromhex(encoded["composition_id"])))
    check(stored == 32, "the composition is stored in Postgres under 32 bytes")
    yield f"{text} → {encoded['count']} tokens → the same text"
    yield f"composition {encoded['composition_id'][:16]}… stored in Postgres under {stored} bytes"


async def _stored(tour: Tour, composition_id: bytes) -> int:
    connection = await asyncpg.connect(tour.database_url)
    try:
        query = "SELECT octet_length(id) FROM tokenizer.composition WHERE tenant_id = $1 AND id = $2"
        return int(await connection.fetchval(query, TENANT, composition_id) or 0)
    finally:
        await connection.close()


# --- 6 -----------------------------------------------------------------------------------------------------------------


def retention(tour: Tour) -> Iterator[str]:
    """A policy is set; its dry run names what it would archive, the run archives exactly that."""
    policy = {"max_age_days": 365, "kinds": ["message"]}
    tour.api("PUT", "/v1/retention/policy", json=policy)
    check(tour.search("green dinghy Petrel")[0]["origin_id"] in tour.old_ids, "an old memory is found before")
    plan = _finished_sweep(tour, {"dry_run": True}, "planned")
    named = {item["memory_id"] for item in plan["data"]}
    yield f"dry run: {len(named)} memories older than {policy['max_age_days']} days would be archived"
    check(_memories_of(tour, tour.old_ids) <= named, "the dry run names every old message of this conversation")
    check(tour.search("green dinghy Petrel")[0]["origin_id"] in tour.old_ids, "a dry run changes nothing")
    done = _finished_sweep(tour, {"dry_run": False, "plan": plan["id"]}, "completed")
    archived = {item["memory_id"] for item in done["data"] if item["state"] == "archived"}
    check(archived == named, f"the run archived {len(archived)} memories, exactly those that were named")
    yield f"run: {len(archived)} archived, exactly those"
    left = {memory["origin_id"] for memory in tour.search("green dinghy Petrel", limit=50)}
    check(not left & tour.old_ids, "what is archived is no longer found")
    yield "what is archived is no longer found"


def _memories_of(tour: Tour, event_ids: set[str]) -> set[str]:
    return {memory for event_id in event_ids for memory in tour.api("GET", f"/v1/ingest/{event_id}")["memory_ids"]}


def _finished_sweep(tour: Tour, body: dict[str, Any], state: str) -> dict[str, Any]:
    sweep = tour.api("POST", "/v1/retention/sweeps", json=body)

    def look() -> dict[str, Any] | None:
        report = tour.api("GET", f"/v1/retention/sweeps/{sweep['id']}", params={"limit": 500})
        check(report["status"] != "failed", f"the sweep failed: {report['problem']}")
        return report if report["status"] == state else None

    report: dict[str, Any] = eventually(look, f"the sweep is {state}")
    return report


# --- 7 -----------------------------------------------------------------------------------------------------------------


def validation(tour: Tour) -> Iterator[str]:
    """Two tables made from a real one are judged against it: a healthy one and a collapsed one."""
    wine = load_wine()
    order = numpy.random.default_rng(7).permutation(len(wine.data))
    reference, healthy = wine.data[order[: len(order) // 2]], wine.data[order[len(order) // 2 :]]
    collapsed = healthy.mean(axis=0) + 0.2 * (healthy[:12].repeat(8, axis=0) - healthy.mean(axis=0))
    names = list(wine.feature_names)
    reference_id = _uploaded(tour, "reference", names, reference)
    for name, table in (("healthy", healthy), ("collapsed", collapsed)):
        report = _judged(tour, _uploaded(tour, name, names, table), reference_id)
        approved = report["verdict"] == "approve"
        check(approved == (name == "healthy"), f"the {name} table is {report['verdict']}: {report['reasons']}")
        yield f"{name}: {report['verdict']}. {report['reasons'][0]}"


def _uploaded(tour: Tour, name: str, names: list[str], table: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([names, *table.tolist()])
    answer = tour.api("POST", "/v1/datasets", files={"file": (f"{name}.csv", text.getvalue(), "text/csv")})
    return str(answer["id"])


def _judged(tour: Tour, dataset: str, reference: str) -> dict[str, Any]:
    accepted = tour.api("POST", "/v1/validations", json={"dataset": dataset, "reference": reference})

    def look() -> dict[str, Any] | None:
        state = tour.api("GET", f"/v1/validations/{accepted['id']}")
        check(state["status"] != "failed", f"the validation failed: {state['problem']}")
        return state["report"] if state["status"] == "completed" else None

    report: dict[str, Any] = eventually(look, "the validation ends")
    return report


# --- 8 -----------------------------------------------------------------------------------------------------------------


def trace(tour: Tour) -> Iterator[str]:
    """The chat's request id leads through the logs and the trace of every service that it passed."""
    passed = ("gateway", "tokenizer", "memory", "generator")
    for service in passed:
        eventually(lambda service=service: _logged(tour, service), f"the log of {service} has {tour.chat_request_id}")
    yield f"request id {tour.chat_request_id} is in the logs of {', '.join(passed)}"

    def look() -> str:
        program = [sys.executable, "-m", "tessera.telemetry.trace", tour.chat_request_id]
        environment = {**os.environ, "TESSERA_HOME": str(tour.home)}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout if done.returncode == 0 and all(service in done.stdout for service in passed) else ""

    tree = eventually(look, f"the trace shows {', '.join(passed)}")
    yield f"make trace ID={tour.chat_request_id}"
    yield from (f"  {line}" for line in tree.splitlines()[:40])


def _logged(tour: Tour, service: str) -> bool:
    return any(
        tour.chat_request_id in path.read_text(encoding="utf-8", errors="replace") for path in (tour.home / "logs").rglob(f"*{service}*")
    )


# --- 9 -----------------------------------------------------------------------------------------------------------------


def farewell(tour: Tour) -> Iterator[str]:
    """The keys of this run are revoked."""
    for key_id in tour.key_ids:
        tour.command("key", "revoke", key_id)
    yield "the keys of this run are revoked"


STEPS = (make_tenants, publish, search, chat, tokens, retention, validation, trace, farewell)


def go(tour: Tour) -> dict[str, Any]:
    """Go through every step, printing what happened; the time of each. Raises TourError."""
    seconds = {}
    for number, step in enumerate(STEPS, 1):
        started = time.monotonic()
        print(f"\n{number}. {step.__doc__}", flush=True)
        for line in step(tour):
            print(f"   {line}", flush=True)
        seconds[step.__name__] = round(time.monotonic() - started, 2)
    return {"seconds": seconds, "total_seconds": round(sum(seconds.values()), 2), "run": tour.run, "request_id": tour.chat_request_id}


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Go on the tour; the platform must run.")
    parser.add_argument("--report", type=Path, help="write a JSON report here")
    arguments = parser.parse_args()
    missing = [name for name in ("TESSERA_URL", "TESSERA_API_KEY", "KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL") if not os.environ.get(name)]
    if missing:
        print(f'Not set: {", ".join(missing)}. Start the platform with `make run`, then: eval "$(make -s env)"', file=sys.stderr)
        return 2
    tour = Tour(
        url=os.environ["TESSERA_URL"].rstrip("/"),
        admin_key=os.environ["TESSERA_API_KEY"],
        bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        database_url=os.environ["DATABASE_URL"],
        home=Path(os.environ.get("TESSERA_HOME", ".tessera")),
        topic_prefix=os.environ.get("TESSERA__KAFKA__TOPIC_PREFIX", ""),
    )
    try:
        report = go(tour)
    except TourError as error:
        print(f"\nThe tour ends here: not so: {error}", file=sys.stderr)
        return 1
    print(f"\nThe tour took {report['total_seconds']} s.")
    if arguments.report:
        arguments.report.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
