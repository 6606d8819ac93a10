"""Real producers and clients that do not stop while something breaks, and what each of them was promised."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from chaos.observing import headers
from confluent_kafka import Producer

from tessera.testkit.history import Sent
from tessera.testkit.platform import Platform

KEYS = 8
"""Conversations of the direct producer; the gateway's client has one more."""
_TEXT = "Message {number} of {key}: the {colour} lamp was lit by keeper {keeper}."
_REQUEST_SECONDS = 20.0
_RETRY_SECONDS = 0.3
_TOLD = {"expired", "generation_interrupted"}
"""Answers after which repeating a generation under its key changes nothing: its asker knows that there will be none."""


@dataclass(frozen=True)
class Rates:
    """How much of everything, per second."""

    events: float = 20.0
    posts: float = 2.0
    chats: float = 1.0
    jobs: float = 0.4
    repeated: float = 0.05
    """Share of events that are sent ten times; as many come late once more, and as many change places with their successor."""


@dataclass
class Ledger:
    """What was sent, and what was promised. Written by the threads of a `Load`, read when they are through."""

    sent: list[Sent] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    chats: list[str] = field(default_factory=list)
    """Idempotency keys of answered chats."""
    told: list[str] = field(default_factory=list)
    """Chats whose asker was told that there will be no answer."""
    validations: list[str] = field(default_factory=list)
    sweeps: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """What a client gave up on."""
    answers: Counter[str] = field(default_factory=Counter)
    """Statuses of the gateway's answers, and the names of errors of connections."""
    records: int = 0
    """Handed to Kafka, repeats among them."""

    @property
    def unavailable(self) -> int:
        """Answers of 500 and above."""
        return sum(count for status, count in self.answers.items() if status.startswith("5"))


