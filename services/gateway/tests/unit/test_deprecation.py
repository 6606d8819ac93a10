"""An operation on its way out says so, in every answer and in the document; the others say nothing."""

from datetime import UTC, datetime
from typing import Any

import pytest

from tessera.gateway.routes.application import api, api_routes
from tessera.gateway.routes.deprecation import DEPRECATED, Deprecated

pytestmark = pytest.mark.unit

GOING = Deprecated(datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 7, 1, 12, tzinfo=UTC), "/v2/models/{model}")


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPRECATED, ("GET", "/v1/models/{model}"), GOING)  # type: ignore[arg-type]
    monkeypatch.setitem(DEPRECATED, ("GET", "/v1/models"), Deprecated(GOING.since, GOING.sunset))  # type: ignore[arg-type]


@pytest.mark.usefixtures("going")
async def test_every_answer_of_it_says_since_when_until_when_and_what_instead(desk: Any) -> None:
    async with desk.client() as client:
        answers = [await client.get("/v1/models/chat"), await client.get("/v1/models/no/such one")]
        stays = [await client.delete("/v1/models/chat"), await client.get("/health"), await client.get("/nowhere")]
        listed = await client.get("/v1/models")
    assert [answer.status_code for answer in answers] == [200, 404]
    for answer, successor in zip(answers, ("/v2/models/chat", "/v2/models/no%2Fsuch%20one"), strict=True):
        assert answer.headers["deprecation"] == "@1798761600"
        assert answer.headers["sunset"] == "Thu, 01 Jul 2027 12:00:00 GMT"
        assert answer.headers["link"] == f'<{successor}>; rel="successor-version"'
    assert ("deprecation" in listed.headers, "link" in listed.headers) == (True, False)
    assert not any(name in answer.headers for answer in stays for name in ("deprecation", "sunset", "link"))


@pytest.mark.usefixtures("going")
def test_the_document_says_so_too(desk: Any) -> None:
    described = api(desk.rooms).openapi()["paths"]["/v1/models/{model}"]
    assert (described["get"].get("deprecated"), described["delete"].get("deprecated")) == (True, None)


def test_a_sunset_comes_after_the_deprecation() -> None:
    with pytest.raises(ValueError, match="sunset must be after since"):
        Deprecated(GOING.sunset, GOING.since)


def test_what_is_deprecated_exists() -> None:
    assert {*DEPRECATED} <= {(method, route.path_format) for route in api_routes() for method in route.methods or ()}
