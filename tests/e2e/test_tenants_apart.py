"""What one tenant made, another cannot see: over REST, whatever it knows of the other's ids."""

import uuid
from dataclasses import dataclass
from datetime import timedelta

import httpx
import pytest

from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PATIENCE = timedelta(seconds=60)
OWNER, STRANGER = "apart-owner", "apart-stranger"
TABLE = "a,b\n" + "\n".join(f"{number},{number * number % 7}" for number in range(60))


@dataclass(frozen=True)
class Belongings:
    """Two tenants' keys, and ids of what the first one made."""

    owner: str
    stranger: str
    event: str
    text: str
    dataset: str
    validation: str
    sweep: str


@pytest.fixture(scope="module")
def belongings(platform: Platform) -> Belongings:
    owner, stranger = platform.tenant(OWNER), platform.tenant(STRANGER)
    text, event = f"The combination is {uuid.uuid4()}.", str(uuid.uuid4())
    item = {"type": "message", "id": event, "conversation_id": "safe", "role": "user", "content": text}
    _made(platform.request("POST", "/v1/memories", key=owner, json=item))
    _made(platform.request("PUT", "/v1/retention/policy", key=owner, json={"max_age_days": 1}))
    dataset = _made(platform.request("POST", "/v1/datasets", key=owner, files={"file": ("table.csv", TABLE)}))["id"]
    validation = _made(platform.request("POST", "/v1/validations", key=owner, json={"dataset": dataset}))["id"]
    sweep = _made(platform.request("POST", "/v1/retention/sweeps", key=owner, json={"dry_run": True}))["id"]
    mine = Belongings(owner, stranger, event, text, dataset, validation, sweep)
    for path in (f"/v1/validations/{validation}", f"/v1/retention/sweeps/{sweep}"):
        eventually_blocking(lambda: platform.request("GET", path, key=owner).status_code == 200, PATIENCE)  # noqa: B023
    eventually_blocking(lambda: _status(platform, owner, event) == "searchable", PATIENCE)
    return mine


def _made(answer: httpx.Response) -> dict[str, str]:
    assert answer.is_success, answer.text
    return dict(answer.json())


def _status(platform: Platform, key: str, event: str) -> str:
    return str(platform.request("GET", f"/v1/ingest/{event}", key=key).json()["status"])


def _search(platform: Platform, key: str, query: str) -> list[str]:
    return [found["text"] for found in platform.request("POST", "/v1/memories/search", key=key, json={"query": query}).json()["data"]]


def test_the_owner_sees_it_all(platform: Platform, belongings: Belongings) -> None:
    assert belongings.text in _search(platform, belongings.owner, belongings.text)


def test_a_stranger_finds_nothing(platform: Platform, belongings: Belongings) -> None:
    assert not {belongings.text, "The owner's words."} & set(_search(platform, belongings.stranger, belongings.text))


def test_a_stranger_gets_an_answer_from_nothing_of_it(platform: Platform, belongings: Belongings) -> None:
    question = {
        "model": "local/quote",
        "messages": [{"role": "user", "content": belongings.text}],
        "tessera": {"memory": {}},
    }
    answers = {
        key: platform.request("POST", "/v1/chat/completions", key=key, json=question) for key in (belongings.owner, belongings.stranger)
    }
    said = {key: _made(answer)["choices"][0]["message"]["content"] for key, answer in answers.items()}  # type: ignore[index]
    assert belongings.text in said[belongings.owner]
    assert belongings.text not in said[belongings.stranger]


def test_a_strangers_question_after_an_event_knows_nothing(platform: Platform, belongings: Belongings) -> None:
    answer = platform.request("GET", f"/v1/ingest/{belongings.event}", key=belongings.stranger).json()
    assert (answer["status"], answer["memory_ids"], answer["reason"]) == ("unknown", [], None)


def test_the_same_event_id_is_two_events_of_two_tenants(platform: Platform, belongings: Belongings) -> None:
    event = str(uuid.uuid4())
    for key, content in ((belongings.owner, "The owner's words."), (belongings.stranger, "The stranger's words.")):
        item = {"type": "message", "id": event, "conversation_id": "same-id", "role": "user", "content": content}
        _made(platform.request("POST", "/v1/memories", key=key, json=item))
    for key in (belongings.owner, belongings.stranger):
        eventually_blocking(lambda: _status(platform, key, event) == "searchable", PATIENCE)  # noqa: B023
    assert "The stranger's words." in _search(platform, belongings.stranger, "words")
    assert "The owner's words." not in _search(platform, belongings.stranger, "words")


@pytest.mark.parametrize(("kind", "code"), [("validation", "validation_not_found"), ("sweep", "sweep_not_found")])
def test_a_stranger_is_told_that_there_is_no_such_thing(platform: Platform, belongings: Belongings, kind: str, code: str) -> None:
    path = {"validation": "/v1/validations/", "sweep": "/v1/retention/sweeps/"}[kind] + getattr(belongings, kind)
    answer = platform.request("GET", path, key=belongings.stranger)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_a_stranger_cannot_have_the_dataset_judged(platform: Platform, belongings: Belongings) -> None:
    answer = platform.request("POST", "/v1/validations", key=belongings.stranger, json={"dataset": belongings.dataset})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "dataset_not_found")


def test_a_stranger_cannot_carry_out_the_plan(platform: Platform, belongings: Belongings) -> None:
    body = {"dry_run": False, "plan": belongings.sweep}
    sweep = _made(platform.request("POST", "/v1/retention/sweeps", key=belongings.stranger, json=body))["id"]

    def ended() -> bool:
        answer = platform.request("GET", f"/v1/retention/sweeps/{sweep}", key=belongings.stranger)
        return answer.status_code == 404 or answer.json()["status"] in {"completed", "failed"}

    eventually_blocking(ended, PATIENCE)
    assert belongings.text in _search(platform, belongings.owner, belongings.text)


def test_a_policy_is_of_one_tenant(platform: Platform, belongings: Belongings) -> None:
    assert platform.request("GET", "/v1/retention/policy", key=belongings.stranger).json()["policy"] is None


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/tenants", "/v1/status"])
def test_a_tenants_key_lists_nothing_of_the_operator(platform: Platform, belongings: Belongings, path: str) -> None:
    answer = platform.request("GET", path, key=belongings.stranger)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