class Load:
    """Producers, writers, askers and jobs of one tenant. `start`, then `stop`."""

    def __init__(self, platform: Platform, tenant: str, key: str, randomness: random.Random, rates: Rates = Rates()) -> None:
        self.ledger = Ledger()
        self._platform = platform
        self._tenant = tenant
        self._key = key
        self._rates = rates
        self.hurry = 1.0
        """How many times faster than its rate the direct producer is."""
        self._seeds = {name: randomness.random() for name in ("produce", "dataset")}
        self._stopping = threading.Event()
        self._patience_until = float("inf")
        self._threads = [threading.Thread(target=work, name=work.__name__) for work in self._works()]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience_seconds: float) -> None:
        """Begin nothing more; what was begun is repeated until it succeeds or the patience ends. Blocks."""
        self._patience_until = time.monotonic() + patience_seconds
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _works(self) -> list[Callable[[], None]]:
        rated = [(self._produce, self._rates.events), (self._post, self._rates.posts), (self._chat, self._rates.chats)]
        return [work for work, rate in [*rated, (self._jobs, self._rates.jobs)] if rate > 0]

    def _running(self, rate: float) -> bool:
        return not self._stopping.wait(1 / rate)

    # --- events straight to Kafka -----------------------------------------------------------------
    def _produce(self) -> None:
        producer = Producer(
            {
                "bootstrap.servers": self._platform.stack.kafka_bootstrap_servers,
                "enable.idempotence": True,
                "message.timeout.ms": 300_000,
                "reconnect.backoff.max.ms": 500,
                "log_level": 0,
                "linger.ms": 2,
            }
        )
        randomness, number = random.Random(self._seeds["produce"]), 0
        while self._running(self._rates.events * self.hurry):
            swapped = randomness.random() < self._rates.repeated
            for each in (number + KEYS, number) if swapped else (number,):
                self._send(producer, randomness, each)
            number += 1 if not swapped else KEYS + 1
            producer.poll(0)
        left = producer.flush(max(1.0, self._patience_until - time.monotonic()))
        self.ledger.unfinished += [f"{left} events that Kafka never acknowledged"] if left else []

    def _send(self, producer: Producer, randomness: random.Random, number: int) -> None:
        """`number` once, or ten times; perhaps an old one again after it."""
        event = f"e-{number:06}", f"c-{number % KEYS}"
        self.ledger.sent.append(Sent(*event))
        for _ in range(10 if randomness.random() < self._rates.repeated else 1):
            self._hand_over(producer, *event)
        if randomness.random() < self._rates.repeated:
            old = randomness.choice(self.ledger.sent[-500:])
            if old.id.startswith("e-"):
                self._hand_over(producer, old.id, old.key)

    def _hand_over(self, producer: Producer, event: str, conversation: str) -> None:
        def told(error: object, _: object) -> None:
            if error is None:
                self.ledger.acknowledged.append(event)

        self.ledger.records += 1
        topic = f"{self._platform.kafka_prefix}ingest"
        value = json.dumps(message(event, conversation))
        producer.produce(topic, key=conversation, value=value, headers=headers(self._tenant, event), on_delivery=told)

    # --- clients of the gateway -------------------------------------------------------------------
    def _post(self) -> None:
        number = 0
        while self._running(self._rates.posts):
            name = f"p-{number:05}"
            self.ledger.sent.append(Sent(name, "posted"))
            self.ledger.records += 1
            body = {"type": "message", "id": name, **message(name, "posted")}
            if self._done(name, "POST", "/v1/memories", json=body) is not None:
                self.ledger.acknowledged.append(name)
            number += 1

    def _chat(self) -> None:
        number = 0
        while self._running(self._rates.chats):
            name = f"chat-{number}"
            body = {
                "model": "local/quote",
                "messages": [{"role": "user", "content": f"Which lamp did message {number} speak of?"}],
                "tessera": {"memory": {"limit": 3}},
                "stream": number % 2 == 1,
            }
            if self._done(name, "POST", "/v1/chat/completions", json=body, headers={"Idempotency-Key": name}) is not None:
                self.ledger.chats.append(name)
            number += 1

    def _jobs(self) -> None:
        """A sweep and a validation in turn."""
        dataset = self._prepared()
        number = 0
        while dataset and self._running(self._rates.jobs):
            name = f"job-{number}"
            path, body, done = (
                ("/v1/retention/sweeps", {"dry_run": True}, self.ledger.sweeps)
                if number % 2
                else ("/v1/validations", {"dataset": dataset}, self.ledger.validations)
            )
            answer = self._done(name, "POST", path, json=body, headers={"Idempotency-Key": name})
            if answer is not None:
                done.append(answer.json()["id"])
            number += 1

    def _prepared(self) -> str | None:
        """A policy and a dataset; the dataset's id."""
        policy = self._done("policy", "PUT", "/v1/retention/policy", json={"max_age_days": 3650})
        rows = "\n".join(["a,b", *(f"{number % 17},{number * number % 23}" for number in range(60))])
        answer = self._done(
            "dataset", "POST", "/v1/datasets", files={"file": ("d.csv", rows, "text/csv")}, headers={"Idempotency-Key": "dataset"}
        )
        return str(answer.json()["id"]) if policy and answer else None

    def _done(self, name: str, method: str, path: str, **arguments: Any) -> httpx.Response | None:
        """Repeats until it succeeds or the patience ends (None)."""
        while time.monotonic() < self._patience_until:
            try:
                answer = self._platform.request(method, path, key=self._key, **{"timeout": _REQUEST_SECONDS, **arguments})
                self.ledger.answers[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                self.ledger.answers[type(error).__name__] += 1
            else:
                if _succeeded(answer):
                    return answer
                if _code(answer) in _TOLD:
                    self.ledger.told.append(name)
                    return None
            time.sleep(_RETRY_SECONDS)
        self.ledger.unfinished.append(f"{name} never succeeded: {dict(self.ledger.answers)}")
        return None


def message(event: str, conversation: str) -> dict[str, Any]:
    """The same data for the same event, however often it is sent."""
    number = int(event.rpartition("-")[2])
    text = _TEXT.format(number=number, key=conversation, colour=("red", "green", "white")[number % 3], keeper=number * 7 % 11)
    return {"conversation_id": conversation, "role": "user", "content": text, "occurred_at": "2026-01-01T00:00:00Z"}


def _succeeded(answer: httpx.Response) -> bool:
    """A stream has ended well only if its end came."""
    streamed = answer.headers.get("content-type", "").startswith("text/event-stream")
    return answer.is_success and (not streamed or ("[DONE]" in answer.text and '"error"' not in answer.text))


def _code(answer: httpx.Response) -> str:
    return next((code for code in _TOLD if f'"{code}"' in answer.text), "")
