"""Former versions are lifted to the newest: the stored examples of every version ever committed, and a planted second version."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tessera.contracts.base import EventData
from tessera.contracts.catalogue import EVENT_TYPES
from tessera.contracts.errors import InvalidError
from tessera.contracts.schemas import SchemaStore, lifting_problems
from tessera.contracts.upcasting import UPCASTERS, Data, Upcasters

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PLANTED = SchemaStore(Path(__file__).parent / "planted")
V1 = "tessera.note.taken.v1"


class NoteTaken(EventData):
    """The newest version of what the folder `planted` holds."""

    event_type: ClassVar[str] = "tessera.note.taken.v2"
    words: tuple[str, ...]


def in_words(data: Data) -> Data:
    return {"words": str(data["note"]).split()}


def steps(step: object = in_words) -> Upcasters:
    made = Upcasters()
    made.step(V1)(step)  # type: ignore[type-var]
    return made


def committed() -> Iterator[tuple[str, int]]:
    """Every version in the folder of schemas."""
    for folder in (ROOT / "schemas").glob("*/v*"):
        yield f"tessera.{folder.parent.name}", int(folder.name[1:])


def test_every_version_ever_committed_can_be_read_as_the_newest() -> None:
    store = SchemaStore(ROOT)
    assert [problem for event in EVENT_TYPES.values() for problem in lifting_problems(store, event, UPCASTERS)] == []
    newest = {event.rsplit(".v", 1)[0]: int(event.rsplit(".v", 1)[1]) for event in EVENT_TYPES}
    assert [(name, version) for name, version in committed() if version > newest.get(name, 0)] == []


def test_a_former_version_is_lifted() -> None:
    assert list(lifting_problems(PLANTED, NoteTaken, steps())) == []
    lifted = NoteTaken.model_validate(steps().lifted(V1, {"note": "a b"}, NoteTaken))
    assert lifted.words == ("a", "b")


def test_a_version_without_a_step_is_found() -> None:
    (problem,) = lifting_problems(PLANTED, NoteTaken, Upcasters())
    assert V1 in problem
    assert not Upcasters().reaches(V1, NoteTaken)


def test_a_step_that_gives_something_else_is_found() -> None:
    (problem,) = lifting_problems(PLANTED, NoteTaken, steps(lambda data: {**data, "words": []}))
    assert "minimal.json" in problem


@pytest.mark.parametrize("data", [{}, [], "text", None, {"other": 1}])
def test_data_that_the_former_version_cannot_have_had_is_invalid(data: object) -> None:
    with pytest.raises(InvalidError) as refused:
        steps().lifted(V1, data, NoteTaken)
    assert refused.value.code == "data_invalid"


@pytest.mark.parametrize("name", ["tessera.note.taken.v2", "tessera.note.taken.v3", "tessera.note.taken", "tessera.other.v1", "v1", ""])
def test_what_is_no_former_version_is_not_lifted(name: str) -> None:
    assert not steps().reaches(name, NoteTaken)


def test_two_steps_from_one_version_are_refused() -> None:
    with pytest.raises(ValueError, match="already"):
        steps().step(V1)(in_words)
